"""Running a float Sam as if it were quantized, in torch: what the integer graphs compute, up to rounding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from segment_anything.modeling import Sam

from tinysam.quant.products import Compute, Product, ProductMode
from tinysam.quant.search import ProductGrids


@contextmanager
def simulated(sam: Sam, grids: Mapping[str, ProductGrids]) -> Iterator[Sam]:
    """While entered, ``sam`` rounds both sides of each product named in ``grids``; all others stay in float.

    Weights are rounded once. Everything that calls the image encoder and the mask decoder sees the quantized model;
    the low-rank decoders of everything mode compute other products and are not covered.

    Args:
        sam: in eval mode, with BatchNorm folded as when ``grids`` were found.
        grids: see :func:`tinysam.quant.search.find_grids`.
    """
    ready = {name: (found.grid(0), found.grid(1)) for name, found in grids.items()}
    weights: dict[str, torch.Tensor] = {}

    def compute_rounded(product: Product, left: torch.Tensor, right: torch.Tensor, compute: Compute) -> torch.Tensor:
        if product.name not in ready:
            return compute(left, right)
        left_grid, right_grid = ready[product.name]
        if product.kind == "matmul":
            return compute(left_grid.round(left), right_grid.round(right))
        if product.name not in weights:
            weights[product.name] = right_grid.round(right)
        return compute(left_grid.round(left), weights[product.name])

    with torch.no_grad(), ProductMode(sam, compute_rounded):
        yield sam
