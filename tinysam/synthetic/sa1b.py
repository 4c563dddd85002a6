"""Ground truth in SA-1B's layout: one JSON beside each image."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from tinysam.lake.filesystem import join, list_files, read_bytes, write_once
from tinysam.lake.rle import decode_rle, rle_area, rle_bbox


def annotation(rle: Mapping[str, Any], annotation_id: int) -> dict[str, Any]:
    """One SA-1B annotation of an exact mask.

    Args:
        rle: COCO run lengths, compressed; ``counts`` str or bytes. The mask must not be empty.
        annotation_id: Unique within the lake by convention.

    Returns:
        SA-1B's keys: ``point_coords`` is the pixel deepest inside, ``predicted_iou`` and ``stability_score`` are 1.
    """
    height, width = (int(side) for side in rle["size"])
    left, top, columns, rows = (int(value) for value in rle_bbox(rle))
    patch = decode_rle(rle)[top : top + rows, left : left + columns]
    depth = ndimage.distance_transform_edt(np.pad(patch, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    counts = rle["counts"].decode("ascii") if isinstance(rle["counts"], bytes) else rle["counts"]
    return {
        "id": annotation_id,
        "segmentation": {"size": [height, width], "counts": counts},
        "bbox": [left, top, columns, rows],
        "area": rle_area(rle),
        "point_coords": [[left + int(x), top + int(y)]],
        "predicted_iou": 1.0,
        "stability_score": 1.0,
        "crop_box": [0, 0, width, height],
    }


def sidecar(file_name: str, image_id: int, size: tuple[int, int], rles: Iterable[Mapping[str, Any]]) -> bytes:
    """The JSON that lies beside image ``file_name`` of ``size`` (height, width) and holds its masks ``rles``."""
    annotations = [annotation(rle, image_id * 1000 + number) for number, rle in enumerate(rles, start=1)]
    image = {"image_id": image_id, "width": size[1], "height": size[0], "file_name": file_name}
    return json.dumps({"image": image, "annotations": annotations}).encode()


def write_png(folder: str, name: str, image_id: int, pixels: np.ndarray, rles: Iterable[Mapping[str, Any]]) -> None:
    """Writes ``name.png`` with (H, W, 3) uint8 ``pixels``, and its masks beside it."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    write_once(join(folder, f"{name}.json"), sidecar(f"{name}.png", image_id, pixels.shape[:2], rles))
    write_once(join(folder, f"{name}.png"), buffer.getvalue())


def write_instances(folder: str) -> str:
    """Writes ``instances.json`` in COCO's form, with one category, from the JSON files beside a folder's images.

    Args:
        folder: Folder or URL in SA-1B's layout, without folders in it.

    Returns:
        Where the file lies.

    Raises:
        LakeError: If the folder cannot be read or written.
    """
    target = join(folder, "instances.json")
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for url in list_files(folder, "*.json"):
        if url.endswith("/instances.json"):
            continue
        content = json.loads(read_bytes(url))
        image = content["image"]
        images.append({**{key: image[key] for key in ("file_name", "width", "height")}, "id": image["image_id"]})
        for record in content["annotations"]:
            place = {"id": len(annotations) + 1, "image_id": image["image_id"], "category_id": 1, "iscrowd": 0}
            annotations.append({**record, **place})
    coco = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]}
    write_once(target, json.dumps(coco).encode())
    return target
