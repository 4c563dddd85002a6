from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg.cython_blas  # noqa: F401
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from torch import Tensor

from tinysam.everything import amx
from tinysam.everything import tile_products as tp
from tinysam.everything.tile_operands import Bfloat16Operands, Float32Operands, Operands

WIDTH = 64
HEADS = [(8, 7, 16), (8, 4, 8), (4, 11, 32), (1, 3, 32), (16, 9, 2)]
needs_tiles = pytest.mark.skipif(not amx.is_available(), reason="this CPU cannot multiply tiles of bfloat16")
KINDS = [pytest.param(Float32Operands(), id="float32"), pytest.param(Bfloat16Operands(), id="bf16", marks=needs_tiles)]


@njit
def _product(left, right, rows, columns):  # type: ignore[no-untyped-def]
    out = tp.result(left, rows, columns)
    tp.open_operands(left)
    tp.product(left, right, out)
    tp.close_operands(left)
    return out[:rows, :columns]


@njit
def _product_by_head(left, right, heads, n_tokens, columns):  # type: ignore[no-untyped-def]
    out = tp.result(left, heads * n_tokens, columns)
    tp.open_operands(left)
    tp.product_by_head(left, right, (heads, n_tokens), out)
    tp.close_operands(left)
    return out[: heads * n_tokens, :columns]


@njit
def _add_by_head(weights, values, decay, average):  # type: ignore[no-untyped-def]
    heads, n_tokens, channels = average.shape
    rank = heads * n_tokens
    added = tp.result(values, rank, heads * channels)
    operand = tp.left_buffer(values, rank, weights.shape[1])
    tp.open_operands(values)
    tp.add_by_head(tp.as_left(weights, operand), values, (heads, n_tokens), decay, added, average)
    tp.close_operands(values)


@njit
def _packed(like, matrix, other):  # type: ignore[no-untyped-def]
    """``matrix`` (M, K) by ``other`` (N, K) transposed."""
    (rows, summed), (columns, _) = matrix.shape, other.shape
    left = tp.as_left(matrix, tp.left_buffer(like, rows, summed))
    right = tp.transposed(
        tp.as_left(other, tp.left_buffer(like, columns, summed)), tp.right_buffer(like, summed, columns)
    )
    return _product(left, right, rows, columns)


@njit
def _there_and_back(like, matrix):  # type: ignore[no-untyped-def]
    rows, columns = matrix.shape
    right = tp.as_right(matrix, tp.right_buffer(like, rows, columns))
    return tp.as_matrix(right, np.empty((rows, columns), np.float32))


def rounded(operands: Operands, matrix: Tensor) -> np.ndarray:
    """What the operands know of a matrix, in float64."""
    return (matrix.to(torch.bfloat16) if operands.dtype == torch.int32 else matrix).double().numpy()


def array(operand: Tensor) -> np.ndarray:
    values = operand.contiguous().numpy()
    return values.view(np.uint32) if values.dtype == np.int32 else values


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("operands", KINDS)
@settings(deadline=None)  # the first example compiles
@given(rows=st.integers(1, 70), summed=st.integers(1, 70), columns=st.integers(1, 70))
def test_products_sum_in_float32(operands: Operands, rows: int, summed: int, columns: int) -> None:
    left, right = random(rows, summed, seed=rows), random(summed, columns, seed=columns)
    found = _product(array(operands.left(left)), array(operands.right(right)), rows, columns)
    np.testing.assert_allclose(found, rounded(operands, left) @ rounded(operands, right), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operands", KINDS)
@pytest.mark.parametrize(("heads", "n_tokens", "channels"), HEADS)
def test_heads_count_for_their_own_channels(operands: Operands, heads: int, n_tokens: int, channels: int) -> None:
    left, right = random(heads, n_tokens, channels), random(heads, channels, WIDTH, seed=1)
    expected = rounded(operands, left) @ rounded(operands, right)
    found = _product_by_head(
        array(operands.left_by_head(left)), array(operands.right(right.flatten(0, 1))), heads, n_tokens, WIDTH
    )
    np.testing.assert_allclose(found, expected.reshape(heads * n_tokens, WIDTH), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operands", KINDS)
@pytest.mark.parametrize(("heads", "n_tokens", "channels"), HEADS)
def test_averages_decay_by_row(operands: Operands, heads: int, n_tokens: int, channels: int) -> None:
    weights, values = random(heads, n_tokens, WIDTH), random(heads, WIDTH, channels, seed=1)
    decay, average = random(heads, n_tokens, seed=2), random(heads, n_tokens, channels, seed=3)
    expected = average * decay[..., None] + rounded(operands, weights) @ rounded(operands, values)
    found = average.numpy().copy()
    _add_by_head(weights.flatten(0, 1).numpy(), array(operands.values(values)), decay.flatten().numpy(), found)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operands", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(56, 56), (56, 32), (1, 3), (112, 33)])
def test_kernels_make_operands_as_the_decoder_does(operands: Operands, rows: int, columns: int) -> None:
    matrix, other = random(rows, WIDTH), random(columns, WIDTH, seed=1)
    found = _packed(array(operands.left(matrix)), matrix.numpy(), other.numpy())
    expected = rounded(operands, matrix) @ rounded(operands, other).T
    np.testing.assert_allclose(found, expected, rtol=1e-2 if operands.dtype == torch.int32 else 1e-5, atol=1e-4)


@pytest.mark.parametrize("operands", KINDS)
def test_a_right_operand_is_its_matrix_rounded(operands: Operands) -> None:
    matrix = random(14, WIDTH)
    found = _there_and_back(array(operands.left(matrix)), matrix.numpy().copy())
    np.testing.assert_array_equal(found, rounded(operands, matrix))


@needs_tiles
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 0.0, 1.0])
def test_what_is_no_number_stays_so(value: float) -> None:
    matrix = np.full((2, 32), value, np.float32)
    np.testing.assert_array_equal(_there_and_back(np.zeros((1, 1), np.uint32), matrix), matrix)


@needs_tiles
@settings(deadline=None)  # the first example compiles
@given(st.floats(-(2.0**100), 2.0**100, width=32))
def test_pairs_round_to_the_nearest(x: float) -> None:
    matrix = np.full((2, 32), x, np.float32)
    found = _there_and_back(np.zeros((1, 1), np.uint32), matrix.copy())
    nearest = abs(float(torch.tensor(x).to(torch.bfloat16)) - x)
    assert abs(float(found[0, 0]) - x) == nearest
    assert (found == found[0, 0]).all()


def test_products_are_for_kernels_alone() -> None:
    with pytest.raises(TypeError, match="Numba compiles"):
        tp.product(np.zeros((1, 1)), np.zeros((1, 1)), np.zeros((1, 1)))
