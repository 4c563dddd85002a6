from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from skimage import morphology

from tinysam.everything.small_regions import fill_holes, remove_islands

masks = st.tuples(st.integers(1, 14), st.integers(1, 14)).flatmap(lambda size: arrays(bool, size))


@given(masks, st.integers(1, 20))
def test_small_holes_are_filled(mask: np.ndarray, min_area: int) -> None:
    filled, changed = fill_holes(mask, min_area)
    expected = morphology.remove_small_holes(mask, max_size=min_area - 1, connectivity=2)
    np.testing.assert_array_equal(filled, expected)
    assert changed == (expected != mask).any()


@given(masks, st.integers(1, 20))
def test_small_islands_are_removed_but_for_the_largest(mask: np.ndarray, min_area: int) -> None:
    kept, changed = remove_islands(mask, min_area)
    expected = morphology.remove_small_objects(mask, max_size=min_area - 1, connectivity=2)
    assert changed == (expected != mask).any()
    if expected.any() or not mask.any():
        np.testing.assert_array_equal(kept, expected)
    else:
        assert 0 < kept.sum() < min_area
        assert not (kept & ~mask).any()
