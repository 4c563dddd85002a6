from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from segment_anything.utils.amg import build_point_grid

from tinysam.everything.grids import crops_of, nested_grids, pixels_of, round_grids


@pytest.mark.parametrize(
    ("ratio", "rounds", "sides"),
    [
        (4, 2, [8, 32]),
        (3.2, 2, [10, 32]),
        (8, 2, [4, 32]),
        (1, 2, [32, 32]),
        (1000, 2, [1, 32]),
        (4, 3, [8, 16, 32]),
        (8, 4, [4, 8, 16, 32]),
        (4, 1, [32]),
    ],
)
def test_each_rounds_grid_sits_on_cell_centres(ratio: float, rounds: int, sides: list[int]) -> None:
    grids = round_grids(build_point_grid(32), ratio, rounds)
    assert len(grids) == len(sides)
    for grid, side in zip(grids, sides, strict=True):
        centres = (np.arange(side) + 0.5) / side
        np.testing.assert_allclose(np.unique(grid[:, 0]), centres)
        np.testing.assert_allclose(np.unique(grid[:, 1]), centres)
        assert len(grid) == side**2


def test_no_dense_points_mean_no_coarse_ones() -> None:
    assert [len(grid) for grid in round_grids(np.zeros((0, 2)), 4, 3)] == [0]


@pytest.mark.parametrize(("side", "ratio", "rounds"), [(32, 4, 5), (32, 4, 2), (9, 2.5, 3), (7, 100, 4), (5, 2, 1)])
def test_nested_rounds_part_the_dense_grid(side: int, ratio: float, rounds: int) -> None:
    dense = build_point_grid(side)
    parts = nested_grids(dense, ratio, rounds)
    assert len(parts) == rounds
    everything = np.concatenate(parts)
    assert sorted(map(tuple, everything)) == sorted(map(tuple, dense))
    # The first of them spans the image as its coarse grid does.
    coarse = round_grids(dense, ratio, rounds)[0]
    distance = np.abs(parts[0][:, None] - coarse).max(2)
    assert len(parts[0]) == len(coarse)
    assert (distance.min(0) <= 0.5 / side + 1e-9).all()


def test_nested_rounds_keep_every_point_given_even_twice() -> None:
    points = np.array([[0.1, 0.2], [0.1, 0.2], [0.9, 0.8], [0.5, 0.5]])
    parts = nested_grids(points, 2, 3)
    assert sorted(map(tuple, np.concatenate(parts))) == sorted(map(tuple, points))
    assert [len(part) for part in nested_grids(np.zeros((0, 2)), 4, 3)] == [0]


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
