"""From the rows that the evaluation job wrote to the metrics of a data set."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from tinysam.eval.average_precision import average_precision
from tinysam.eval.bootstrap import Metric
from tinysam.eval.image import ImageScores
from tinysam.eval.lvis import lvis_average_precision
from tinysam.eval.rows import from_row
from tinysam.eval.summary import summarize
from tinysam.lake import schema
from tinysam.lake.filesystem import join, list_files
from tinysam.lake.shards import SHARDS_FOLDER, read_shard

_READERS = 8  # shards read at a time: object storage takes tens of milliseconds for each request

PROTOCOLS = {"multimask": "", "singlemask": "_single"}
"""Which of the decoder's masks is taken, and the ending of its metrics' names."""


@dataclass(frozen=True, kw_only=True)
class Lvis:
    """What LVIS's AP needs to know."""

    dataset: Mapping[str, Any]
    """Of ``read_lvis``."""
    image_ids: Mapping[str, int]
    """LVIS's id by the lake's ``image_id``."""


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """What a folder of rows says."""

    metrics: dict[str, Metric]
    """By name: see ``summarize`` and ``average_precision``; AP of the single-mask output ends in ``_single``."""
    images: int
    """Images with ground truth, which the metrics are about."""
    without_ground_truth: int
    """Images that were left out for want of it."""
    statuses: dict[str, int]
    """All images by status."""


def read_scores(folder_url: str) -> tuple[Iterator[dict[str, Any]], Callable[[], dict[str, list[dict[str, Any]]]]]:
    """What ``reduce_scores`` takes, from the output of one checkpoint; both read when they are asked.

    Args:
        folder_url: with ``shards/`` (rows of ``tinysam.eval.rows.SCORES``) and the ``index.parquet`` of the run.

    Raises:
        LakeError: from either, if a file cannot be read.
    """
    return _rows(folder_url), partial(_annotations, folder_url)


def reduce_scores(
    rows: Iterable[Mapping[str, Any]],
    annotations: Callable[[], Mapping[str, list[dict[str, Any]]]],
    *,
    max_detections: int = 100,
    bootstrap_samples: int = 1000,
    ap_bootstrap_samples: int = 100,
    lvis: Lvis | None = None,
) -> Reduction:
    """Reduces the scores of one checkpoint.

    Args:
        rows: of ``tinysam.eval.rows.SCORES``, one an image.
        annotations: gives COCO annotations by ``image_id``, crowds included, if AP is computed; see ``coco_dataset``.
        max_detections: see ``average_precision``.
        bootstrap_samples: resamplings of the means.
        ap_bootstrap_samples: resamplings of AP.
        lvis: LVIS's definition of AP instead of COCO's, to which ``max_detections`` and ``ap_bootstrap_samples`` do
            not apply.

    Raises:
        LvisError: if ``lvis`` is asked for and lvis-api is not installed.
    """
    statuses: collections.Counter[str] = collections.Counter()
    without_ground_truth = 0
    scores: list[ImageScores] = []
    segmented: list[dict[str, Any]] = []
    for row in rows:
        statuses[row["status"]] += 1
        if row["status"] != schema.OK:
            continue
        if row["objects"] is None:
            without_ground_truth += 1
            continue
        scores.append(from_row(row))
        if row["predictions"] is not None:
            segmented.append({name: row[name] for name in ("image_id", "height", "width", "objects", "predictions")})
    metrics = summarize(scores, bootstrap_samples=bootstrap_samples)
    if segmented and lvis is not None:
        for protocol, ending in PROTOCOLS.items():
            numbers = [lvis.image_ids[row["image_id"]] for row in segmented]
            found = lvis_average_precision(
                lvis.dataset, coco_results(segmented, protocol, numbers), image_ids=set(numbers)
            )
            metrics |= {f"{name}{ending}": metric for name, metric in found.items()}
    elif segmented:
        dataset = coco_dataset(segmented, annotations())
        for protocol, ending in PROTOCOLS.items():
            found = average_precision(
                dataset,
                coco_results(segmented, protocol),
                max_detections=max_detections,
                bootstrap_samples=ap_bootstrap_samples,
            )
            metrics |= {f"{name}{ending}": metric for name, metric in found.items()}
    return Reduction(
        metrics=metrics,
        images=len(scores),
        without_ground_truth=without_ground_truth,
        statuses=dict(sorted(statuses.items())),
    )


def coco_dataset(rows: Sequence[Mapping[str, Any]], annotations: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """A COCO data set of the rows' images, numbered from 1 in their order.

    Args:
        rows: of ``SCORES``, all with ground truth.
        annotations: COCO annotations by ``image_id``, crowds included. Images that are not in it have the rows'
            objects.
    """
    found = []
    for number, row in enumerate(rows, start=1):
        own = annotations.get(row["image_id"])
        if own is None:
            size = [row["height"], row["width"]]
            own = [
                {"category_id": item["category_id"], "segmentation": {"size": size, "counts": item["counts"]}}
                for item in row["objects"]
            ]
        found += [{**annotation, "image_id": number} for annotation in own]
    categories = {annotation["category_id"] for annotation in found}
    categories |= {prediction["category_id"] for row in rows for prediction in row["predictions"]}
    return {
        "images": [
            {"id": number, "height": row["height"], "width": row["width"]} for number, row in enumerate(rows, start=1)
        ],
        "annotations": found,
        "categories": [{"id": category} for category in sorted(categories)],
    }


def coco_results(
    rows: Sequence[Mapping[str, Any]], protocol: str, numbers: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """The rows' predictions as COCO results.

    The score is the detector's, where there was one, as in the papers; else the predicted IoU.

    Args:
        rows: of ``SCORES``.
        protocol: of ``PROTOCOLS``.
        numbers: ids of the rows' images; by default as ``coco_dataset`` numbers them.
    """
    numbers = range(1, len(rows) + 1) if numbers is None else numbers
    return [
        {
            "image_id": number,
            "category_id": prediction["category_id"],
            "segmentation": {"size": [row["height"], row["width"]], "counts": prediction[f"{protocol}_counts"]},
            "score": prediction[f"{protocol}_score"] if prediction["box_score"] is None else prediction["box_score"],
        }
        for number, row in zip(numbers, rows, strict=True)
        for prediction in row["predictions"]
    ]


def _rows(folder_url: str) -> Iterator[dict[str, Any]]:
    urls = list_files(join(folder_url, SHARDS_FOLDER), "*.parquet")
    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(urls), _READERS):  # a few at a time: predictions take memory
            for table in pool.map(read_shard, urls[start : start + _READERS]):
                yield from table.to_pylist()


def _annotations(folder_url: str) -> dict[str, list[dict[str, Any]]]:
    index: Iterable[dict[str, Any]] = read_shard(
        join(folder_url, "index.parquet"), columns=["image_id", "annotations"]
    ).to_pylist()
    return annotations_by_image(index)


def annotations_by_image(index: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """COCO annotations by ``image_id``, of the index rows that have any."""
    return {row["image_id"]: json.loads(row["annotations"]) for row in index if row["annotations"] is not None}
