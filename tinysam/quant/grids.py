"""Grids of integers that values are rounded to, and their one-parameter families that a search chooses from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch

GridKind = Literal["symmetric", "affine", "softmax", "gelu"]


class Grid(Protocol):
    """What rounds float tensors to values that integers stand for."""

    def round(self, values: torch.Tensor) -> torch.Tensor:
        """The nearest values of the grid; float32 of the same shape."""
        ...

    def select(self, index: torch.Tensor) -> Grid:
        """The grid whose cells are those of ``index``, in its shape, so that they broadcast to the values."""
        ...


@dataclass(frozen=True, kw_only=True)
class UniformGrid:
    """``scale * (q - zero_point)`` for all integers ``q`` from ``lowest`` to ``highest``."""

    scale: torch.Tensor
    """(cells,) float32, or a shape that broadcasts to the values. 0 where all values are: they stay as they are."""
    zero_point: torch.Tensor
    """Integers in float32, of the shape of ``scale``."""
    lowest: int
    highest: int

    def round(self, values: torch.Tensor) -> torch.Tensor:
        """See ``Grid``; half-way cases go to the even integer, as in ONNX."""
        scale = torch.where(self.scale == 0, 1.0, self.scale)
        integers = (values / scale).round_().add_(self.zero_point).clamp_(self.lowest, self.highest)
        return integers.sub_(self.zero_point).mul_(scale)

    def select(self, index: torch.Tensor) -> UniformGrid:
        """See ``Grid``."""
        return replace(self, scale=self.scale[index], zero_point=self.zero_point[index])


@dataclass(frozen=True, kw_only=True)
class TwoRangeGrid:
    """Two ranges of half the integers each: one bit says which (PTQ4ViT's twin uniform quantization).

    A value is rounded in exactly one of them; TinySAM's public code adds both.
    """

    below: UniformGrid
    """For values less than ``split``."""
    above: UniformGrid
    """For the others."""
    split: torch.Tensor
    """Of the shape of the scales."""

    def round(self, values: torch.Tensor) -> torch.Tensor:
        """See ``Grid``."""
        return torch.where(values < self.split, self.below.round(values), self.above.round(values))

    def select(self, index: torch.Tensor) -> TwoRangeGrid:
        """See ``Grid``."""
        return TwoRangeGrid(below=self.below.select(index), above=self.above.select(index), split=self.split[index])


@dataclass(frozen=True, kw_only=True)
class GridFamily:
    """The grids that differ by one factor on their scale; at factor 1 all values seen are covered."""

    kind: GridKind
    """``symmetric`` and ``affine`` are uniform. ``softmax`` has fine steps, of which the factor is the share of the
    coarse ones, near 0; ``gelu`` has a range for negative values, and the factor is that of the positive ones."""
    bits: int
    low: torch.Tensor
    """(cells,) float32, the smallest value of each cell or 0."""
    high: torch.Tensor
    """(cells,) float32, the largest value of each cell or 0."""

    @property
    def cells(self) -> int:
        """How many scales there are."""
        return len(self.low)

    def grid(self, factor: torch.Tensor | float) -> Grid:
        """The grid of a factor, or of one factor a cell."""
        half = 2 ** (self.bits - 1)
        zero = torch.zeros_like(self.low)
        bound = torch.maximum(-self.low, self.high)
        if self.kind == "symmetric":
            return UniformGrid(scale=factor * bound / (half - 1), zero_point=zero, lowest=-half, highest=half - 1)
        if self.kind == "affine":
            scale = (self.high - self.low) / (2 * half - 1)
            zero_point = torch.round(-self.low / torch.where(scale == 0, 1.0, scale))
            return UniformGrid(scale=factor * scale, zero_point=zero_point, lowest=0, highest=2 * half - 1)
        coarse = UniformGrid(scale=self.high / (half - 1), zero_point=zero, lowest=0, highest=half - 1)
        if self.kind == "softmax":
            fine = replace(coarse, scale=factor * coarse.scale)
            return TwoRangeGrid(below=fine, above=coarse, split=fine.scale * (half - 0.5))
        negative = UniformGrid(scale=-self.low / half, zero_point=zero, lowest=-half, highest=0)
        return TwoRangeGrid(below=negative, above=replace(coarse, scale=factor * coarse.scale), split=zero)
