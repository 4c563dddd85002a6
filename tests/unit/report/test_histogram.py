"""Histograms that are merged and then drawn with fewer bars."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinysam.report.histogram import Histogram, round_ticks

values = st.lists(st.floats(-0.5, 1.5, allow_nan=False), max_size=60).map(np.array)


def unit() -> Histogram:
    return Histogram.linear(0, 1, 200)


@settings(deadline=None, max_examples=50)
@given(values, values)
def test_merging_is_the_same_as_adding_all_values_to_one(first: np.ndarray, second: np.ndarray) -> None:
    merged = unit().add(first).merge(unit().add(second))
    together = unit().add(np.concatenate([first, second]))
    assert (merged.counts == together.counts).all()
    assert merged.total == pytest.approx(together.total)
    assert merged.size == len(first) + len(second)


@settings(deadline=None, max_examples=50)
@given(values, st.integers(1, 50))
def test_joined_bins_lose_no_value_and_stay_within_the_bars(numbers: np.ndarray, bars: int) -> None:
    full = unit().add(numbers)
    shown = full.trimmed(bars=bars)
    assert shown.counts.sum() == len(numbers)
    if len(numbers):
        assert len(shown.counts) <= bars
        assert len(shown.edges) == len(shown.counts) + 1
        assert (np.diff(shown.edges) > 0).all()
        inside = np.clip(numbers, 0, 1)
        assert shown.edges[0] <= inside.min()
        assert shown.edges[-1] >= inside.max()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.floats(0, 1))
def test_quantiles_are_right_to_a_bin(numbers: list[float], share: float) -> None:
    found = unit().add(np.array(numbers)).quantile(share)
    expected = np.quantile(numbers, share, method="inverted_cdf")
    assert found == pytest.approx(expected, abs=1 / 200 + 1e-9)


def test_what_is_not_finite_is_left_out() -> None:
    histogram = unit().add(np.array([np.nan, np.inf, -np.inf, 0.5]))
    assert histogram.size == 1
    assert histogram.mean == 0.5


def test_an_empty_histogram_has_neither_mean_nor_quantile() -> None:
    assert unit().mean is None
    assert unit().quantile(0.5) is None
    assert unit().trimmed(bars=10).size == 0


def test_whole_numbers_keep_a_bin_each_while_there_is_room() -> None:
    counts = Histogram(edges=np.arange(101) - 0.5, counts=np.zeros(100, np.int64)).add(np.array([3, 3, 7]))
    shown = counts.trimmed(bars=10)
    assert shown.counts.tolist() == [2, 0, 0, 0, 1]
    assert shown.edges.tolist() == [2.5, 3.5, 4.5, 5.5, 6.5, 7.5]


@settings(deadline=None, max_examples=100)
@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(1, 8))
def test_ticks_are_few_even_and_within_the_axis(low: float, span: float, count: int) -> None:
    ticks = round_ticks(low, low + span, count)
    assert len(ticks) <= count + 1
    slack = 1e-6 * span + 1e-9 * abs(low)
    assert all(low - slack <= tick <= low + span + slack for tick in ticks)
    if len(ticks) > 2:
        assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])


def test_ticks_are_round() -> None:
    assert round_ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert round_ticks(0, 97, 4) == [0, 25, 50, 75]
    assert round_ticks(5, 5, 4) == [5]
