from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from tinysam.everything import tile_kernels


@given(st.floats(-87, 88, width=32))
def test_exp_is_right_to_the_last_bits(x: float) -> None:
    assert float(tile_kernels.exp(np.float32(x))) == pytest.approx(np.exp(np.float64(x)), rel=3e-7)


@pytest.mark.parametrize("x", [-np.inf, -1e30, -88.0])
def test_exp_of_the_lowest_is_next_to_nothing(x: float) -> None:
    assert 0 <= tile_kernels.exp(np.float32(x)) < 2e-38


@pytest.mark.parametrize("function", [tile_kernels.exp, tile_kernels.gelu, tile_kernels.rough_gelu])
def test_nan_comes_through(function: object) -> None:
    assert np.isnan(function(np.float32(np.nan)))  # type: ignore[operator]


@given(st.floats(-40, 40, width=32))
def test_gelu_is_torchs(x: float) -> None:
    exact = float(F.gelu(torch.tensor(x, dtype=torch.float64)))
    assert float(tile_kernels.gelu(np.float32(x))) == pytest.approx(exact, rel=0, abs=4e-7 * max(1, abs(x)))


@given(st.floats(-40, 40, width=32))
def test_rough_gelu_is_as_exact_as_bfloat16_needs(x: float) -> None:
    exact = float(F.gelu(torch.tensor(x, dtype=torch.float64)))
    assert float(tile_kernels.rough_gelu(np.float32(x))) == pytest.approx(exact, rel=0, abs=4e-4 * max(1, abs(x)))


def test_softmax_over_the_tokens_of_each_head() -> None:
    logits = (np.random.default_rng(0).standard_normal((4 * 7, 32)) * 20).astype(np.float32)
    expected = torch.from_numpy(logits).double().unflatten(0, (4, 7)).softmax(1).flatten(0, 1).numpy()
    tile_kernels.softmax_over_tokens(logits, 4)
    np.testing.assert_allclose(logits, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("n_tokens", [1, 31, 32, 33, 96])
def test_a_softmax_tile_by_tile_is_the_softmax_of_all(n_tokens: int) -> None:
    rank, width, n_tiles = 6, 32, -(-n_tokens // 32)
    generator = np.random.default_rng(n_tokens)
    logits = np.full((rank, n_tiles * width), 1e3, np.float32)  # padding would win if it counted
    logits[:, :n_tokens] = generator.standard_normal((rank, n_tokens)) * 20
    values = generator.standard_normal((n_tiles * width, 3)).astype(np.float32)
    expected = torch.from_numpy(logits[:, :n_tokens]).double().softmax(1).numpy() @ values[:n_tokens]

    peak, total = np.full(rank, -np.inf, np.float32), np.zeros(rank, np.float32)
    decay, average = np.empty(rank, np.float32), np.zeros((rank, 3), np.float32)
    for i in range(n_tiles):
        tile = np.ascontiguousarray(logits[:, i * width : (i + 1) * width])
        tile_kernels.weigh(tile, min(width, n_tokens - i * width), peak, total, decay)
        average = average * decay[:, None] + tile @ values[i * width : (i + 1) * width]
    np.testing.assert_allclose(average / total[:, None], expected, rtol=1e-5, atol=1e-6)
