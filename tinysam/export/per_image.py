"""Formats with a file for each image."""

from __future__ import annotations

import io
import json

import numpy as np
from PIL import Image

from tinysam.export.labels import ExportError, LabelledImage
from tinysam.export.outline import outline
from tinysam.lake.rle import decode_rle

MAX_LABELS = 65_535
"""Masks that a label map of 16 bits can tell apart."""


def to_sa1b(image: LabelledImage, file_name: str) -> bytes:
    """One JSON as SA-1B has it beside each image: https://github.com/facebookresearch/segment-anything#dataset."""
    names = ("bbox", "area", "predicted_iou", "stability_score", "point_coords")
    annotations = [
        {"id": number, "segmentation": {"size": mask["size"], "counts": mask["counts"]}, **{n: mask[n] for n in names}}
        for number, mask in enumerate(image.masks, start=1)
    ]
    about = {"image_id": image.number, "file_name": file_name, "height": image.height, "width": image.width}
    return json.dumps({"image": about, "annotations": annotations}, ensure_ascii=False, allow_nan=False).encode()


def to_yolo(image: LabelledImage) -> bytes:
    """Lines of YOLO segmentation: the class 0, then x and y of each corner of the outline as parts of the image's size.

    https://docs.ultralytics.com/datasets/segment. Ultralytics trains on one polygon an object, so holes and parts are
    joined by lines; see ``outline``. Empty masks have no line.
    """
    lines = []
    for mask in image.masks:
        corners = outline(decode_rle(mask)) / (image.width, image.height)
        if len(corners):
            lines.append(" ".join(["0", *(f"{value:.9g}" for value in corners.ravel().tolist())]))
    return "".join(f"{line}\n" for line in lines).encode()


def to_label_map(image: LabelledImage) -> bytes:
    """A PNG of 16-bit numbers: n where the image's n-th mask is, 0 where none is.

    Where masks overlap, the smaller one shows; of equals, the first.

    Raises:
        ExportError: If there are more masks than numbers.
    """
    if len(image.masks) > MAX_LABELS:
        raise ExportError(f"{image.image_id} has {len(image.masks)} masks; a label map holds {MAX_LABELS}.")
    labels = np.zeros((image.height, image.width), np.uint16)
    for number in sorted(range(len(image.masks)), key=lambda i: (-image.masks[i]["area"], -i)):
        labels[decode_rle(image.masks[number])] = number + 1
    buffer = io.BytesIO()
    Image.fromarray(labels).save(buffer, "PNG")
    return buffer.getvalue()
