"""Objects with their categories, and the link between a lake's images and a COCO file's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from tinysam.eval.masks import Rle
from tinysam.lake.annotations import read_annotations
from tinysam.lake.coco import CocoFile

NO_CATEGORY = 1
"""Category id of every object where the ground truth has no categories, as in SA-1B's layout."""


@dataclass(frozen=True, kw_only=True)
class Objects:
    """The ground truth of an image, without crowds and empty masks."""

    rles: list[Rle]
    """Masks in the original frame."""
    categories: list[int]
    """Category id of each."""


def read_objects(row: Mapping[str, Any], height: int, width: int) -> Objects | None:
    """``read_annotations`` with categories; None where the lake has no ground truth for the image.

    Args:
        row: of the index.
        height: of the decoded image.
        width: of the decoded image.

    Raises:
        ImageError, LakeError: see ``read_annotations``.
    """
    if row.get("annotations") is None:
        rles = read_annotations(row, height, width)
        return None if rles is None else Objects(rles=rles, categories=[NO_CATEGORY] * len(rles))
    objects = Objects(rles=[], categories=[])
    for annotation in json.loads(row["annotations"]):
        # One at a time, since read_annotations leaves some out and does not say which.
        found = read_annotations({**row, "annotations": json.dumps([annotation]).encode()}, height, width) or []
        objects.rles.extend(found)
        objects.categories.extend([annotation.get("category_id", NO_CATEGORY)] * len(found))
    return objects


def coco_image_ids(coco: CocoFile, index: pa.Table) -> dict[str, Any]:
    """COCO's id of each image of a lake that the file names: by ``image_id`` of the lake.

    Raises:
        LakeError: if the file names none of them.
    """
    # The index keeps an image's annotations but not its COCO id, which images without objects have as well.
    ids = replace(coco, annotations={entry["id"]: [{"id": entry["id"]}] for entry in coco.images.values()})
    matched = ids.attach_to(index).select(["image_id", "annotations"]).to_pylist()
    return {row["image_id"]: json.loads(row["annotations"])[0]["id"] for row in matched if row["annotations"]}
