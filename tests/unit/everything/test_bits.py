from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from tinysam.everything.bits import bits_above, count_bits, leading_zeros, trailing_zeros

WORDS = st.integers(1, 2**64 - 1)


@njit
def _bits_above(values, threshold):  # type: ignore[no-untyped-def]
    return bits_above(values.ctypes.data, threshold)


@njit
def _counts(word):  # type: ignore[no-untyped-def]
    return count_bits(word), trailing_zeros(word), leading_zeros(word)


@settings(deadline=None)  # the first example compiles
@given(st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_the_first_number_is_the_lowest_bit(seed: int, start: int) -> None:
    values = np.random.default_rng(seed).integers(-2, 3, 64 + start).astype(np.float32)[start:]
    assert _bits_above(values, np.float32(0)) == sum(1 << i for i, value in enumerate(values.tolist()) if value > 0)


@pytest.mark.parametrize("value", [np.nan, -np.inf, 1.0])
def test_what_is_not_above_is_0(value: float) -> None:
    assert _bits_above(np.full(64, value, np.float32), np.float32(1)) == 0


@settings(deadline=None)  # the first example compiles
@given(WORDS)
def test_bits_are_counted(word: int) -> None:
    digits = f"{word:064b}"
    expected = (digits.count("1"), 63 - digits.rindex("1"), digits.index("1"))
    assert _counts(np.uint64(word)) == expected
