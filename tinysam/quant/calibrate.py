"""Calibration images through a float Sam: what range every product's sides cover, and samples for the search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from segment_anything.modeling import Sam

from tinysam.predictor import ResizeLongestSide, check_image
from tinysam.quant.curvature import click_grid, log_likelihood
from tinysam.quant.observe import Observer
from tinysam.quant.products import Compute, Product, ProductMode
from tinysam.quant.samples import Sample, take
from tinysam.quant.scheme import Scheme, cell_shape


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """How much of the calibration images is looked at."""

    rows: int = 512
    """Output positions of each product with a weight that the search evaluates, over all images. Our choice: the paper
    takes all; 512 are enough for one number a channel, and bound memory and time."""
    points_per_side: int = 3
    """Clicks along each side of an image, whose masks are the task."""
    seed: int = 0
    """Of the positions and of the outcomes drawn."""

    def __post_init__(self) -> None:
        for name in ("rows", "points_per_side"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(kw_only=True)
class Seen:
    """What calibration knows of a product."""

    product: Product
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    """In which the scales of either side broadcast."""
    observers: tuple[list[Observer], list[Observer]]
    """One a cell; none for a weight."""
    weight: torch.Tensor | None
    """The right side, if it is a weight."""
    samples: list[Sample] = field(default_factory=list)
    """One an image."""

    def extremes(self, side: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Lowest and highest value to cover of each cell, (cells,) each, 0 included."""
        if side == 1 and self.weight is not None:
            rows = _by_cell(self.weight, self.shapes[1])
            return rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
        ranges = [observer.range() for observer in self.observers[side]]
        return torch.tensor([r.low for r in ranges]), torch.tensor([r.high for r in ranges])

    def sample(self) -> Sample:
        """The samples of all images as one."""
        first = self.samples[0]
        if self.weight is None:
            return Sample(
                **{name: torch.cat([getattr(sample, name) for sample in self.samples]) for name in vars(first)}
            )
        left, curvature = (
            torch.cat([getattr(sample, name) for sample in self.samples], dim=1) for name in ("left", "curvature")
        )
        return Sample(
            left=left,
            right=first.right,
            curvature=curvature,
            left_cell=first.left_cell,
            right_cell=first.right_cell,
        )


def calibrate(
    sam: Sam,
    images: Sequence[np.ndarray],
    scheme: Scheme,
    config: CalibrationConfig,
    *,
    on_image: Callable[[], None] = lambda: None,
) -> dict[str, Seen]:
    """Runs the images and a grid of clicks on each through the float model.

    Memory: one image's activations, with their gradients where scales are searched, and the samples of all images.

    Args:
        sam: on the CPU, in eval mode, with BatchNorm folded; its parameters need no gradients.
        images: (H, W, 3) uint8 RGB.
        scheme: what is going to be quantized, and how.
        config: how much is looked at.
        on_image: called after each image.

    Returns:
        By product's name, in the order of execution.

    Raises:
        FloatingPointError: if an activation is not finite.
    """
    seen: dict[str, Seen] = {}
    generator = torch.Generator().manual_seed(config.seed)
    rows = max(1, config.rows // len(images))

    def see(product: Product, left: torch.Tensor, right: torch.Tensor, compute: Compute) -> torch.Tensor:
        result = compute(left, right)
        if not scheme.quantizes(product.name):
            return result
        entry = seen.setdefault(product.name, _first_sight(product, left, right, scheme))
        for side, value in enumerate((left, right)):
            for observer, cell in zip(entry.observers[side], _by_cell(value, entry.shapes[side]), strict=False):
                if not torch.isfinite(cell).all():
                    raise FloatingPointError(
                        f"an input of {product.name} holds NaN or infinity: the weights are damaged"
                    )
                observer.see(cell.detach().numpy())
        if scheme.searches:
            _record(entry, left, right, result, rows, generator)
        return result

    with torch.set_grad_enabled(scheme.searches), ProductMode(sam, see):
        for image in images:
            masks, ious = run_clicks(sam, image, config.points_per_side)
            if scheme.searches:
                log_likelihood(masks, ious, generator).backward()
            on_image()
    return seen


def run_clicks(sam: Sam, image: np.ndarray, points_per_side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A grid of clicks, each alone, on an image: mask logits (N, 4, h, w) and predicted IoUs (N, 4).

    Where gradients are enabled, they flow to every product of the encoder and the decoder.

    Args:
        sam: on the CPU, in eval mode.
        image: (H, W, 3) uint8 RGB.
        points_per_side: clicks along each side.
    """
    gradients = torch.is_grad_enabled()
    resized = ResizeLongestSide(sam.image_encoder.img_size).apply_image(check_image(image))
    with torch.no_grad():
        prepared = sam.preprocess(torch.from_numpy(resized).permute(2, 0, 1)[None])
        sparse, dense = click_grid(sam, points_per_side, resized.shape[:2])
    masks, ious = sam.mask_decoder.predict_masks(
        image_embeddings=sam.image_encoder(prepared.requires_grad_(gradients)),
        image_pe=sam.prompt_encoder.get_dense_pe(),
        # With gradients from here on, since the first products of the decoder see the tokens alone.
        sparse_prompt_embeddings=sparse.requires_grad_(gradients),
        dense_prompt_embeddings=dense,
    )
    return masks, ious


def _first_sight(product: Product, left: torch.Tensor, right: torch.Tensor, scheme: Scheme) -> Seen:
    shapes = cell_shape(product, 0, left, scheme), cell_shape(product, 1, right, scheme)
    weight = None if product.kind == "matmul" else right.detach()

    def observers(shape: tuple[int, ...]) -> list[Observer]:
        return [scheme.make_observer() for _ in range(int(np.prod(shape)))]

    return Seen(
        product=product,
        shapes=shapes,
        observers=(observers(shapes[0]), observers(shapes[1]) if weight is None else []),
        weight=weight,
    )


def _by_cell(value: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """(cells, values), whichever dimension the cells are along."""
    cells = max(shape)
    if cells == 1:
        return value.reshape(1, -1)
    return value.movedim(value.ndim - len(shape) + shape.index(cells), 0).reshape(cells, -1)


def _record(
    entry: Seen, left: torch.Tensor, right: torch.Tensor, result: torch.Tensor, rows: int, generator: torch.Generator
) -> None:
    """Keeps a sample; its curvature comes when gradients flow back."""
    some_left, some_right, positions = take(entry.product, left, right, result.shape, rows, generator)
    cells = [max(shape) for shape in entry.shapes]
    groups, columns = len(some_left), some_right.shape[-1]
    if entry.weight is None:
        left_cell, head = (torch.arange(groups) % count for count in cells)
        right_cell = head[:, None].expand(groups, columns)
    else:
        left_cell = torch.zeros(groups, dtype=torch.long)
        right_cell = torch.arange(cells[1]).repeat_interleave(groups * columns // cells[1]).view(groups, columns)
    sample = Sample(
        left=some_left,
        right=some_right,
        curvature=torch.zeros(()),
        left_cell=left_cell,
        right_cell=right_cell,
    )

    def receive(gradient: torch.Tensor) -> None:
        with torch.no_grad():
            curvature = positions(gradient.detach()).square()
        entry.samples.append(replace(sample, curvature=curvature))

    result.register_hook(receive)
