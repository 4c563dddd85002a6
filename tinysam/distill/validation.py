"""A cheap look at a student while it trains: IoU at half the input's resolution, on images of a cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from segment_anything.modeling import Sam

from tinysam.distill.cache import open_cache
from tinysam.distill.decoding import Decoded, at_target_stride, decode, dense_positions
from tinysam.distill.frame import EMBEDDING_STRIDE, TARGET_STRIDE
from tinysam.distill.groups import Group
from tinysam.distill.loading import Reading, load_batches
from tinysam.distill.losses import mask_iou
from tinysam.distill.prompts import Prompts, box_prompts, click_labels, point_prompts
from tinysam.distill.samples import Sample, SampleConfig
from tinysam.distill.step import SINGLE_MASK, preprocess, shifted
from tinysam.lake.shards import ShardError

SCORES = ("box", "click", "click_3", "click_best")
CORRECTIONS = 2
MASKS = 32
"""Masks of an image that are looked at."""
CHOICE = 4
"""Images that are read for each that is looked at, where there are so many."""


def validation_batches(
    urls: Sequence[str], *, images: int, image_size: int, crop_size: int | None = None
) -> list[Sample]:
    """Images of caches that are not trained on, one a batch; the same ones each time.

    Args:
        urls: outputs of pipelines/cache_teacher.py.
        images: drawn from each of them.
        image_size: of the training set.
        crop_size: side of the crops to look at instead of whole images, in input pixels.

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
        # All of a group is read at once: of large caches only as many shards as give a choice.
        every = max(1, cache.images // (CHOICE * images))
        group = Group(offset=0, shards=tuple(range(0, len(cache.shards), every)), steps=images)
        reading = Reading(groups=[group], samples=SampleConfig(crop_size=crop_size), prompts=MASKS, batch_size=1)
        batches += load_batches(cache, reading, processes=0)
    return batches


@torch.no_grad()
def validate(student: Sam, batches: Iterable[Sample], autocast: torch.autocast) -> dict[str, float]:
    """Mean IoU of box and of click prompts, each mask counted once where samples hold it once.

    ``box`` is the single-mask output, ``click`` the ambiguous output of the highest predicted IoU (SAM's use of its
    outputs), ``click_best`` the best of them. ``click_3`` is the single-mask output after two corrections, each of them
    a click in the middle of what is wrong, and the logits before it.

    Args:
        student: in eval mode.
        batches: from :func:`validation_batches`, on the student's device.
    """
    ious: dict[str, list[torch.Tensor]] = {name: [] for name in SCORES}
    for batch in batches:
        with autocast:
            embeddings = student.image_encoder(preprocess(student, batch.image, batch.content_size))
        embeddings = embeddings.float()
        positions = dense_positions(student, batch.origin, embeddings.shape[-1])
        keep = batch.weight.flatten() > 0
        targets = batch.targets.flatten(0, 1).float()
        offset = (batch.origin * EMBEDDING_STRIDE).float().repeat_interleave(batch.targets.shape[1], 0)
        found = _ious(student, embeddings, positions, targets, batch.boxes.flatten(0, 1), offset, autocast)
        for name, values in found.items():
            ious[name].append(values[keep])
    return {name: torch.cat(values).mean().item() if values else float("nan") for name, values in ious.items()}


def _ious(
    student: Sam,
    embeddings: torch.Tensor,
    positions: torch.Tensor,
    targets: torch.Tensor,
    boxes: torch.Tensor,
    offset: torch.Tensor,
    autocast: torch.autocast,
) -> dict[str, torch.Tensor]:
    """``(N,)`` IoUs of each score; ``offset`` is ``(N, 2)``, where the crops lie in the model's frame, in pixels."""

    def run(prompts: Prompts, mask_logits: torch.Tensor | None = None) -> Decoded:
        with autocast:
            return decode(student, embeddings, positions, shifted(prompts, offset), mask_logits)

    def iou(logits: torch.Tensor) -> torch.Tensor:
        return mask_iou(at_target_stride(logits), targets[:, None])

    boxed = iou(run(box_prompts(boxes)).logits)[:, SINGLE_MASK]
    truth = targets > 0.5
    prompts = point_prompts(centres(truth))
    clicked = run(prompts)
    clicked_iou = iou(clicked.logits)[:, 1:]
    chosen = clicked.predicted_iou[:, 1:].argmax(1, keepdim=True)
    logits = clicked.logits.gather(1, (chosen + 1)[..., None, None].expand(-1, 1, *clicked.logits.shape[2:]))
    for _ in range(CORRECTIONS):
        wrong = (at_target_stride(logits)[:, 0] > 0) ^ truth
        points = centres(wrong)
        prompts = prompts.extended(points, click_labels(points, truth, wrong))
        logits = run(prompts, logits.float()).logits[:, SINGLE_MASK, None]
    return {
        "box": boxed,
        "click": clicked_iou.gather(1, chosen)[:, 0],
        "click_best": clicked_iou.max(1).values,
        "click_3": iou(logits)[:, 0],
    }


def centres(regions: torch.Tensor) -> torch.Tensor:
    """Of each of ``(N, h, w)`` regions the pixel nearest to the centroid: ``(N, 2)`` (x, y) in input pixels."""
    height, width = regions.shape[1:]
    axes = (torch.arange(side, device=regions.device) for side in (height, width))
    ys, xs = torch.meshgrid(*axes, indexing="ij")
    mass = regions.sum((1, 2)).clamp(min=1)
    centre_y, centre_x = ((regions * axis).sum((1, 2)) / mass for axis in (ys, xs))
    distance = (ys - centre_y[:, None, None]) ** 2 + (xs - centre_x[:, None, None]) ** 2
    index = distance.masked_fill(~regions, torch.inf).flatten(1).argmin(1)
    return (torch.stack([index % width, index // width], 1) + 0.5) * TARGET_STRIDE
