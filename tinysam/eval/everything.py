"""Everything mode scored against ground truth: class-agnostic average recall and best-match IoU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinysam.eval.masks import Rle, areas, iou_matrix

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""COCO's 0.50:0.05:0.95."""
MAX_DETECTIONS = (10, 100, 1000)
"""At how many masks an image recall is reported; the last is the headline."""
AREA_RANGES = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
"""COCO's area ranges in pixels of the original image; both ends belong to a range, as in pycocotools."""


@dataclass(frozen=True, kw_only=True)
class EverythingScores:
    """One image's everything-mode result, in a form that sums over images."""

    masks: int
    """How many masks were generated."""
    best_iou: np.ndarray
    """(objects,) IoU of each object with the generated mask that fits it best; 0 without masks."""
    objects: np.ndarray
    """(areas,) objects in each of ``AREA_RANGES``."""
    recalled: np.ndarray
    """(areas, max detections) objects that were found, averaged over ``IOU_THRESHOLDS``."""


def score_everything(records: Sequence[Mapping[str, Any]], truths: Sequence[Rle]) -> EverythingScores:
    """Scores a mask generator's records against an image's objects.

    Args:
        records: of ``generate`` with ``output_mode="coco_rle"``: ``segmentation`` and ``predicted_iou`` are read.
        truths: COCO RLEs in the original frame.
    """
    order = np.argsort([-float(record["predicted_iou"]) for record in records], kind="stable")
    ranked = [records[i]["segmentation"] for i in order]
    ious = iou_matrix(ranked, truths)
    object_areas = areas(truths)
    inside = np.array([(object_areas >= low) & (object_areas <= high) for low, high in AREA_RANGES.values()])
    recalled = [_recalled(ious[: MAX_DETECTIONS[-1]], counted) for counted in inside]
    return EverythingScores(
        masks=len(records),
        best_iou=ious.max(axis=0) if len(ranked) else np.zeros(len(truths)),
        objects=inside.sum(axis=1),
        recalled=np.array(recalled),
    )


def match_greedily(ious: np.ndarray, counted: np.ndarray, thresholds: np.ndarray = IOU_THRESHOLDS) -> np.ndarray:
    """COCO's assignment of ranked masks to objects, at every threshold at once.

    Each mask in turn takes the free object that it overlaps most, if by the threshold at least; objects that do not
    count (of another size) are taken only where no counted one is left to take.

    Args:
        ious: (masks, objects), masks by falling score.
        counted: (objects,) bool.
        thresholds: (T,).

    Returns:
        (T, masks) index of the object taken, -1 for none.
    """
    matches = np.full((len(thresholds), len(ious)), -1)
    if not ious.size:
        return matches
    minimum = np.minimum(thresholds, 1 - 1e-10)[:, None]
    free = np.ones((len(thresholds), ious.shape[1]), dtype=bool)
    rows = np.arange(len(thresholds))
    last = ious.shape[1] - 1
    for i in np.flatnonzero((ious >= minimum.min()).any(axis=1)):
        overlaps = np.where(free & (ious[i] >= minimum), ious[i], -1.0)
        preferred = np.where(counted, overlaps, -1.0)
        overlaps = np.where((preferred >= 0).any(axis=1, keepdims=True), preferred, overlaps)
        best = last - overlaps[:, ::-1].argmax(axis=1)  # of equals the last, as in pycocotools
        found = overlaps[rows, best] >= 0
        matches[found, i] = best[found]
        free[rows[found], best[found]] = False
    return matches


def _recalled(ious: np.ndarray, counted: np.ndarray) -> np.ndarray:
    matches = match_greedily(ious, counted)
    hits = (matches >= 0) & np.append(counted, False)[matches]  # -1 reads the appended False
    cumulative = hits.sum(axis=0).cumsum() if hits.shape[1] else np.zeros(1)
    return np.array([cumulative[min(limit, len(cumulative)) - 1] for limit in MAX_DETECTIONS]) / len(IOU_THRESHOLDS)
