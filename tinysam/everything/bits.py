"""Comparisons as the bits of words, for kernels that Numba compiles: LLVM makes them the CPU's vector instructions.

Numba keeps a compiled kernel until the kernel's own file changes: after a change here, touch ``mask_pass.py``.
"""
# mypy: disallow_untyped_defs = false

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_WORD, _FLOAT, _FLAG = ir.IntType(64), ir.FloatType(), ir.IntType(1)


@intrinsic
def bits_above(_, address, threshold):
    """Which of 64 float32 numbers, the first at ``address``, are above a threshold: the first is the lowest bit."""

    def generate(_, builder, __, arguments):
        address, threshold = arguments
        values = builder.load(builder.inttoptr(address, ir.VectorType(_FLOAT, 64).as_pointer()))
        values.align = 4
        lowest = builder.insert_element(
            ir.Constant(ir.VectorType(_FLOAT, 64), ir.Undefined), threshold, ir.Constant(ir.IntType(32), 0)
        )
        everywhere = ir.Constant(ir.VectorType(ir.IntType(32), 64), [0] * 64)
        thresholds = builder.shuffle_vector(lowest, lowest, everywhere)
        return builder.bitcast(builder.fcmp_ordered(">", values, thresholds), _WORD)

    return types.uint64(types.intp, types.float32), generate


@intrinsic
def count_bits(_, word):
    """How many bits of a word are 1."""

    def generate(_, builder, __, arguments):
        return builder.ctpop(arguments[0])

    return types.intp(types.uint64), generate


@intrinsic
def trailing_zeros(_, word):
    """How many zeros are below the lowest 1 of a word."""

    def generate(_, builder, __, arguments):
        return builder.cttz(arguments[0], ir.Constant(_FLAG, 0))

    return types.intp(types.uint64), generate


@intrinsic
def leading_zeros(_, word):
    """How many zeros are above the highest 1 of a word."""

    def generate(_, builder, __, arguments):
        return builder.ctlz(arguments[0], ir.Constant(_FLAG, 0))

    return types.intp(types.uint64), generate
