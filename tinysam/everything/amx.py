"""Products of bfloat16 matrices on the tile registers of Intel's CPUs (AMX), for kernels that Numba compiles.

Both matrices hold *pairs*: two bfloat16 numbers that follow each other along the dimension summed over, in one uint32,
the first in its low half. So a left matrix (M, K) is a contiguous (M, K / 2) and a right one (K, N) a contiguous
(K / 2, N). The product is float32. A block's left side has 16 or 32 rows, its right side 32 columns, and a multiple of
32 is summed over.
"""
# mypy: disallow_untyped_defs = false

from __future__ import annotations

import ctypes
import platform
from functools import cache
from itertools import product

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

ROWS, COLUMNS, SUMMED = 16, 32, 32
"""Units in which a block's sides grow."""

_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # of Linux on x86-64
_BYTE, _INDEX = ir.IntType(8), ir.IntType(64)
_POINTER = _BYTE.as_pointer()


@cache
def is_available() -> bool:
    """Whether this process may multiply bfloat16 matrices on tile registers; asks Linux for the permission."""
    features = llvm.get_host_cpu_features()
    if platform.system() != "Linux" or not (features.get("amx-tile") and features.get("amx-bf16")):
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0


def _call(builder, name, *arguments):
    """Emits a call of one of LLVM's instructions for tiles."""
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), arguments)


def _register(number):
    return ir.Constant(_BYTE, number)


@intrinsic
def open_tiles(_):
    """Gives all eight tile registers of this thread 16 rows of 64 bytes. To be followed by ``close_tiles``."""

    def generate(context, builder, _, __):
        palette, sizes = [1, *[0] * 15], [*[64, 0] * 8, *[0] * 16, *[ROWS] * 8, *[0] * 8]
        constant = cgutils.global_constant(builder, "tile_sizes", ir.Constant(ir.ArrayType(_BYTE, 64), palette + sizes))
        _call(builder, "ldtilecfg", builder.bitcast(constant, _POINTER))
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def close_tiles(_):
    """Puts the tile registers back into their initial state, in which switching threads need not save them."""

    def generate(context, builder, _, __):
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


def _block(n_rows):
    """Makes the function that computes a block of ``16 n_rows`` rows and 32 columns."""

    @intrinsic
    def block(_, left, left_stride, right, right_stride, out, out_stride, steps):
        """Writes a block of a product.

        Args:
            left, right, out: addresses of the first element.
            left_stride, right_stride, out_stride: bytes from one row to the next.
            steps: how often 32 numbers are summed over.
        """

        def generate(context, builder, _, arguments):
            left, left_stride, right, right_stride, out, out_stride, steps = arguments

            def place(base, stride, row, columns):
                """The address of a row, and of some 16 float32 or pairs to the right."""
                moved = builder.add(base, builder.mul(stride, ir.Constant(_INDEX, ROWS * row)))
                return builder.inttoptr(builder.add(moved, ir.Constant(_INDEX, 64 * columns)), _POINTER)

            sums = [[_register(2 * row + column) for column in range(2)] for row in range(n_rows)]
            lefts, rights = [_register(4 + row) for row in range(n_rows)], [_register(6), _register(7)]
            for registers in sums:
                for register in registers:
                    _call(builder, "tilezero", register)
            with cgutils.for_range(builder, steps) as loop:
                left_now = builder.add(left, builder.mul(loop.index, ir.Constant(_INDEX, 64)))
                down = builder.mul(right_stride, ir.Constant(_INDEX, ROWS))
                right_now = builder.add(right, builder.mul(loop.index, down))
                for row, register in enumerate(lefts):
                    _call(builder, "tileloadd64", register, place(left_now, left_stride, row, 0), left_stride)
                for column, register in enumerate(rights):
                    _call(builder, "tileloadd64", register, place(right_now, right_stride, 0, column), right_stride)
                for row, column in product(range(n_rows), range(2)):
                    _call(builder, "tdpbf16ps", sums[row][column], lefts[row], rights[column])
            for row, column in product(range(n_rows), range(2)):
                _call(builder, "tilestored64", sums[row][column], place(out, out_stride, row, column), out_stride)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 7), generate

    return block


block_of_16, block_of_32 = _block(1), _block(2)
