"""Prompts for training: first ones from ground truth, further ones from what the student misses (TinySAM, sec. 3.2).

A prompt is a row of ``T`` points with SAM's labels: 1 and 0 for foreground and background, 2 and 3 for a box's top
left and bottom right corners, -1 for none. Points are ``(x, y)`` in pixels of the input frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from segment_anything.modeling import PromptEncoder

from tinysam.distill.frame import TARGET_STRIDE

BACKGROUND, FOREGROUND, TOP_LEFT, BOTTOM_RIGHT, NO_POINT = 0, 1, 2, 3, -1


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """How masks are prompted while training."""

    per_image: int = 8
    """Masks prompted in an image; in a batch of eight images these are the paper's 64 an iteration."""
    box_probability: float = 1 / 3
    """Share of first prompts that are boxes rather than points (our choice)."""
    box_jitter: float = 0.1
    """Corners move by up to this share of the box's sides (our choice)."""
    max_rounds: int = 9
    """A step refines its prompts between 0 and this many times, uniformly (paper)."""
    policy: Literal["tinysam", "sam"] = "sam"
    """``sam``: next points from all errors, with both labels. ``tinysam``: from what the student misses, positive
    (paper), which leaves it bad at corrections that take away (docs/BENCHMARKS.md)."""
    mask_prompt_probability: float = 0.5
    """Chance that a refinement also sees the logits before it, as SAM's predictor may feed them (our choice)."""

    def __post_init__(self) -> None:
        if self.per_image < 1 or self.max_rounds < 0:
            raise ValueError("prompts need per_image >= 1 and max_rounds >= 0")
        for name in ("box_probability", "mask_prompt_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")


@dataclass(frozen=True)
class Prompts:
    """``N`` prompts of ``T`` points each."""

    points: torch.Tensor
    """``(N, T, 2)`` float32."""
    labels: torch.Tensor
    """``(N, T)`` int64."""

    def extended(self, points: torch.Tensor, labels: torch.Tensor) -> Prompts:
        """These prompts with one more point each: ``(N, 2)`` points and ``(N,)`` labels."""
        return Prompts(
            torch.cat([self.points, points[:, None]], 1),
            torch.cat([self.labels, labels[:, None]], 1),
        )


def draw_refinements(config: PromptConfig, generator: torch.Generator) -> list[bool]:
    """How a step refines its prompts: one entry a round, which says whether it also sees the logits before it."""
    rounds = int(torch.randint(config.max_rounds + 1, (), generator=generator))
    return (torch.rand(rounds, generator=generator) < config.mask_prompt_probability).tolist()


def first_prompts(
    targets: torch.Tensor, boxes: torch.Tensor, config: PromptConfig, generator: torch.Generator
) -> Prompts:
    """One point inside each mask, or a jittered box around it.

    Args:
        targets: ``(N, h, w)`` coverages in [0, 1].
        boxes: ``(N, 4)`` x0, y0, x1, y1 in pixels of the same (possibly cropped) frame.

    Returns:
        Prompts with ``T = 2``: a box's corners, or a point and a blank.
    """
    points = sample_points(targets > 0.5, generator)
    as_points = point_prompts(points)
    as_boxes = box_prompts(jitter_boxes(boxes, config.box_jitter, generator))
    use_box = torch.rand(len(targets), generator=generator, device=generator.device) < config.box_probability
    return Prompts(
        torch.where(use_box[:, None, None], as_boxes.points, as_points.points),
        torch.where(use_box[:, None], as_boxes.labels, as_points.labels),
    )


def point_prompts(points: torch.Tensor) -> Prompts:
    """``(N, 2)`` foreground points as prompts of a point and a blank."""
    labels = torch.tensor([FOREGROUND, NO_POINT], device=points.device)
    return Prompts(torch.stack([points, torch.zeros_like(points)], 1), labels.expand(len(points), 2))


def box_prompts(boxes: torch.Tensor) -> Prompts:
    """``(N, 4)`` boxes as prompts of two corners."""
    labels = torch.tensor([TOP_LEFT, BOTTOM_RIGHT], device=boxes.device)
    return Prompts(boxes.view(-1, 2, 2), labels.expand(len(boxes), 2))


def jitter_boxes(boxes: torch.Tensor, amount: float, generator: torch.Generator) -> torch.Tensor:
    """Moves each corner's coordinates by up to ``amount`` times the box's width or height."""
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    moves = torch.rand(boxes.shape, generator=generator, device=generator.device) * 2 - 1
    return boxes + moves * amount * sides


def sample_points(regions: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A uniformly drawn point of each region; anywhere where a region is empty.

    Args:
        regions: ``(N, h, w)`` bool in the targets' frame.

    Returns:
        ``(N, 2)`` float32 (x, y) in input pixels, uniform within the region's pixel.
    """
    n, _, width = regions.shape
    regions = regions.flatten(1)
    # Of the region's pixels, those up to each pixel.
    count = torch.where(regions.any(1, keepdim=True), regions, True).cumsum(1, dtype=torch.int32)
    rank = torch.rand((n, 1), generator=generator, device=generator.device) * count[:, -1:]
    index = torch.searchsorted(count, rank.int() + 1)[:, 0]
    pixels = torch.stack([index % width, index // width], 1)
    # Below 1 by more than float32's rounding: 63 + 0.99999994 would be 64, a pixel beyond the mask.
    within = torch.rand((n, 2), generator=generator, device=generator.device) * (1 - 2**-10)
    return (pixels + within) * TARGET_STRIDE


def next_points(
    targets: torch.Tensor, predicted: torch.Tensor, policy: Literal["tinysam", "sam"], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where to click next, given the student's present masks.

    ``tinysam`` draws from what is missed, as foreground; where nothing is missed, from what is wrongly covered, as
    background (our choice). ``sam`` draws from all wrong pixels. Where nothing is wrong at all the point is blank.

    Args:
        targets: ``(N, h, w)`` bool.
        predicted: ``(N, h, w)`` bool.

    Returns:
        ``(N, 2)`` points in input pixels and ``(N,)`` labels.
    """
    missed = targets & ~predicted
    wrong = targets ^ predicted
    if policy == "tinysam":
        wrong = torch.where(missed.flatten(1).any(1)[:, None, None], missed, wrong)
    points = sample_points(wrong, generator)
    return points, click_labels(points, targets, wrong)


def click_labels(points: torch.Tensor, targets: torch.Tensor, wrong: torch.Tensor) -> torch.Tensor:
    """Foreground where a click is on the object, background where it is not, none where nothing is wrong.

    Args:
        points: ``(N, 2)`` in input pixels.
        targets: ``(N, h, w)`` bool.
        wrong: ``(N, h, w)`` bool.

    Returns:
        ``(N,)`` int64.
    """
    pixels = (points / TARGET_STRIDE).long()
    n = torch.arange(len(targets), device=targets.device)
    labels = torch.where(targets[n, pixels[:, 1], pixels[:, 0]], FOREGROUND, BACKGROUND)
    return torch.where(wrong.flatten(1).any(1), labels, NO_POINT)


def embed_prompts(encoder: PromptEncoder, prompts: Prompts) -> torch.Tensor:
    """SAM's sparse embeddings of prompts that mix points, boxes and blanks: ``(N, T, C)``.

    The same sums as ``PromptEncoder._embed_points`` and ``_embed_boxes``, chosen by label instead of by argument.
    """
    embedding = encoder.pe_layer.forward_with_coords(prompts.points + 0.5, encoder.input_image_size)
    labels = prompts.labels[..., None]
    embedding = torch.where(labels == NO_POINT, encoder.not_a_point_embed.weight, embedding)
    for label, corner in enumerate(encoder.point_embeddings):
        embedding = torch.where(labels == label, embedding + corner.weight, embedding)
    return embedding
