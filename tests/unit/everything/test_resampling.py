from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from tinysam.everything.resampling import Taps, bilinear, composed

sizes = st.integers(1, 90)


def to_matrix(taps: Taps, n_in: int) -> np.ndarray:
    matrix = np.zeros((len(taps.start), n_in))
    for k, weights in enumerate(taps.weights):
        np.add.at(matrix, (np.arange(len(weights)), taps.start + k), weights)
    return matrix


def torch_matrix(n_in: int, n_out: int) -> np.ndarray:
    rows = F.interpolate(torch.eye(n_in)[None], size=n_out, mode="linear", align_corners=False)
    return rows[0].T.double().numpy()


@given(sizes, sizes)
def test_neighbours_are_torchs(n_in: int, n_out: int) -> None:
    lower, upper, weight = bilinear(n_in, n_out)
    matrix = np.zeros((n_out, n_in))
    np.add.at(matrix, (np.arange(n_out), lower), 1 - weight)
    np.add.at(matrix, (np.arange(n_out), upper), weight)
    np.testing.assert_allclose(matrix, torch_matrix(n_in, n_out), atol=1e-5)


@given(sizes, sizes, sizes, sizes)
def test_two_resizes_are_one(n_low: int, n_model: int, n_input: int, n_out: int) -> None:
    n_input = min(n_input, n_model)
    taps = composed(n_low, n_model, n_input, n_out)
    two = torch_matrix(n_input, n_out) @ torch_matrix(n_low, n_model)[:n_input]
    np.testing.assert_allclose(to_matrix(taps, n_low), two, atol=1e-5)
    np.testing.assert_allclose(taps.weights.sum(0), 1, atol=1e-6)
    assert (taps.weights >= 0).all()
    assert (np.diff(taps.start) >= 0).all()
    for i in range(n_low):
        takes = np.flatnonzero(to_matrix(taps, n_low)[:, i])
        if len(takes):
            assert taps.first[i] <= takes[0]
            assert taps.last[i] >= takes[-1]


@pytest.mark.parametrize("n_out", [1, 500, 1024, 1500, 6000])
def test_sams_sizes_need_at_most_three_taps(n_out: int) -> None:
    assert len(composed(256, 1024, 1024, n_out).weights) <= 3
    assert len(composed(256, 1024, 683, n_out).weights) <= 3
