"""COCO's ``instances.json``: https://cocodataset.org/#format-data, and the variant that CVAT imports.

The file is written while the shards are read. COCO wants all images before or after all annotations, so annotations
wait in a temporary file on the local disk, never in memory.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

from tinysam.export.labels import LabelledImage
from tinysam.lake.filesystem import write_stream_once
from tinysam.lake.rle import rle_to_uncompressed

CATEGORY = {"id": 1, "name": "object", "supercategory": ""}
"""Everything mode knows objects, and not what they are."""


def write_coco(images: Iterable[LabelledImage], url: str) -> None:
    """Writes masks as compressed run lengths, as pycocotools reads them, with SAM's scores beside.

    ``file_name`` is the ``image_id``: the path relative to the lake.

    Raises:
        LakeError: If the storage refuses.
    """
    _write(images, url, _coco_annotation)


def write_cvat(images: Iterable[LabelledImage], url: str) -> None:
    """Writes masks as CVAT's import "COCO 1.0" reads them: uncompressed run lengths, marked as ``iscrowd``.

    Raises:
        LakeError: If the storage refuses.
    """
    _write(images, url, _cvat_annotation)


def _write(
    images: Iterable[LabelledImage], url: str, to_annotation: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    with tempfile.TemporaryFile() as annotations:

        def fill(file: BinaryIO) -> None:
            file.write(b'{"info": {"description": "Masks by TinySAM"},\n"categories": [')
            file.write(_line(CATEGORY) + b'],\n"images": [')
            number = 0
            for image in images:
                file.write(b"\n" if image.number == 1 else b",\n")
                file.write(_line(_image(image)))
                for mask in image.masks:
                    number += 1
                    annotations.write(b"\n" if number == 1 else b",\n")
                    identity = {"id": number, "image_id": image.number, "category_id": CATEGORY["id"]}
                    annotations.write(_line(identity | to_annotation(mask)))
            file.write(b'],\n"annotations": [')
            annotations.seek(0)
            shutil.copyfileobj(annotations, file)
            file.write(b"]}\n")

        write_stream_once(url, fill)


def _image(image: LabelledImage) -> dict[str, Any]:
    return {"id": image.number, "file_name": image.image_id, "height": image.height, "width": image.width}


def _coco_annotation(mask: dict[str, Any]) -> dict[str, Any]:
    scores = {name: mask[name] for name in ("predicted_iou", "stability_score", "point_coords")}
    segmentation = {"size": mask["size"], "counts": mask["counts"]}
    return {"segmentation": segmentation, "area": mask["area"], "bbox": mask["bbox"], "iscrowd": 0, **scores}


def _cvat_annotation(mask: dict[str, Any]) -> dict[str, Any]:
    scores = {name: mask[name] for name in ("predicted_iou", "stability_score")}
    return {
        "segmentation": rle_to_uncompressed(mask),
        "area": mask["area"],
        "bbox": mask["bbox"],
        "iscrowd": 1,
        "attributes": {"occluded": False, **scores},
    }


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
