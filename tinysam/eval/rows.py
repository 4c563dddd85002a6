"""Scores as rows of a table: what the evaluation job writes, and reduces in the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from tinysam.eval.everything import AREA_RANGES, MAX_DETECTIONS, EverythingScores
from tinysam.eval.image import ImageScores
from tinysam.eval.masks import Rle

_OBJECT = pa.struct(
    [
        pa.field("counts", pa.string()),  # COCO run lengths, original frame
        pa.field("category_id", pa.int64()),  # 1 where the ground truth knows none
    ]
)
_PREDICTION = pa.struct(
    [
        pa.field("category_id", pa.int64()),
        pa.field("box_score", pa.float64()),  # the detector's; null for a box of the ground truth
        pa.field("multimask_counts", pa.string()),
        pa.field("multimask_score", pa.float32()),  # predicted IoU
        pa.field("singlemask_counts", pa.string()),
        pa.field("singlemask_score", pa.float32()),
    ]
)
_EVERYTHING = pa.struct(
    [
        pa.field("masks", pa.int32()),
        pa.field("best_iou", pa.list_(pa.float64())),  # by object
        pa.field("objects", pa.list_(pa.int32())),  # by area range
        pa.field("recalled", pa.list_(pa.float64())),  # area ranges x max detections, row by row
    ]
)
SCORES = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("height", pa.int32()),  # original frame
        pa.field("width", pa.int32()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("objects", pa.list_(_OBJECT)),  # null where the lake has no ground truth for the image
        pa.field("areas", pa.list_(pa.float64())),  # by object, as all lists of IoUs
        pa.field("box_multimask_iou", pa.list_(pa.float64())),
        pa.field("box_singlemask_iou", pa.list_(pa.float64())),
        pa.field("click_iou", pa.list_(pa.list_(pa.float64()))),  # by click, then by object
        pa.field("everything", _EVERYTHING),
        pa.field("predictions", pa.list_(_PREDICTION)),  # of the boxes: the detector's, else the objects'
    ]
)
"""One row an image. IoUs are float64, so that a summary of the rows equals one of the scores."""


def to_row(
    scores: ImageScores,
    truths: Sequence[Rle],
    categories: Sequence[int],
    detections: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """The part of a row that holds the results.

    Args:
        scores: of the image.
        truths: its objects, none of them empty.
        categories: category ids of the objects.
        detections: the detector's boxes that were segmented, with ``category_id`` and ``score``; None where the
            objects' own boxes were.
    """
    row: dict[str, Any] = {
        "objects": [
            {"counts": _text(truth["counts"]), "category_id": category}
            for truth, category in zip(truths, categories, strict=True)
        ],
        "areas": scores.areas,
        "box_multimask_iou": scores.box_multimask_iou,
        "box_singlemask_iou": scores.box_singlemask_iou,
    }
    if scores.click_iou is not None:
        row["click_iou"] = list(scores.click_iou.T)
    if scores.everything is not None:
        found = scores.everything
        row["everything"] = {
            "masks": found.masks,
            "best_iou": found.best_iou,
            "objects": found.objects,
            "recalled": found.recalled.ravel(),
        }
    if scores.box_predictions is not None:
        boxes = [{"category_id": c, "score": None} for c in categories] if detections is None else detections
        predictions = scores.box_predictions
        row["predictions"] = [
            {
                "category_id": box["category_id"],
                "box_score": box["score"],
                "multimask_counts": _text(predictions.multimask[i]["counts"]),
                "multimask_score": predictions.multimask_scores[i],
                "singlemask_counts": _text(predictions.singlemask[i]["counts"]),
                "singlemask_score": predictions.singlemask_scores[i],
            }
            for i, box in enumerate(boxes)
        ]
    return row


def from_row(row: Mapping[str, Any]) -> ImageScores:
    """The scores in a row whose ``objects`` are not null, without the masks of its predictions."""
    click_iou = everything = None
    if row["click_iou"] is not None:
        click_iou = np.array(row["click_iou"], dtype=np.float64).T
    if row["everything"] is not None:
        found = row["everything"]
        everything = EverythingScores(
            masks=found["masks"],
            best_iou=np.array(found["best_iou"], dtype=np.float64),
            objects=np.array(found["objects"]),
            recalled=np.array(found["recalled"]).reshape(len(AREA_RANGES), len(MAX_DETECTIONS)),
        )
    return ImageScores(
        areas=np.array(row["areas"], dtype=np.float64),
        box_multimask_iou=_optional(row["box_multimask_iou"]),
        box_singlemask_iou=_optional(row["box_singlemask_iou"]),
        click_iou=click_iou,
        everything=everything,
    )


def _optional(values: Sequence[float] | None) -> np.ndarray | None:
    return None if values is None else np.array(values, dtype=np.float64)


def _text(counts: bytes | str) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts
