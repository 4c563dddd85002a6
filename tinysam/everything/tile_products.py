"""Matrix products of tiles, of operands in float32 or in bfloat16.

A kernel is written once, and Numba compiles it for the operands that it is given. In float32 an operand is the matrix
itself, and BLAS multiplies. In bfloat16 it holds ``amx``'s pairs, padded with zeros to a block's units, and tile
registers multiply. What is no operand is float32 either way. A result has room for the rows that pad the left side,
which mean nothing.

H heads of d channels, T tokens of a prompt, W image tokens of a tile. Of a left side that is given *by head*, row
``h T + t`` counts for the channels of head h alone: it is (H, T, d) in float32, and (H T, H d) with zeros elsewhere in
bfloat16.

Numba keeps a compiled kernel until the kernel's own file changes: after a change here, touch ``tile_kernels.py``.
"""
# mypy: disallow_untyped_defs = false

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

from tinysam.everything import amx

# NaN must come through, or damaged weights would go unnoticed: only what may reorder sums is allowed.
FAST = {"contract", "nsz", "reassoc", "arcp"}
FAST_MATH = {"nogil": True, "error_model": "numpy", "fastmath": FAST}
"""Of all kernels. Python's division would ask before each whether the divisor is 0."""

_BITS, _HIGH = ir.IntType(32), 0xFFFF0000
_SIZE = 4  # bytes of a float32 and of a pair
NOT_COMPILED = "products of tiles are for kernels that Numba compiles"


def padded(count: int, unit: int) -> int:
    """The next multiple of ``unit``."""
    return count + -count % unit


_padded = njit(padded)


@intrinsic
def pair(_, first, second):
    """Two float32 numbers as bfloat16, the nearest, or of two as near the greater in magnitude."""

    def generate(_, builder, __, arguments):
        # Written out in LLVM, as Numba computes with integers of 64 bits, which vectors have half as many of.
        rounded = [builder.add(builder.bitcast(x, _BITS), ir.Constant(_BITS, 0x8000)) for x in arguments]
        low = builder.lshr(rounded[0], ir.Constant(_BITS, 16))
        return builder.or_(low, builder.and_(rounded[1], ir.Constant(_BITS, _HIGH)))

    return types.uint32(types.float32, types.float32), generate


@intrinsic
def _first(_, pair):
    """The first number of a pair."""

    def generate(_, builder, __, arguments):
        return builder.bitcast(builder.shl(arguments[0], ir.Constant(_BITS, 16)), ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _second(_, pair):
    """The second number of a pair."""

    def generate(_, builder, __, arguments):
        return builder.bitcast(builder.and_(arguments[0], ir.Constant(_BITS, _HIGH)), ir.FloatType())

    return types.float32(types.uint32), generate


def open_operands(operand):
    """To be called before products of operands like this one, and followed by ``close_operands``."""
    raise TypeError(NOT_COMPILED)


@overload(open_operands, jit_options=FAST_MATH)
def _open_operands(operand):
    if operand.dtype == types.uint32:
        return lambda operand: amx.open_tiles()
    return lambda operand: None


def close_operands(operand):
    """To be called after products of operands like this one."""
    raise TypeError(NOT_COMPILED)


@overload(close_operands, jit_options=FAST_MATH)
def _close_operands(operand):
    if operand.dtype == types.uint32:
        return lambda operand: amx.close_tiles()
    return lambda operand: None


def product(left, right, out):
    """Writes ``left`` (M, K) by ``right`` (K, N) to ``out``."""
    raise TypeError(NOT_COMPILED)


@overload(product, jit_options=FAST_MATH)
def _product(left, right, out):
    def in_float32(left, right, out):
        np.dot(left, right, out[: len(left)])

    def in_bfloat16(left, right, out):
        for row in range(0, len(left), 32):
            _multiply(left, right, out, row, min(32, len(left) - row), 0, len(right), 0, right.shape[1])

    return in_bfloat16 if left.dtype == types.uint32 else in_float32


def product_by_head(left, right, by_head, out):
    """The same for a ``left`` by head and ``right`` (H d, N); ``by_head`` is (H, T)."""
    raise TypeError(NOT_COMPILED)


@overload(product_by_head, jit_options=FAST_MATH)
def _product_by_head(left, right, by_head, out):
    def in_float32(left, right, by_head, out):
        heads, n_tokens = by_head
        channels = left.shape[2]
        for h in range(heads):
            rows = slice(h * n_tokens, (h + 1) * n_tokens)
            np.dot(left[h], right[h * channels : (h + 1) * channels], out[rows])

    def in_bfloat16(left, right, by_head, out):
        for row in range(0, len(left), 16):
            start, end = _of_heads(row, by_head, len(right), 16)
            _multiply(left, right, out, row, 16, start, end, 0, right.shape[1])

    return in_bfloat16 if left.dtype == types.uint32 else in_float32


def add_by_head(weights, values, by_head, decay, added, average):
    """Adds each head's rows of ``weights`` by its ``values`` to ``average``.

    Args:
        weights: a left operand (H T, W).
        values: (H, W, d) in float32, a right operand (W, H d) in bfloat16.
        by_head: H and T.
        decay: (H T,) what ``average`` is multiplied by before.
        added: a result of shape (H T, H d), for what is in between.
        average: (H, T, d).
    """
    raise TypeError(NOT_COMPILED)


@overload(add_by_head, jit_options=FAST_MATH)
def _add_by_head(weights, values, by_head, decay, added, average):
    def in_float32(weights, values, by_head, decay, added, average):
        heads, n_tokens, channels = average.shape
        of_head = added.reshape(-1)[: n_tokens * channels].reshape(n_tokens, channels)
        for h in range(heads):
            np.dot(weights[h * n_tokens : (h + 1) * n_tokens], values[h], of_head)
            for t in range(n_tokens):
                for c in range(channels):
                    average[h, t, c] = average[h, t, c] * decay[h * n_tokens + t] + of_head[t, c]

    def in_bfloat16(weights, values, by_head, decay, added, average):
        heads, n_tokens, channels = average.shape
        for row in range(0, len(weights), 16):
            start, end = _of_heads(row, by_head, values.shape[1], 32)
            _multiply(weights, values, added, row, 16, 0, len(values), start, end)
        for h in range(heads):
            for t in range(n_tokens):
                r = h * n_tokens + t
                for c in range(channels):
                    average[h, t, c] = average[h, t, c] * decay[r] + added[r, h * channels + c]

    return in_bfloat16 if weights.dtype == types.uint32 else in_float32


@njit(**FAST_MATH)
def _of_heads(row, by_head, length, unit):
    """Where the channels of the heads of 16 rows begin and end, of ``length`` in all, in whole units."""
    heads, n_tokens = by_head
    first, last = row // n_tokens, min(heads - 1, (row + 15) // n_tokens)
    return first * length // heads // unit * unit, -(-(last + 1) * length // heads // unit) * unit


@njit(**FAST_MATH)
def _multiply(left, right, out, row, rows, start, end, first, last):
    """16 or 32 rows of a product, from columns ``first`` to ``last``; pairs ``start`` to ``end`` are summed over."""
    strides = left.shape[1] * _SIZE, right.shape[1] * _SIZE, out.shape[1] * _SIZE
    left_at = left.ctypes.data + row * strides[0] + start * _SIZE
    for column in range(first, last, 32):
        right_at = right.ctypes.data + start * strides[1] + column * _SIZE
        out_at = out.ctypes.data + row * strides[2] + column * _SIZE
        steps = (end - start) // 16
        if rows == 16:
            amx.block_of_16(left_at, strides[0], right_at, strides[1], out_at, strides[2], steps)
        else:
            amx.block_of_32(left_at, strides[0], right_at, strides[1], out_at, strides[2], steps)


def as_left(matrix, operand):
    """The left operand of a matrix (M, K), which is written to ``operand`` unless it is the matrix itself."""
    raise TypeError(NOT_COMPILED)


@overload(as_left, jit_options=FAST_MATH)
def _as_left(matrix, operand):
    def in_float32(matrix, operand):
        return matrix

    def in_bfloat16(matrix, operand):
        for row in range(len(matrix)):
            for k in range(matrix.shape[1] // 2):
                operand[row, k] = pair(matrix[row, 2 * k], matrix[row, 2 * k + 1])
        return operand

    return in_bfloat16 if operand.dtype == types.uint32 else in_float32


def as_right(matrix, operand):
    """Likewise the right operand of a matrix (K, N) with an even K."""
    raise TypeError(NOT_COMPILED)


@overload(as_right, jit_options=FAST_MATH)
def _as_right(matrix, operand):
    def in_float32(matrix, operand):
        return matrix

    def in_bfloat16(matrix, operand):
        for k in range(len(matrix) // 2):
            for column in range(matrix.shape[1]):
                operand[k, column] = pair(matrix[2 * k, column], matrix[2 * k + 1, column])
        return operand

    return in_bfloat16 if operand.dtype == types.uint32 else in_float32


def transposed(left, operand):
    """Likewise the right operand (K, M) of a left one (M, K)."""
    raise TypeError(NOT_COMPILED)


@overload(transposed, jit_options=FAST_MATH)
def _transposed(left, operand):
    def in_float32(left, operand):
        return left.T

    def in_bfloat16(left, operand):
        for k in range(len(operand)):
            for row in range(len(left)):
                operand[k, row] = left[row, k]
        return operand

    return in_bfloat16 if operand.dtype == types.uint32 else in_float32


def as_matrix(right, matrix):
    """The matrix (K, N) of a right operand, which is written to ``matrix`` unless it is the operand itself."""
    raise TypeError(NOT_COMPILED)


@overload(as_matrix, jit_options=FAST_MATH)
def _as_matrix(right, matrix):
    def in_float32(right, matrix):
        return right

    def in_bfloat16(right, matrix):
        for k in range(len(matrix) // 2):
            for column in range(matrix.shape[1]):
                matrix[2 * k, column] = _first(right[k, column])
                matrix[2 * k + 1, column] = _second(right[k, column])
        return matrix

    return in_bfloat16 if right.dtype == types.uint32 else in_float32


def room_for(right, matrix):
    """Where to write the matrix of a right operand: the operand itself, or ``matrix``."""
    raise TypeError(NOT_COMPILED)


@overload(room_for, jit_options=FAST_MATH)
def _room_for(right, matrix):
    if right.dtype == types.uint32:
        return lambda right, matrix: matrix
    return lambda right, matrix: right


def left_buffer(operand, rows, columns):
    """What ``as_left`` may write a matrix of that shape to, for operands like this one."""
    raise TypeError(NOT_COMPILED)


@overload(left_buffer, jit_options=FAST_MATH)
def _left_buffer(operand, rows, columns):
    if operand.dtype == types.uint32:
        return lambda operand, rows, columns: np.zeros((_padded(rows, 16), _padded(columns, 32) // 2), np.uint32)
    return lambda operand, rows, columns: np.zeros((0, 0), np.float32)


def right_buffer(operand, rows, columns):
    """What ``transposed`` may write a matrix of that shape to, for operands like this one."""
    raise TypeError(NOT_COMPILED)


@overload(right_buffer, jit_options=FAST_MATH)
def _right_buffer(operand, rows, columns):
    if operand.dtype == types.uint32:
        return lambda operand, rows, columns: np.zeros((_padded(rows, 32) // 2, _padded(columns, 32)), np.uint32)
    return lambda operand, rows, columns: np.zeros((0, 0), np.float32)


def result(operand, rows, columns):
    """Room for a product of that shape, of operands like this one."""
    raise TypeError(NOT_COMPILED)


@overload(result, jit_options=FAST_MATH)
def _result(operand, rows, columns):
    if operand.dtype == types.uint32:
        return lambda operand, rows, columns: np.zeros((_padded(rows, 16), _padded(columns, 32)), np.float32)
    return lambda operand, rows, columns: np.zeros((rows, columns), np.float32)
