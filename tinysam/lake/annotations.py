"""Ground-truth masks: from what the lake holds to what a training job reads.

Two forms of one mask: COCO run lengths in the original frame (as read), and in the mask frame (as stored in embedding
shards, ``schema.TRAINING_MASK``).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from scipy import ndimage

from tinysam.lake.filesystem import MissingError, read_bytes, redact_url
from tinysam.lake.images import ImageError
from tinysam.lake.patience import patiently
from tinysam.lake.resize import shrink_to_grid
from tinysam.lake.rle import run_lengths
from tinysam.lake.schema import MASK_STRIDE

MIN_AREA = 16.0
"""Default smallest mask in pixels of the input frame: one low-resolution pixel. Our choice."""
MAX_MASKS = 512
"""Default number of masks kept of one image. Our choice."""

_BYTE_RANGE = re.compile(r"^(?P<uri>.*)#bytes=(?P<first>\d+)-(?P<end>\d+)$", re.DOTALL)


def read_annotations(row: Mapping[str, Any], height: int, width: int) -> list[dict[str, Any]] | None:
    """Reads the ground truth of an image: COCO annotations inlined in the index, else the SA-1B JSON beside the image.

    Polygons are rasterised and uncompressed run lengths compressed, both by pycocotools; crowds (``iscrowd`` 1) and
    empty masks are left out.

    Args:
        row: A row of the index.
        height: The decoded image's height.
        width: The decoded image's width.

    Returns:
        COCO run lengths ``{"size": [height, width], "counts": bytes}`` in the original frame; None where the lake has
        no ground truth for the image, and an empty list where it says that there is nothing to find.

    Raises:
        ImageError: ``bad_annotations`` where the masks are damaged, or belong to an image of another size.
        LakeError: If the storage fails.
    """
    if row.get("annotations") is not None:
        annotations = _parse(row["annotations"])
    elif row.get("annotations_uri") is not None:
        annotations = _parse(_read_sidecar(row["annotations_uri"]))
        annotations = annotations.get("annotations") if isinstance(annotations, dict) else annotations
    else:
        return None
    if not isinstance(annotations, list) or not all(isinstance(item, dict) for item in annotations):
        raise ImageError("bad_annotations", "the annotations are not a list of COCO annotations")
    declared = (row.get("height"), row.get("width"))
    if None not in declared and declared != (height, width):
        raise ImageError(
            "bad_annotations",
            f"the annotations are for {declared[1]} x {declared[0]} pixels, the image has {width} x {height}",
        )
    rles = (_to_rle(item.get("segmentation"), height, width) for item in annotations if not item.get("iscrowd"))
    return [rle for rle in rles if rle is not None]


def to_training_masks(
    rles: Sequence[Mapping[str, Any]],
    *,
    input_size: tuple[int, int],
    image_size: int,
    min_area: float = MIN_AREA,
    max_masks: int = MAX_MASKS,
) -> list[dict[str, Any]]:
    """Brings masks into the model's frame.

    A mask-frame pixel is set where the mask covers more than half of it, by exact area, and in every other place where
    it covers half (``shrink_to_grid``). Masks that set no pixel or have less than ``min_area`` are left out.

    Args:
        rles: COCO run lengths in the original frame, of one image.
        input_size: (height, width) of the input frame, before padding.
        image_size: The model's; the mask frame is ``image_size // MASK_STRIDE`` squared.
        min_area: Smallest mask to keep, in pixels of the input frame.
        max_masks: Most masks to keep; of more, as many are kept of each size, evenly over the order of areas.

    Returns:
        Dicts of ``schema.TRAINING_MASK``: ``size`` [h, w] of the mask frame, ``counts`` bytes, ``bbox`` XYWH and
        ``area`` in the input frame (of the original mask, not of its rounding to the mask frame), ``point_coords``
        one (x, y) in the input frame, the centre of the mask-frame pixel deepest inside.
    """
    side = image_size // MASK_STRIDE
    masks = []
    for rle in rles:
        height, width = rle["size"]
        scale_y, scale_x = input_size[0] / height, input_size[1] / width
        area = float(coco_mask.area(rle)) * scale_y * scale_x
        if area < min_area:
            continue
        top, left, patch = shrink_to_grid(rle, input_size, MASK_STRIDE)
        if not patch.any():
            continue
        point_y, point_x = _deepest(patch)
        x, y, w, h = (float(value) for value in coco_mask.toBbox(rle))
        canvas = np.zeros((side, side), dtype=np.uint8, order="F")
        canvas[top : top + patch.shape[0], left : left + patch.shape[1]] = patch
        masks.append(
            {
                "size": [side, side],
                "counts": coco_mask.encode(canvas)["counts"],
                "bbox": [x * scale_x, y * scale_y, w * scale_x, h * scale_y],
                "area": area,
                "point_coords": [[(left + point_x + 0.5) * MASK_STRIDE, (top + point_y + 0.5) * MASK_STRIDE]],
            }
        )
    return _thin_out(masks, max_masks)


def _read_sidecar(uri: str) -> bytes:
    try:
        if match := _BYTE_RANGE.match(uri):
            first, end = int(match["first"]), int(match["end"])
            return patiently(lambda: read_bytes(match["uri"], first, end - first))
        return patiently(lambda: read_bytes(uri))
    except MissingError as error:
        raise ImageError("bad_annotations", f"{redact_url(uri)} is gone since the lake was indexed") from error


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ImageError("bad_annotations", f"the annotations are not JSON: {error}") from error


def _to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any] | None:
    """Makes COCO run lengths of a polygon list or of run lengths in either form; None for an empty mask."""
    if isinstance(segmentation, list):
        polygons = [_check_polygon(polygon, height, width) for polygon in segmentation]
        polygons = [polygon for polygon in polygons if polygon]
        if not polygons:
            return None
        rle = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    elif isinstance(segmentation, dict):
        rle = _check_rle(segmentation, height, width)
    else:
        raise ImageError("bad_annotations", f"a segmentation is a {type(segmentation).__name__}")
    return rle if coco_mask.area(rle) else None


def _check_polygon(polygon: Any, height: int, width: int) -> list[float]:
    values = np.asarray(polygon, dtype=object)
    if values.ndim != 1 or values.size % 2 or not all(isinstance(v, int | float) for v in values):
        raise ImageError("bad_annotations", "a polygon is not a flat list of x, y pairs")
    # pycocotools walks along each edge pixel by pixel, so a stray coordinate of 1e12 would never return.
    limit = 10 * max(height, width)
    if not all(math.isfinite(v) and abs(v) <= limit for v in values):
        raise ImageError("bad_annotations", "a polygon lies far outside the image")
    # Fewer than three corners have no area; four numbers would be taken for a box.
    return [float(v) for v in values] if values.size >= 6 else []


def _check_rle(rle: Mapping[str, Any], height: int, width: int) -> dict[str, Any]:
    size, counts = rle.get("size"), rle.get("counts")
    if size != [height, width]:
        raise ImageError("bad_annotations", f"a mask is of size {size}, the image of size {[height, width]}")
    try:
        runs = np.asarray(counts, dtype=np.int64) if isinstance(counts, list) else run_lengths(counts or "")
    except (ValueError, TypeError, OverflowError) as error:
        raise ImageError("bad_annotations", f"run lengths cannot be read: {error}") from error
    if runs.ndim != 1 or (runs < 0).any() or runs.sum() != height * width:
        raise ImageError("bad_annotations", f"run lengths add up to {runs.sum()}, not to {height} x {width}")
    if isinstance(counts, list):
        if runs.min() >= 1 << 24:
            # Where all numbers are as long as this, pycocotools writes past its buffer. Two empty runs make room.
            runs = np.concatenate([[0, 0], runs])
        return coco_mask.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)
    return {"size": [height, width], "counts": counts.encode("ascii") if isinstance(counts, str) else counts}


def _deepest(patch: np.ndarray) -> tuple[int, int]:
    """Finds the (row, column) of a patch farthest from any background; outside the patch all is background."""
    distance = ndimage.distance_transform_edt(np.pad(patch, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(int(distance.argmax()), patch.shape)
    return int(row), int(column)


def _thin_out(masks: list[dict[str, Any]], max_masks: int) -> list[dict[str, Any]]:
    if len(masks) <= max_masks:
        return masks
    by_area = sorted(range(len(masks)), key=lambda i: (masks[i]["area"], i))
    kept = {by_area[i] for i in np.linspace(0, len(masks) - 1, max_masks).round().astype(int)}
    return [mask for i, mask in enumerate(masks) if i in kept]
