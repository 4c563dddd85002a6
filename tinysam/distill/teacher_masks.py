"""Masks for images that nobody annotated: what the teacher says when a grid of points prompts it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from segment_anything.modeling import Sam

from tinysam.distill.decoding import at_target_stride, decode
from tinysam.distill.frame import EMBEDDING_STRIDE, TARGET_STRIDE
from tinysam.distill.prompts import point_prompts
from tinysam.distill.samples import Sample, content_mask

STABILITY_OFFSET = 1.0  # as in SAM's everything mode


@dataclass(frozen=True, kw_only=True)
class TeacherMaskConfig:
    """Which of the teacher's masks stand in for ground truth (our choice; the paper trains on SA-1B's masks, which
    SAM made in much the same way)."""

    enabled: bool = True
    """Prompt the teacher on images without annotations; off: they teach their embedding alone."""
    pred_iou_thresh: float = 0.88
    """Masks of lower predicted IoU are left out (SAM's default)."""
    stability_score_thresh: float = 0.9
    """Masks of lower stability are left out (SAM's default is 0.95 at full resolution; ours is at half)."""

    def __post_init__(self) -> None:
        for name in ("pred_iou_thresh", "stability_score_thresh"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")


@torch.no_grad()
def add_teacher_masks(
    teacher: Sam, batch: Sample, positions: torch.Tensor, config: TeacherMaskConfig, generator: torch.Generator
) -> Sample:
    """A batch whose unlabelled images have the teacher's masks as targets.

    A grid of as many points as there are places for masks, shifted at random, prompts each such image; of the three
    ambiguous masks the one of highest predicted IoU counts. Where none passes the thresholds, an image keeps no mask.

    Args:
        teacher: in eval mode, on the batch's device.
        batch: ``B`` images with ``P`` places, whole or cropped, with embeddings.
        positions: ``(B, C, s, s)`` of the batch, from ``decoding.dense_positions``.
        config: thresholds.
        generator: on the batch's device.
    """
    rows = torch.nonzero(~batch.labelled)[:, 0]
    if not config.enabled or not len(rows):
        return batch
    places = batch.targets.shape[1]
    points = grid_points(batch.content_size[rows], places, generator)
    frame = (batch.origin[rows] * EMBEDDING_STRIDE).float()
    prompts = point_prompts((points + frame[:, None]).flatten(0, 1))
    decoded = decode(teacher, batch.embedding[rows], positions[rows], prompts)
    predicted_iou, best = decoded.predicted_iou[:, 1:].float().max(1)
    chosen = decoded.logits[torch.arange(len(best), device=best.device), best + 1]
    logits = at_target_stride(chosen[:, None])[:, 0]
    content = content_mask(batch.content_size[rows], logits.shape[-1], TARGET_STRIDE).repeat_interleave(places, 0)
    logits = logits.masked_fill(~content, -math.inf)
    masks = logits > 0
    good = (
        masks.flatten(1).any(1)
        & (predicted_iou >= config.pred_iou_thresh)
        & (stability(logits) >= config.stability_score_thresh)
    )
    targets, boxes, weight = batch.targets.clone(), batch.boxes.clone(), batch.weight.clone()
    targets[rows] = (masks & good[:, None, None]).to(targets.dtype).unflatten(0, (-1, places))
    boxes[rows] = (mask_boxes(masks) * good[:, None]).unflatten(0, (-1, places))
    weight[rows] = good.float().unflatten(0, (-1, places))
    return replace(batch, targets=targets, boxes=boxes, weight=weight)


def grid_points(content_size: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """``count`` points on a grid over each image, shifted by up to half of its spacing.

    Args:
        content_size: ``(B, 2)`` height and width in pixels.
        count: of points; a random choice of the smallest square grid with as many.

    Returns:
        ``(B, count, 2)`` float32 (x, y), inside the image.
    """
    side, device = math.ceil(math.sqrt(count)), generator.device
    order = torch.rand((len(content_size), side * side), generator=generator, device=device).argsort(1)
    places = order[:, :count]
    cells = torch.stack([places % side, places // side], 2) + 0.5
    shift = torch.rand((len(content_size), 1, 2), generator=generator, device=device) - 0.5
    return (cells + shift * (1 - 2**-10)) / side * content_size.flip(1)[:, None]


def stability(logits: torch.Tensor) -> torch.Tensor:
    """IoU of each mask thresholded above and below 0, as in SAM: ``(N, h, w)`` logits to ``(N,)``."""
    inner = (logits > STABILITY_OFFSET).flatten(1).sum(1)
    outer = (logits > -STABILITY_OFFSET).flatten(1).sum(1)
    return inner / outer.clamp(min=1)


def mask_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Boxes around ``(N, h, w)`` masks in the targets' frame: ``(N, 4)`` x0, y0, x1, y1 in input pixels, 0 if empty."""
    corners = []
    for covered in (masks.any(1), masks.any(2)):  # columns, rows
        first = covered.int().argmax(1)
        last = covered.shape[1] - covered.flip(1).int().argmax(1)
        corners.append(torch.stack([first, last], 1) * covered.any(1, keepdim=True))
    (x0, x1), (y0, y1) = corners[0].T, corners[1].T
    return torch.stack([x0, y0, x1, y1], 1).float() * TARGET_STRIDE
