"""A few of the sums that make up a product, in one form for all kinds: batches of small matrix products.

A scale search evaluates each product hundreds of times. It needs no more of it than some of its output positions:
patches of a convolution, rows of a linear layer, corners of a product of activations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from tinysam.quant.products import Product

MATRICES, ROWS, COLUMNS = 2, 32, 64
"""Of a product of activations, of each image: batch entries with all heads, rows and columns of each."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """``left @ right``: G matrices of n rows, K terms and M columns."""

    left: torch.Tensor
    """(G, n, K) float32."""
    right: torch.Tensor
    """(G, K, M) float32."""
    curvature: torch.Tensor
    """(G, n, M) float32, squared gradient of the task's log-likelihood with respect to the product."""
    left_cell: torch.Tensor
    """(G,) index of the scale of each matrix."""
    right_cell: torch.Tensor
    """(G, M) index of the scale of each column."""


Rows = tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]
"""Left side, right side, and what takes the same positions, (G, n, M), of the product or its gradient."""


def take(
    product: Product, left: torch.Tensor, right: torch.Tensor, result: torch.Size, rows: int, generator: torch.Generator
) -> Rows:
    """Draws output positions of a product.

    Args:
        product: which.
        left: its activation.
        right: its weight or other activation.
        result: shape of the result.
        rows: how many positions to draw, of a product with a weight.
        generator: of the draw.

    Raises:
        NotImplementedError: for a deconvolution whose patches overlap; SAM has none.
    """
    left, right = left.detach(), right.detach()
    if product.kind == "matmul":
        return _take_corner(left, right, generator)
    if product.kind == "linear":
        index = torch.randint(left.numel() // left.shape[-1], (rows,), generator=generator)
        return _rows(left, index)[None], right.T[None], lambda value: _rows(value, index)[None]
    assert isinstance(product.module, nn.Conv2d | nn.ConvTranspose2d)
    stride = product.module.stride
    is_deconv = product.kind == "deconv"
    if is_deconv and (stride != tuple(right.shape[2:]) or product.module.groups != 1 or any(product.module.padding)):
        raise NotImplementedError(f"{product.name}: a deconvolution whose patches overlap")
    batch = torch.randint(left.shape[0], (rows,), generator=generator)
    height, width = left.shape[2:] if is_deconv else result[2:]
    y, x = (torch.randint(size, (rows,), generator=generator) for size in (height, width))
    if is_deconv:
        return left[batch, :, y, x][None], right.flatten(1)[None], lambda v: _blocks(v, stride, batch, y, x)
    return _take_patches(product.module, left, right, batch, y, x)


def _take_patches(
    conv: nn.Module, left: torch.Tensor, right: torch.Tensor, batch: torch.Tensor, y: torch.Tensor, x: torch.Tensor
) -> Rows:
    assert isinstance(conv, nn.Conv2d)
    groups = conv.groups
    vertical, horizontal = (int(size) for size in conv.padding)
    padded = F.pad(left, (horizontal, horizontal, vertical, vertical))
    ys = y[:, None] * conv.stride[0] + torch.arange(right.shape[2]) * conv.dilation[0]
    xs = x[:, None] * conv.stride[1] + torch.arange(right.shape[3]) * conv.dilation[1]
    patches = padded[batch[:, None, None], :, ys[:, :, None], xs[:, None, :]]  # (n, kh, kw, C)
    patches = patches.permute(0, 3, 1, 2).reshape(len(batch), groups, -1).transpose(0, 1).contiguous()

    def results(value: torch.Tensor) -> torch.Tensor:
        return value[batch, :, y, x].view(len(batch), groups, -1).transpose(0, 1)

    return patches, right.reshape(groups, right.shape[0] // groups, -1).transpose(1, 2).contiguous(), results


def _take_corner(left: torch.Tensor, right: torch.Tensor, generator: torch.Generator) -> Rows:
    batch = torch.randperm(len(left), generator=generator)[:MATRICES]
    rows = torch.randperm(left.shape[-2], generator=generator)[:ROWS]
    columns = torch.randperm(right.shape[-1], generator=generator)[:COLUMNS]

    def corner(value: torch.Tensor, rows: torch.Tensor | slice, columns: torch.Tensor | slice) -> torch.Tensor:
        return value[batch][..., rows, :][..., columns].flatten(0, -3)

    everything = slice(None)
    return (
        corner(left, rows, everything),
        corner(right, everything, columns),
        lambda value: corner(value, rows, columns),
    )


def _blocks(
    value: torch.Tensor, size: tuple[int, ...], batch: torch.Tensor, y: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    images, channels, height, width = value.shape
    blocks = value.view(images, channels, height // size[0], size[0], width // size[1], size[1])
    return blocks[batch, :, y, :, x].flatten(1)[None]


def _rows(value: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return value.reshape(-1, value.shape[-1])[index]
