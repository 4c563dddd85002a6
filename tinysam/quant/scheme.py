"""What a simulated quantization is like: bits, grids, how many scales, and how they are found."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Literal

import torch

from tinysam.quant.grids import GridFamily, GridKind
from tinysam.quant.observe import MinMaxObserver, Observer, PercentileObserver
from tinysam.quant.products import Product

Method = Literal["hessian", "mse", "percentile", "minmax"]
METHODS: tuple[Method, ...] = ("hessian", "mse", "percentile", "minmax")


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How the products of a Sam are rounded. The defaults are the paper's W8A8."""

    method: Method = "hessian"
    """How scales are found. hessian: searched, by the squared difference of each product's result weighted with the
    curvature of the task loss; mse: the same search without the weights; percentile: activations are clipped at a
    percentile of their values; minmax: everything seen is covered."""
    weight_bits: int = 8
    activation_bits: int = 8
    affine: bool = False
    """Activations get a zero point, so that one-sided ones use all integers. Our choice; the paper's are symmetric."""
    two_ranges: bool = True
    """Searched scales only: two ranges for what follows a softmax or a GELU."""
    per_head: bool = True
    """A scale for each head of a product of activations. Integer kernels take one for all heads."""
    per_channel_linear: bool = False
    """A scale for each output channel of a linear layer, which integer kernels take at no cost. The paper: one."""
    percentile: float = 99.99
    """Of the method percentile."""
    only: str = "*"
    """Shell pattern of the products that are quantized, such as ``image_encoder.*``."""
    floats: tuple[str, ...] = ()
    """Shell patterns of products that stay in float, the mixed precision of the simulation."""

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits"):
            if not 2 <= getattr(self, name) <= 16:
                raise ValueError(f"{name} must be between 2 and 16, got {getattr(self, name)}")
        if not 0 < self.percentile <= 100:
            raise ValueError(f"percentile must be above 0 and at most 100, got {self.percentile}")

    @property
    def searches(self) -> bool:
        """Whether scales come from a search."""
        return self.method in ("hessian", "mse")

    def make_observer(self) -> Observer:
        """A fresh observer of what one scale of an activation has to cover."""
        if self.method == "percentile" and self.percentile < 100:
            return PercentileObserver(self.percentile)
        return MinMaxObserver()

    def quantizes(self, name: str) -> bool:
        """Whether the product of this name is quantized."""
        return fnmatch.fnmatchcase(name, self.only) and not any(
            fnmatch.fnmatchcase(name, pattern) for pattern in self.floats
        )

    def activation_family(self, product: Product, side: int, low: torch.Tensor, high: torch.Tensor) -> GridFamily:
        """The grids of an activation, of which ``low`` and ``high``, (cells,), are the extremes."""
        kind: GridKind = "affine" if self.affine else "symmetric"
        origin = product.origins[side]
        # A GELU that never was negative has one range.
        if self.searches and self.two_ranges and origin and (origin == "softmax" or bool((low < 0).all())):
            kind = origin
        return GridFamily(kind=kind, bits=self.activation_bits, low=low, high=high)

    def weight_family(self, low: torch.Tensor, high: torch.Tensor) -> GridFamily:
        """The grids of a weight, of which ``low`` and ``high``, (cells,), are the extremes."""
        return GridFamily(kind="symmetric", bits=self.weight_bits, low=low, high=high)


def cell_shape(product: Product, side: int, value: torch.Tensor, scheme: Scheme) -> tuple[int, ...]:
    """The shape in which one side's scales broadcast to its values."""
    if product.kind == "matmul":
        return (value.shape[1], 1, 1) if scheme.per_head and value.ndim == 4 else (1,)
    if side == 0 or (product.kind == "linear" and not scheme.per_channel_linear):
        return (1,)
    channel = 1 if product.kind == "deconv" else 0
    return tuple(size if axis == channel else 1 for axis, size in enumerate(value.shape))
