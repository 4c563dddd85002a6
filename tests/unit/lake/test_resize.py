from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinysam.lake.resize import shrink_to_grid
from tinysam.lake.rle import encode_rle


def exact(mask: np.ndarray, input_size: tuple[int, int], stride: int) -> np.ndarray:
    """The definition in rational numbers: is more than half of a grid pixel's square covered, or half on a chessboard's
    even squares?"""

    def overlaps(source: int, target: int) -> list[list[Fraction]]:
        step = Fraction(source, target) * stride  # a grid pixel's side in source pixels
        return [
            [max(Fraction(0), min((k + 1) * step, Fraction(i + 1)) - max(k * step, Fraction(i))) for i in range(source)]
            for k in range(-(-target // stride))
        ]

    rows = np.array(overlaps(mask.shape[0], input_size[0]), dtype=object)
    columns = np.array(overlaps(mask.shape[1], input_size[1]), dtype=object)
    area = rows @ mask.astype(int).astype(object) @ columns.T
    whole = Fraction(mask.shape[0], input_size[0]) * Fraction(mask.shape[1], input_size[1]) * stride**2
    chessboard = np.add.outer(*(np.arange(side) for side in area.shape)) % 2 == 0
    return ((area > whole / 2) | (chessboard & (area == whole / 2))).astype(bool)


def resized(mask: np.ndarray, input_size: tuple[int, int], stride: int) -> np.ndarray:
    top, left, patch = shrink_to_grid(encode_rle(mask), input_size, stride)
    whole = np.zeros([-(-side // stride) for side in input_size], dtype=bool)
    whole[top : top + patch.shape[0], left : left + patch.shape[1]] = patch
    return whole


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 14),
    width=st.integers(1, 14),
    target=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    stride=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 1000),
)
def test_every_pixel_is_decided_by_exact_coverage(
    height: int, width: int, target: tuple[int, int], stride: int, seed: int
) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < 0.6
    mask[0, 0] = True
    assert np.array_equal(resized(mask, target, stride), exact(mask, target, stride))


def test_of_half_covered_pixels_every_other_is_set() -> None:
    mask = np.zeros((8, 8), dtype=bool)
    mask[:, 1:5] = True
    assert resized(mask, (8, 8), 2).tolist() == [[1, 1, 1, 0], [0, 1, 0, 0]] * 2


@pytest.mark.parametrize(("source", "target"), [(256, 768), (1024, 1024), (500, 1024)])
def test_masks_neither_shrink_nor_move(source: int, target: int, rng: np.random.Generator) -> None:
    ys, xs = np.mgrid[:source, :source]
    step = source * 2 / target
    ratios, moves = [], []
    for _ in range(20):
        y, x = rng.uniform(20, source - 20, 2)
        disc = (ys - y) ** 2 + (xs - x) ** 2 < rng.uniform(8, 14) ** 2
        found = resized(disc, (target, target), 2)
        ratios.append(found.sum() * step**2 / disc.sum())
        centres = [np.mean(np.nonzero(mask), 1) + 0.5 for mask in (found, disc)]
        moves.append(centres[0] * step - centres[1])
    assert np.mean(ratios) == pytest.approx(1, abs=0.01)  # 0.95 without the chessboard, for the first two
    assert np.abs(np.mean(moves, 0)).max() < 0.05


def test_odd_sides_count_padding_as_background() -> None:
    # 5 input pixels make 2.5 grid pixels; half of the last lies outside the image, three quarters of the corner.
    assert resized(np.ones((5, 5), dtype=bool), (5, 5), 2).tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]


def test_equal_sizes_keep_every_pixel(rng: np.random.Generator) -> None:
    mask = rng.random((17, 23)) < 0.5
    assert np.array_equal(resized(mask, (17, 23), 1), mask)


@pytest.mark.parametrize("place", [(0, 0), (37, 55), (10, 55)])
def test_only_the_touched_part_of_the_grid_is_returned(place: tuple[int, int]) -> None:
    mask = np.zeros((40, 60), dtype=bool)
    mask[place[0] : place[0] + 3, place[1] : place[1] + 5] = True
    top, left, patch = shrink_to_grid(encode_rle(mask), (80, 120), 2)
    assert (top, left, patch.shape) == (*place, (3, 5))
    assert patch.all()
