"""Mask average precision, computed by pycocotools."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tinysam.eval.bootstrap import Metric

_ALL = 0  # index of the area range "all"


def average_precision(
    dataset: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    *,
    max_detections: int = 100,
    use_categories: bool = True,
    bootstrap_samples: int = 100,
    seed: int = 0,
) -> dict[str, Metric]:
    """COCO's mask AP, with a percentile bootstrap over images.

    Args:
        dataset: COCO's ``images`` (with id, height and width), ``annotations`` and ``categories``. The images are all
            that count: annotations and results of other images are left out.
        results: COCO results: image_id, category_id, segmentation (RLE), score.
        max_detections: masks of one image and category that count, the highest scores first: 100 for COCO's own
            protocol; objects beyond that number cannot be found, so dense data sets need more.
        use_categories: whether a mask must have its object's category.
        bootstrap_samples: resamplings; each accumulates the precision anew, so fewer than for plain means. 0: the
            interval is NaN.
        seed: of the resampling.

    Returns:
        ``ap``, ``ap_50``, ``ap_75``, ``ap_small``, ``ap_medium``, ``ap_large``; NaN where no object is of that size,
        and intervals for ``ap`` alone. ``n`` counts the objects of the size, crowds left out.
    """
    image_ids = {image["id"] for image in dataset["images"]}
    own = (annotation for annotation in dataset["annotations"] if annotation["image_id"] in image_ids)
    # pycocotools takes an object of id 0 for no object.
    annotations = [{"iscrowd": 0, **annotation, "id": number} for number, annotation in enumerate(own, start=1)]
    own_results = [dict(result) for result in results if result["image_id"] in image_ids]
    if all(annotation["iscrowd"] for annotation in annotations):
        nothing = Metric(value=float("nan"), low=float("nan"), high=float("nan"), n=0, images=len(image_ids))
        return dict.fromkeys(("ap", "ap_50", "ap_75", "ap_small", "ap_medium", "ap_large"), nothing)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        evaluation = _evaluate({**dataset, "annotations": annotations}, own_results, max_detections, use_categories)
    precision = evaluation.eval["precision"][..., -1]  # thresholds, recalls, categories, areas
    thresholds = evaluation.params.iouThrs.round(2).tolist()
    values = {  # and the area range that they are about
        "ap": (precision[..., _ALL], _ALL),
        "ap_50": (precision[thresholds.index(0.5), ..., _ALL], _ALL),
        "ap_75": (precision[thresholds.index(0.75), ..., _ALL], _ALL),
        **{f"ap_{name}": (precision[..., area], area) for area, name in enumerate(("small", "medium", "large"), 1)},
    }
    objects = _objects_by_area(evaluation)
    low, high = _interval(evaluation, bootstrap_samples, seed)
    unknown = float("nan")
    return {
        name: Metric(
            value=_mean(value),
            low=low if name == "ap" else unknown,
            high=high if name == "ap" else unknown,
            n=objects[area],
            images=len(image_ids),
        )
        for name, (value, area) in values.items()
    }


def _evaluate(
    dataset: Mapping[str, Any], results: list[dict[str, Any]], max_detections: int, use_categories: bool
) -> COCOeval:
    truth = COCO()
    truth.dataset = {"info": {}, **dataset}
    truth.createIndex()
    for annotation in truth.dataset["annotations"]:
        annotation.setdefault("area", float(mask_utils.area(truth.annToRLE(annotation))))
    found = COCO()
    if results:  # loadRes cannot load none
        found = truth.loadRes(results)
    evaluation = COCOeval(truth, found, "segm")
    evaluation.params.maxDets = [max_detections]
    evaluation.params.useCats = int(use_categories)
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def _objects_by_area(evaluation: COCOeval) -> list[int]:
    counted = np.array([a["area"] for a in evaluation.cocoGt.dataset["annotations"] if not a["iscrowd"]])
    return [int(((counted >= low) & (counted <= high)).sum()) for low, high in evaluation.params.areaRng]


def _interval(evaluation: COCOeval, samples: int, seed: int) -> tuple[float, float]:
    """95 % interval of AP: the images' matches are computed once and accumulated for each resampling of images."""
    if samples == 0:
        return float("nan"), float("nan")
    params = evaluation.params
    images = len(params.imgIds)
    categories = len(params.catIds) if params.useCats else 1
    matches = np.empty(len(evaluation.evalImgs), dtype=object)
    matches[:] = evaluation.evalImgs
    matches = matches.reshape(categories, len(params.areaRng), images)[:, _ALL]
    resampled = copy.copy(evaluation)
    resampled.params = copy.copy(params)
    resampled.params.imgIds = list(range(images))  # a drawn image may occur twice, so it gets a new id
    resampled.params.areaRng, resampled.params.areaRngLbl = params.areaRng[:1], params.areaRngLbl[:1]
    resampled._paramsEval = resampled.params
    rng = np.random.default_rng(seed)
    values = []
    with contextlib.redirect_stdout(io.StringIO()):
        for _ in range(samples):
            resampled.evalImgs = matches[:, rng.integers(0, images, images)].ravel().tolist()
            resampled.accumulate()
            values.append(_mean(resampled.eval["precision"]))
    if np.isnan(values).all():
        return float("nan"), float("nan")
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def _mean(precision: np.ndarray) -> float:
    known = precision[precision > -1]  # -1: no object of that category and size
    return float(known.mean()) if known.size else float("nan")
