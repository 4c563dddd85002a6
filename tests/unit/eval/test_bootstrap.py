from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinysam.eval.bootstrap import ratio_metric


def test_the_value_weighs_images_by_their_objects():
    metric = ratio_metric(np.array([1.0, 3.0, 0.0]), np.array([1.0, 9.0, 0.0]))
    assert metric.value == pytest.approx(0.4)
    assert (metric.n, metric.images) == (10, 3)


def test_the_interval_has_the_width_of_the_standard_error():
    values = np.random.default_rng(1).normal(0.6, 0.2, 400)
    metric = ratio_metric(values, np.ones(400), samples=2000)
    standard_error = values.std(ddof=1) / 20
    assert metric.high - metric.low == pytest.approx(2 * 1.96 * standard_error, rel=0.1)


def test_one_image_has_an_interval_of_no_width():
    metric = ratio_metric(np.array([3.0]), np.array([4.0]))
    assert (metric.value, metric.low, metric.high) == (0.75, 0.75, 0.75)


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(2).random(30)
    assert ratio_metric(values, np.ones(30), seed=5) == ratio_metric(values, np.ones(30), seed=5)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 50)), min_size=1, max_size=20))
def test_intervals_stay_within_the_values(pairs):
    means, counts = np.array(pairs).T
    metric = ratio_metric(means * counts, counts, samples=50)
    if counts.sum() == 0:
        assert np.isnan(metric.value)
    else:
        assert means[counts > 0].min() - 1e-9 <= metric.low <= metric.high <= means[counts > 0].max() + 1e-9
