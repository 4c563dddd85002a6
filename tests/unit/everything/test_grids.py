from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from segment_anything.utils.amg import build_point_grid

from tinysam.everything.grids import coarse_grid, crops_of, pixels_of


@pytest.mark.parametrize(("ratio", "side"), [(4, 8), (3.2, 10), (8, 4), (1, 32), (1000, 1)])
def test_the_coarse_grid_sits_on_cell_centres(ratio: float, side: int) -> None:
    coarse = coarse_grid(build_point_grid(32), ratio)
    centres = (np.arange(side) + 0.5) / side
    np.testing.assert_allclose(np.unique(coarse[:, 0]), centres)
    np.testing.assert_allclose(np.unique(coarse[:, 1]), centres)
    assert len(coarse) == side**2


def test_no_dense_points_mean_no_coarse_ones() -> None:
    assert coarse_grid(np.zeros((0, 2)), 4).shape == (0, 2)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2), st.floats(0, 1))
def test_crops_have_pixels_and_lie_within_the_image(height: int, width: int, layers: int, overlap: float) -> None:
    crops = crops_of((height, width), layers, overlap)
    assert crops[0].box == [0, 0, width, height]
    assert crops[0].layer == 0
    for crop in crops:
        assert 0 <= crop.x0 < crop.x1 <= width
        assert 0 <= crop.y0 < crop.y1 <= height


def test_points_fall_on_the_pixel_that_holds_them() -> None:
    rows, columns = pixels_of(np.array([[0.0, 0.0], [1.99, 0.5], [3.0, 2.0]]), (2, 3))
    assert rows.tolist() == [0, 0, 1]
    assert columns.tolist() == [0, 1, 2]
