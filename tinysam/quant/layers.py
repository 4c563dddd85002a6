"""What becomes of every layer: its scales, its error, and why it stays in float.

Why the mask decoder stays in float: OpenVINO runs its graph for one prompt of ``vit_t`` in 36 ms in bfloat16, in 45 ms
with its linear layers and deconvolutions in integers and the rest in bfloat16, and in 58 ms with the products of its
attentions in integers as well (75 ms in float32; medians of 15 interleaved runs, CPU time of one thread, Xeon with AMX
beside other load, random weights, ONNX Runtime's static quantization). Its 4,096 image tokens of 256 channels are
read and rounded more than they are multiplied. In everything mode the low-rank decoder shares work that integers
cannot. What its layers would lose is in every run's report all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import nn

from tinysam.quant.calibrate import run_clicks
from tinysam.quant.errors import Difference, DifferenceSum
from tinysam.quant.grids import UniformGrid
from tinysam.quant.products import Compute, Product, ProductKind, ProductMode
from tinysam.quant.search import ProductGrids

ENCODER, DECODER = "image_encoder.", "mask_decoder."
"""What precedes the name of a layer in the Sam."""
IS_CONSTANT = "an input of it is 0 on every calibration image"
"""Why a layer of which no step can be derived stays in float: one that is made up would round other images to
nothing."""
IN_DECODER = "the mask decoder runs in float; see tinysam.quant.layers"

CLICKS_PER_SIDE = 3
"""Clicks along each side of an image on which errors of the mask decoder are measured."""


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What became of a layer."""

    name: str
    kind: ProductKind
    precision: Literal["int8", "float32"]
    reason: str | None = None
    """Why it stayed in float."""
    activation_scales: tuple[float, ...] = ()
    """Step of each of its activations."""
    activation_zero_points: tuple[int, ...] = ()
    """The integer that stands for 0 in each of its activations."""
    weight_scales: tuple[float, ...] = ()
    """Steps of its weight, one for each output channel."""
    relative_error: float | None = None
    """Error of its result on held-out images when only this layer is quantized; see ``layer_errors``. Of a layer of the
    mask decoder, which is not quantized, what it would be."""
    sensitivity: float | None = None
    """Error of the embedding when only this layer is quantized; measured where a budget was exceeded."""


def simulated_errors(
    sam: Sam, grids: Mapping[str, ProductGrids], images: Sequence[np.ndarray]
) -> dict[str, tuple[Product, Difference | None]]:
    """What rounding each product alone would get wrong: the same as ``layer_errors``, for the decoder as well.

    Args:
        sam: in eval mode, in its ``engine_form``.
        grids: by product's name.
        images: (H, W, 3) uint8 RGB, with a grid of clicks on each.

    Returns:
        By product's name, in the order of execution, the product and the error of its result over all images; None for
        a product without grids.
    """
    ready = {name: (found.grid(0), found.grid(1)) for name, found in grids.items()}
    products: dict[str, Product] = {}
    sums: dict[str, DifferenceSum] = {}

    def compare(product: Product, left: torch.Tensor, right: torch.Tensor, compute: Compute) -> torch.Tensor:
        result = compute(left, right)
        products[product.name] = product
        if product.name in ready:
            left_grid, right_grid = ready[product.name]
            rounded = compute(left_grid.round(left), right_grid.round(right))
            # A linear layer's bias is added after its product, in graphs, and would make the error look smaller.
            bias = product.module.bias if isinstance(product.module, nn.Linear) else None
            exact, rounded = (value if bias is None else value - bias for value in (result, rounded))
            sums.setdefault(product.name, DifferenceSum()).add(exact.numpy(), rounded.numpy())
        return result

    with torch.no_grad(), ProductMode(sam, compare):
        for image in images:
            run_clicks(sam, image, CLICKS_PER_SIDE)
    return {name: (product, sums[name].result() if name in sums else None) for name, product in products.items()}


def decoder_layers(
    sam: Sam, grids: Mapping[str, ProductGrids], images: Sequence[np.ndarray]
) -> tuple[LayerReport, ...]:
    """The layers of the mask decoder with the scales and errors that integers would have, simulated in torch.

    Args:
        sam: in eval mode, in its ``engine_form``.
        grids: of the decoder's products and perhaps others, with one scale for each activation.
        images: held-out images, (H, W, 3) uint8 RGB.
    """
    decoder = {name: found for name, found in grids.items() if name.startswith(DECODER)}
    return tuple(
        LayerReport(
            name=name,
            kind=product.kind,
            precision="float32",
            reason=IS_CONSTANT if error is None else IN_DECODER,
            **({} if error is None else _scales(product, decoder[name])),  # type: ignore[arg-type]
            relative_error=None if error is None else error.relative_error,
        )
        for name, (product, error) in simulated_errors(sam, decoder, images).items()
        if name.startswith(DECODER)
    )


def _scales(product: Product, grids: ProductGrids) -> dict[str, tuple[float, ...] | tuple[int, ...]]:
    activations = 2 if product.kind == "matmul" else 1
    uniform = [grid for side in (0, 1) if isinstance(grid := grids.grid(side), UniformGrid)]
    assert len(uniform) == 2, "integer kernels take one range for each tensor"
    return {
        "activation_scales": tuple(float(grid.scale) for grid in uniform[:activations]),
        "activation_zero_points": tuple(int(grid.zero_point) for grid in uniform[:activations]),
        "weight_scales": tuple(uniform[1].scale.flatten().tolist()) if activations == 1 else (),
    }
