"""A cheap look at a student while it trains: IoU of low-resolution masks on whole images of a cache."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from segment_anything.modeling import Sam

from tinysam.distill.decoding import decode, dense_positions
from tinysam.distill.losses import mask_iou
from tinysam.distill.prompts import FOREGROUND, NO_POINT, Prompts, box_prompts
from tinysam.distill.samples import LOW_RES_STRIDE, Sample
from tinysam.distill.step import SINGLE_MASK, preprocess


@torch.no_grad()
def validate(student: Sam, batches: Iterable[Sample], autocast: torch.autocast) -> dict[str, float]:
    """Mean IoU of box and of one-click prompts, each mask counted once where samples hold it once.

    ``box`` is the single-mask output, ``click`` the ambiguous output of the highest predicted IoU (SAM's use of its
    outputs), ``click_best`` the best of them. Clicks are on the pixel that a mask covers nearest to its centroid.

    Args:
        student: in eval mode.
        batches: whole images, so ``origin`` is 0.
    """
    ious: dict[str, list[torch.Tensor]] = {"box": [], "click": [], "click_best": []}
    for batch in batches:
        with autocast:
            embeddings = student.image_encoder(preprocess(student, batch.image, batch.content_size))
        embeddings = embeddings.float()
        positions = dense_positions(student, batch.origin, embeddings.shape[-1])
        targets, keep = batch.targets.flatten(0, 1), batch.weight.flatten() > 0
        with autocast:
            boxed = decode(student, embeddings, positions, box_prompts(batch.boxes.flatten(0, 1)))
            clicked = decode(student, embeddings, positions, centre_clicks(targets))
        box_iou = mask_iou(boxed.logits, targets[:, None])[:, SINGLE_MASK]
        click_iou = mask_iou(clicked.logits, targets[:, None])[:, 1:]
        chosen = clicked.predicted_iou[:, 1:].argmax(1, keepdim=True)
        ious["box"].append(box_iou[keep])
        ious["click"].append(click_iou.gather(1, chosen)[keep, 0])
        ious["click_best"].append(click_iou.max(1).values[keep])
    return {name: torch.cat(values).mean().item() if values else float("nan") for name, values in ious.items()}


def centre_clicks(targets: torch.Tensor) -> Prompts:
    """One foreground point for each of ``(N, h, w)`` masks: the covered pixel nearest to the centroid."""
    n, height, width = targets.shape
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    mass = targets.sum((1, 2)).clamp(min=1e-6)
    centre_y, centre_x = ((targets * axis).sum((1, 2)) / mass for axis in (ys, xs))
    distance = (ys - centre_y[:, None, None]) ** 2 + (xs - centre_x[:, None, None]) ** 2
    distance = torch.where(targets > 0.5, distance, distance + height * width * 4)
    index = distance.flatten(1).argmin(1)
    points = (torch.stack([index % width, index // width], 1) + 0.5) * LOW_RES_STRIDE
    labels = torch.tensor([FOREGROUND, NO_POINT]).expand(n, 2)
    return Prompts(torch.stack([points, torch.zeros_like(points)], 1), labels)
