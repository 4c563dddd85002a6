from __future__ import annotations

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tinysam.export.outline import outline

MASKS = arrays.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9)))


def signed_area(corners: np.ndarray) -> float:
    x, y = corners.T.astype(float)
    return 0.5 * float(x @ np.roll(y, -1) - y @ np.roll(x, -1))


def winding(corners: np.ndarray, x: float, y: float) -> int:
    """How often a closed polygon runs around a point, by its crossings of the ray to the right."""
    turns = 0
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if (y0 <= y) != (y1 <= y) and x0 + (y - y0) / (y1 - y0) * (x1 - x0) > x:
            turns += 1 if y1 > y0 else -1
    return turns


@example(mask=np.pad(np.zeros((1, 1), bool), ((6, 1), (3, 4)), constant_values=True))
@settings(deadline=None)
@given(mask=MASKS)
def test_a_pixel_is_inside_once_if_it_is_in_the_mask_and_never_else(mask: np.ndarray) -> None:
    corners = outline(mask)
    # Off the centre by amounts of no simple ratio, so that no line that joins two corners runs through the point.
    found = [[winding(corners, x + 0.50031831, y + 0.50070711) if len(corners) else 0 for x in range(mask.shape[1])]
             for y in range(mask.shape[0])]  # fmt: skip
    np.testing.assert_array_equal(found, mask.astype(int))
    if len(corners):
        assert signed_area(corners) == mask.sum()


def test_a_rectangle_has_four_corners() -> None:
    mask = np.zeros((5, 6), bool)
    mask[1:4, 2:5] = True
    assert outline(mask).tolist() == [[2, 1], [5, 1], [5, 4], [2, 4]]


def test_an_empty_mask_has_no_corner() -> None:
    assert outline(np.zeros((3, 3), bool)).shape == (0, 2)
