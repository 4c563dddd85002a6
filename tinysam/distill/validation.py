"""A cheap look at a student while it trains: IoU at half the input's resolution, on whole images of a cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from segment_anything.modeling import Sam

from tinysam.distill.cache import open_cache
from tinysam.distill.decoding import at_target_stride, decode, dense_positions
from tinysam.distill.frame import TARGET_STRIDE
from tinysam.distill.groups import Group
from tinysam.distill.loading import Reading, load_batches
from tinysam.distill.losses import mask_iou
from tinysam.distill.prompts import Prompts, box_prompts, point_prompts
from tinysam.distill.samples import Sample, SampleConfig
from tinysam.distill.step import SINGLE_MASK, preprocess
from tinysam.lake.shards import ShardError

MASKS = 32
"""Masks of an image that are looked at."""


def validation_batches(urls: Sequence[str], *, images: int, image_size: int) -> list[Sample]:
    """Whole images of caches that are not trained on, one a batch; the same ones each time.

    Args:
        urls: outputs of pipelines/cache_teacher.py.
        images: drawn from each of them.
        image_size: of the training set.

    Raises:
        ShardError: if a cache has another image size, or holds no image with masks.
    """
    batches: list[Sample] = []
    for url in urls:
        cache = open_cache([url])
        if cache.image_size != image_size:
            raise ShardError(
                f"{url} is cached at {cache.image_size} pixels, the training set at {image_size}. "
                f"Cache it with --image-size {image_size}."
            )
        group = Group(offset=0, shards=tuple(range(len(cache.shards))), steps=images)
        reading = Reading(groups=[group], samples=SampleConfig(), prompts=MASKS, batch_size=1)
        batches += load_batches(cache, reading, processes=0)
    return batches


@torch.no_grad()
def validate(student: Sam, batches: Iterable[Sample], autocast: torch.autocast) -> dict[str, float]:
    """Mean IoU of box and of one-click prompts, each mask counted once where samples hold it once.

    ``box`` is the single-mask output, ``click`` the ambiguous output of the highest predicted IoU (SAM's use of its
    outputs), ``click_best`` the best of them. Clicks are on the pixel that a mask covers nearest to its centroid.

    Args:
        student: in eval mode.
        batches: whole images, so ``origin`` is 0, on the student's device.
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
        box_iou = mask_iou(at_target_stride(boxed.logits), targets[:, None])[:, SINGLE_MASK]
        click_iou = mask_iou(at_target_stride(clicked.logits), targets[:, None])[:, 1:]
        chosen = clicked.predicted_iou[:, 1:].argmax(1, keepdim=True)
        ious["box"].append(box_iou[keep])
        ious["click"].append(click_iou.gather(1, chosen)[keep, 0])
        ious["click_best"].append(click_iou.max(1).values[keep])
    return {name: torch.cat(values).mean().item() if values else float("nan") for name, values in ious.items()}


def centre_clicks(targets: torch.Tensor) -> Prompts:
    """One foreground point for each of ``(N, h, w)`` masks: the covered pixel nearest to the centroid."""
    height, width = targets.shape[1:]
    axes = (torch.arange(side, device=targets.device) for side in (height, width))
    ys, xs = torch.meshgrid(*axes, indexing="ij")
    mass = targets.sum((1, 2)).clamp(min=1e-6)
    centre_y, centre_x = ((targets * axis).sum((1, 2)) / mass for axis in (ys, xs))
    distance = (ys - centre_y[:, None, None]) ** 2 + (xs - centre_x[:, None, None]) ** 2
    distance = torch.where(targets > 0.5, distance, distance + height * width * 4)
    index = distance.flatten(1).argmin(1)
    points = (torch.stack([index % width, index // width], 1) + 0.5) * TARGET_STRIDE
    return point_prompts(points)
