"""LVIS's mask average precision, computed by lvis-api."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tinysam.eval.bootstrap import Metric
from tinysam.lake.filesystem import LakeError, read_bytes, redact_url

_NAMES = {
    "AP": "ap",
    "AP50": "ap_50",
    "AP75": "ap_75",
    "APs": "ap_small",
    "APm": "ap_medium",
    "APl": "ap_large",
    "APr": "ap_rare",
    "APc": "ap_common",
    "APf": "ap_frequent",
}


class LvisError(Exception):
    """lvis-api is not installed; the message says how to install it."""


def require_lvis() -> Any:
    """The package ``lvis``.

    Raises:
        LvisError: if it is not installed.
    """
    try:
        import lvis
    except ImportError as error:
        raise LvisError(f"LVIS's AP needs lvis-api ({error}): pip install 'tinysam[lvis]'") from error
    return lvis


def read_lvis(url: str) -> dict[str, Any]:
    """Reads LVIS annotations.

    Raises:
        LakeError: if the file cannot be read, or is COCO's and lacks what LVIS adds.
    """
    try:
        dataset = json.loads(read_bytes(url))
        complete = all("neg_category_ids" in image for image in dataset["images"])
        complete &= all("frequency" in category for category in dataset["categories"])
    except (ValueError, TypeError, KeyError) as error:
        raise LakeError(f"{redact_url(url)} is not an annotation file ({type(error).__name__}: {error})") from error
    if not complete:
        raise LakeError(
            f"{redact_url(url)} is not LVIS's: its images need neg_category_ids and its categories frequency. "
            "Leave --protocol out for COCO's AP."
        )
    return dataset


def lvis_average_precision(
    dataset: Mapping[str, Any], results: Sequence[Mapping[str, Any]], *, image_ids: Collection[int]
) -> dict[str, Metric]:
    """LVIS's mask AP: up to 300 masks an image, and only the categories count that an image was checked for.

    Args:
        dataset: of ``read_lvis``.
        results: COCO results with LVIS's image ids: image_id, category_id, segmentation (RLE), score.
        image_ids: the images to evaluate on.

    Returns:
        ``ap``, ``ap_50``, ``ap_75``, ``ap_small``, ``ap_medium``, ``ap_large``, and by how frequent a category is
        ``ap_rare``, ``ap_common``, ``ap_frequent``; NaN where nothing is of that kind. There are no intervals.

    Raises:
        LvisError: if lvis-api is not installed.
    """
    lvis = require_lvis()
    wanted = set(image_ids)
    chosen: dict[str, Any] = {
        **dataset,
        "images": [image for image in dataset["images"] if image["id"] in wanted],
        "annotations": [annotation for annotation in dataset["annotations"] if annotation["image_id"] in wanted],
    }
    values = dict.fromkeys(_NAMES, float("nan"))
    if chosen["annotations"]:
        found = [dict(result) for result in results] or [_nothing(chosen)]
        with _quiet(), _numpy_float():
            truth = _in_memory(lvis.LVIS, chosen)
            evaluation = lvis.LVISEval(truth, lvis.LVISResults(truth, found), "segm")
            evaluation.run()
        values = {name: evaluation.results[name] for name in _NAMES}
    objects = len(chosen["annotations"])
    return {
        ours: Metric(
            value=float("nan") if values[theirs] < 0 else float(values[theirs]),  # -1: nothing of that kind
            low=float("nan"),
            high=float("nan"),
            n=objects,
            images=len(chosen["images"]),
        )
        for theirs, ours in _NAMES.items()
    }


def _nothing(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """A mask of no pixel and no confidence: lvis-api cannot read an empty list of results."""
    image = dataset["images"][0]
    empty = {"size": [image["height"], image["width"]], "counts": _empty_counts(image["height"], image["width"])}
    category = dataset["annotations"][0]["category_id"]
    return {"image_id": image["id"], "category_id": category, "segmentation": empty, "score": 0.0}


def _empty_counts(height: int, width: int) -> str:
    from pycocotools import mask as mask_utils

    return mask_utils.encode(np.zeros((height, width), np.uint8, order="F"))["counts"].decode("ascii")


def _in_memory(kind: Any, dataset: dict[str, Any]) -> Any:
    """An ``LVIS`` of a data set that is read already: its constructor takes a path on the local disk alone."""
    truth = kind.__new__(kind)
    truth.logger, truth.dataset = logging.getLogger("lvis"), dataset
    truth._create_index()
    return truth


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("lvis.lvis", "lvis.results", "lvis.eval", "lvis")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _numpy_float() -> Iterator[None]:
    """Lends NumPy the alias ``np.float``, which it has dropped and lvis-api 0.5.3 still uses."""
    if "float" in vars(np):
        yield
        return
    np.float = float  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del np.float  # type: ignore[attr-defined]
