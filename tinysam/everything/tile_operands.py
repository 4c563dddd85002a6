"""What ``tile_products`` multiplies, made of tensors: matrices in float32, or ``amx``'s pairs of bfloat16.

Tensors of pairs are int32, as torch can do nothing with uint32.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from tinysam.everything import amx
from tinysam.everything.tile_products import padded


class Operands(Protocol):
    """Makes operands of float32 tensors; leading dimensions stay as they are."""

    dtype: torch.dtype
    """Of operands."""

    def left(self, matrix: Tensor) -> Tensor:
        """Of (..., M, K)."""

    def left_of_halves(self, matrix: Tensor) -> Tensor:
        """Of (..., M, 2 K), to be multiplied by two right operands on top of each other."""

    def left_by_head(self, matrix: Tensor) -> Tensor:
        """Of (..., H, M, d)."""

    def right(self, matrix: Tensor) -> Tensor:
        """Of (..., K, N)."""

    def values(self, matrix: Tensor) -> Tensor:
        """Of (..., H, W, d), as ``add_by_head`` takes them."""

    def right_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """The shape of the right operand of a matrix."""


class Float32Operands:
    """The matrices themselves."""

    dtype = torch.float32

    def left(self, matrix: Tensor) -> Tensor:
        return matrix

    left_of_halves = left_by_head = right = values = left

    def right_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return rows, columns


class Bfloat16Operands:
    """Pairs, padded with zeros."""

    dtype = torch.int32

    def left(self, matrix: Tensor) -> Tensor:
        whole = _room_for_left(matrix, *matrix.shape[-2:])
        whole[..., : matrix.shape[-2], : matrix.shape[-1]] = matrix
        return whole.view(torch.int32)

    def left_of_halves(self, matrix: Tensor) -> Tensor:
        return torch.cat([self.left(half) for half in matrix.chunk(2, -1)], -1)

    def left_by_head(self, matrix: Tensor) -> Tensor:
        heads, rows, channels = matrix.shape[-3:]
        whole = _room_for_left(matrix[..., 0, :, :], heads * rows, heads * channels)
        by_head = whole[..., : heads * rows, : heads * channels].unflatten(-2, (heads, rows)).unflatten(-1, (heads, -1))
        by_head.diagonal(dim1=-4, dim2=-2).copy_(matrix.movedim(-3, -1))
        return whole.view(torch.int32)

    def right(self, matrix: Tensor) -> Tensor:
        summed, columns = matrix.shape[-2:]
        whole = F.pad(matrix, (0, -columns % amx.COLUMNS, 0, -summed % amx.SUMMED)).to(torch.bfloat16)
        return whole.unflatten(-2, (-1, 2)).mT.contiguous().view(torch.int32)[..., 0]

    def values(self, matrix: Tensor) -> Tensor:
        return self.right(matrix.movedim(-3, -2).flatten(-2))

    def right_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return padded(rows, amx.SUMMED) // 2, padded(columns, amx.COLUMNS)


def _room_for_left(batch: Tensor, rows: int, summed: int) -> Tensor:
    """Zeros for left sides of a batch of matrices, in bfloat16."""
    shape = (*batch.shape[:-2], padded(rows, amx.ROWS), padded(summed, amx.SUMMED))
    return batch.new_zeros(shape, dtype=torch.bfloat16)
