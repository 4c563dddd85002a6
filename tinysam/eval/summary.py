"""From scores per image to metrics of a data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tinysam.eval.bootstrap import Metric, ratio_metric
from tinysam.eval.everything import AREA_RANGES, MAX_DETECTIONS

if TYPE_CHECKING:
    from tinysam.eval.image import ImageScores

METRICS = {
    "box_miou": "box mIoU, multi-mask output of highest predicted IoU",
    "box_miou_single": "box mIoU, single-mask output",
    "click_miou_1": "mIoU after one click",
    "ar_1000": "everything mode: average recall with up to 1000 masks",
    "best_match_miou": "everything mode: mIoU of the best-fitting mask of each object",
    "masks_per_image": "everything mode: masks generated for an image",
}
"""What the headline metrics are called and mean."""


def summarize(scores: Sequence[ImageScores], *, bootstrap_samples: int = 1000, seed: int = 0) -> dict[str, Metric]:
    """Metrics over all objects of all images, with bootstrap intervals over images.

    Keys, as far as the tasks were run: ``box_miou``, ``box_miou_single``, ``click_miou_K`` for each K,
    ``best_match_miou``, ``ar_10``, ``ar_100``, ``ar_1000``, ``ar_1000_small`` (``_medium``, ``_large``),
    ``masks_per_image``.
    """
    terms: dict[str, list[tuple[float, float]]] = {}
    for score in scores:
        for name, numerator, denominator in _terms(score):
            terms.setdefault(name, []).append((numerator, denominator))
    metrics = {}
    for name, pairs in terms.items():
        numerators, denominators = np.array(pairs, dtype=np.float64).T
        metrics[name] = ratio_metric(numerators, denominators, samples=bootstrap_samples, seed=seed)
    return metrics


def _terms(score: ImageScores) -> Iterator[tuple[str, float, float]]:
    objects = len(score.areas)
    if score.box_multimask_iou is not None:
        yield "box_miou", float(score.box_multimask_iou.sum()), objects
    if score.box_singlemask_iou is not None:
        yield "box_miou_single", float(score.box_singlemask_iou.sum()), objects
    if score.click_iou is not None:
        for k, total in enumerate(score.click_iou.sum(axis=0), start=1):
            yield f"click_miou_{k}", float(total), objects
    if score.everything is not None:
        found = score.everything
        yield "best_match_miou", float(found.best_iou.sum()), objects
        for a, area in enumerate(AREA_RANGES):
            for m, limit in enumerate(MAX_DETECTIONS):
                if area == "all" or limit == MAX_DETECTIONS[-1]:
                    suffix = "" if area == "all" else f"_{area}"
                    yield f"ar_{limit}{suffix}", float(found.recalled[a, m]), float(found.objects[a])
        yield "masks_per_image", float(found.masks), 1.0
