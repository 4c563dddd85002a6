"""What the scale search works on: a sample of each layer's operands, and how much its results matter to the masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import nn
from torch.nn import functional as F

from tinysam.quant.graph import Layer
from tinysam.quant.observe import groups_of_size

SAMPLE_BYTES = 256 << 20
"""Samples that are held at a time. More groups mean more passes over the images."""

ROWS = 512
"""Rows of a layer's operand, over all images; our choice."""

ITEMS = 16
"""Windows and heads of which a product of activations is sampled, over all images; our choice."""

POINTS_PER_SIDE = 4
"""The task loss is taken over single clicks in a grid of this side; our choice."""

_LEAST = 1e-4
"""Probabilities stay this far from 0 and 1."""


@dataclass(frozen=True, kw_only=True)
class Operands:
    """Sampled operands of a layer, as a batch of matrix products ``left @ right``.

    A convolution's left operand are patches and its batch are its groups; a linear layer has a batch of 1. Of a product
    of activations, the batch are windows and heads.
    """

    left: torch.Tensor
    """(B, R, K) float32: activations."""
    right: torch.Tensor
    """(B, K, C) float32: weights, or the second activations."""
    gradient: torch.Tensor
    """(B, R, C) float32: the task loss's gradient with respect to the product."""


def task_loss(sam: Sam, embedding: torch.Tensor, reference: torch.Tensor, input_size: tuple[int, int]) -> torch.Tensor:
    """How far the outputs on ``embedding`` are from those on ``reference``: the paper's KL of masks plus KL of IoUs.

    The paper does not say of which distributions. Ours: a mask's pixels, and the predicted IoUs, are probabilities of
    a yes; the divergences are means over pixels and masks of a grid of single clicks.

    Args:
        sam: whose decoder is run.
        embedding: (1, C, h, w).
        reference: (1, C, h, w), of the float encoder.
        input_size: height and width of the image in the encoder's frame, without padding.
    """
    with torch.no_grad():
        expected_masks, expected_iou = _decode(sam, reference, input_size)
    masks, iou = _decode(sam, embedding, input_size)
    least, most = _LEAST, 1 - _LEAST
    return _divergence(masks.sigmoid().clamp(least, most), expected_masks.sigmoid().clamp(least, most)) + _divergence(
        iou.clamp(least, most), expected_iou.clamp(least, most)
    )


def sample_operands(
    sam: Sam,
    encoder: nn.Module,
    layers: Sequence[Layer],
    images: Sequence[np.ndarray],
    input_sizes: Sequence[tuple[int, int]],
    embeddings: Sequence[np.ndarray],
    *,
    seed: int = 0,
    on_image: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Layer, Operands]]:
    """Runs the encoder forwards and backwards, and yields each layer's operands, one group of layers after the other.

    At the float model's own outputs the loss has no gradient. It is taken where a quantized encoder ends: its error is
    added to the embedding.

    Args:
        sam: the float model; its decoder is run.
        encoder: ``explicit_encoder`` of its image encoder.
        layers: what to sample.
        images: (1, 3, S, S) float32 each, normalised.
        input_sizes: see ``task_loss``, for each image.
        embeddings: (1, C, h, w) float32, of a quantized encoder, for each image.
        seed: which rows are drawn.
        on_image: called after each pass of an image.
    """
    rows, items = math.ceil(ROWS / len(images)), math.ceil(ITEMS / len(images))
    sizes = _sample_sizes(encoder, layers, images[0], rows, items)
    for group in groups_of_size(layers, lambda layer: len(images) * sizes[layer.name], SAMPLE_BYTES):
        parts: dict[str, list[Operands]] = {layer.name: [] for layer in group}
        for number, (image, size, end) in enumerate(zip(images, input_sizes, embeddings, strict=True)):
            generator = torch.Generator().manual_seed(seed + number)
            for name, operands in _sample_image(sam, encoder, group, image, size, end, rows, items, generator).items():
                parts[name].append(operands)
            on_image()
        for layer in group:
            yield layer, _joined(parts.pop(layer.name), layer)


def _decode(sam: Sam, embedding: torch.Tensor, input_size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    cells = (torch.arange(POINTS_PER_SIDE) + 0.5) / POINTS_PER_SIDE
    y, x = torch.meshgrid(cells * input_size[0], cells * input_size[1], indexing="ij")
    points = torch.stack([x, y], dim=-1).reshape(-1, 1, 2)
    labels = torch.ones(points.shape[:2], dtype=torch.int)
    sparse, dense = sam.prompt_encoder(points=(points, labels), boxes=None, masks=None)
    masks, iou = sam.mask_decoder(
        image_embeddings=embedding,
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=True,
    )
    return masks, iou


def _divergence(probability: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Mean Kullback-Leibler divergence of yes-or-no distributions from those expected."""
    entropy = F.binary_cross_entropy(expected, expected)
    return F.binary_cross_entropy(probability, expected) - entropy


def _sample_sizes(
    encoder: nn.Module, layers: Sequence[Layer], image: np.ndarray, rows: int, items: int
) -> dict[str, int]:
    """Bytes of each layer's sample of an image."""
    sizes: dict[str, int] = {}

    def measure(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if isinstance(module, nn.Conv2d):
                numbers = rows * (math.prod(module.weight.shape[1:]) * module.groups + module.out_channels)
            elif isinstance(module, nn.Linear):
                numbers = rows * (module.in_features + module.out_features)
            else:
                a, b = inputs
                numbers = items * (min(rows, a.shape[-2]) * (a.shape[-1] + b.shape[-1]) + math.prod(b.shape[-2:]))
            sizes[name] = 4 * numbers

        return hook

    handles = [encoder.get_submodule(layer.name).register_forward_hook(measure(layer.name)) for layer in layers]
    try:
        with torch.no_grad():
            encoder(torch.from_numpy(image))
    finally:
        for handle in handles:
            handle.remove()
    return sizes


def _sample_image(
    sam: Sam,
    encoder: nn.Module,
    layers: Sequence[Layer],
    image: np.ndarray,
    input_size: tuple[int, int],
    end: np.ndarray,
    rows: int,
    items: int,
    generator: torch.Generator,
) -> dict[str, Operands]:
    found: dict[str, Operands] = {}

    def hook_for(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            left, right, pick = _draw(
                module, [value.detach() for value in inputs], output.shape, rows, items, generator
            )

            def take(gradient: torch.Tensor) -> None:
                found[name] = Operands(left=left, right=right, gradient=pick(gradient))

            output.register_hook(take)

        return hook

    handles = [encoder.get_submodule(layer.name).register_forward_hook(hook_for(layer.name)) for layer in layers]
    try:
        # Weights want no gradient; the image does, so that there is a graph.
        tensor = torch.from_numpy(image).clone().requires_grad_()
        embedding = encoder(tensor)
    finally:
        for handle in handles:
            handle.remove()
    reference = embedding.detach()
    error = torch.from_numpy(end) - reference
    # Not backward(), which would add to the gradients of the decoder's weights.
    torch.autograd.grad(task_loss(sam, embedding + error, reference, input_size), tensor)
    return found


def _draw(
    module: nn.Module,
    inputs: Sequence[torch.Tensor],
    output_shape: torch.Size,
    rows: int,
    items: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Left and right operands, and a function that picks the same rows of the output's gradient."""

    def some(count: int, most: int) -> torch.Tensor:
        return torch.randperm(count, generator=generator)[:most].sort().values

    if isinstance(module, nn.Conv2d):
        channels, height, width = output_shape[1:]
        positions = some(height * width, rows)
        groups = module.groups
        patches = _patches(module, inputs[0], positions // width, positions % width)
        left = patches.view(len(positions), groups, -1).transpose(0, 1).contiguous()
        right = module.weight.view(groups, channels // groups, -1).transpose(1, 2)
        return left, right, lambda g: g.view(groups, channels // groups, -1)[:, :, positions].transpose(1, 2).clone()
    if isinstance(module, nn.Linear):
        flat = inputs[0].flatten(0, -2)
        positions = some(len(flat), rows)
        return flat[positions][None], module.weight.T[None], lambda g: g.flatten(0, -2)[positions][None]
    a, b = inputs
    a, b = a.flatten(0, -3), b.flatten(0, -3)
    chosen, positions = some(len(a), items), some(a.shape[1], rows)
    return a[chosen][:, positions], b[chosen], lambda g: g.flatten(0, -3)[chosen][:, positions]


def _patches(module: nn.Conv2d, x: torch.Tensor, y: torch.Tensor, x_: torch.Tensor) -> torch.Tensor:
    """(N, C * kh * kw): what a convolution multiplies its weights with, at output positions (``y``, ``x_``)."""
    assert not isinstance(module.padding, str)
    (top, left), (down, right) = module.padding, module.stride
    kh, kw = module.kernel_size
    padded = F.pad(x[0], (left, left, top, top))
    rows = (y * down)[:, None, None] + torch.arange(kh)[None, :, None]
    columns = (x_ * right)[:, None, None] + torch.arange(kw)[None, None, :]
    return padded[:, rows, columns].transpose(0, 1).flatten(1)


def _joined(parts: Sequence[Operands], layer: Layer) -> Operands:
    """Samples of several images as one: more rows for a weight, more items for a product of activations."""
    dim = 1 if layer.weight else 0
    return Operands(
        left=torch.cat([part.left for part in parts], dim=dim),
        right=parts[0].right if layer.weight else torch.cat([part.right for part in parts]),
        gradient=torch.cat([part.gradient for part in parts], dim=dim),
    )
