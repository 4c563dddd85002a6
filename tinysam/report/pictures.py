"""Small pictures for the page: the photograph, and its masks as a picture of their own to lay over it."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from tinysam.lake.filesystem import LakeError, join
from tinysam.lake.images import ImageError, decode_image
from tinysam.lake.index import read_image_bytes
from tinysam.lake.parquet_file import open_parquet
from tinysam.overlay import mask_layer
from tinysam.report.scan import ImageRef, read_masks

SIDE = 640
"""Longest side of a picture, in pixels."""

REMEDY = "Delete it and run the job that wrote it again."
_SMALLER = 0.75
_SMALLEST_SIDE = 96
_INDEX_COLUMNS = ("image_id", "uri", "offset", "size", "width", "height", "annotations_uri", "shard_id")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What the page shows of one image."""

    image: ImageRef
    photo: str | None
    """``data:`` URL; None where the image cannot be decoded."""
    overlay: str | None
    """``data:`` URL of the masks alone, transparent elsewhere, of the photograph's size; None without masks."""
    width: int
    height: int
    note: str | None
    """Why there is no photograph."""


def make_pictures(
    images: Sequence[ImageRef], rows: Mapping[str, Mapping[str, Any]], *, max_bytes: int
) -> dict[str, Picture]:
    """Reads, decodes, draws and shrinks.

    Args:
        images: which; one that comes twice is read once.
        rows: the index's row of each image.
        max_bytes: for the ``data:`` URLs of all ``images``; each gets the same part, and is made smaller until it fits.

    Returns:
        By ``image_id``.
    """
    unique = list({image.image_id: image for image in images}.values())
    if not unique:
        return {}
    budget = max_bytes // len(images)
    # Each decodes a whole image, so few at a time.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        pictures = pool.map(lambda image: make_picture(image, rows.get(image.image_id), max_bytes=budget), unique)
        return {picture.image.image_id: picture for picture in pictures}


def make_picture(image: ImageRef, row: Mapping[str, Any] | None, *, max_bytes: int) -> Picture:
    """The picture of one image; an image that cannot be read or decoded has a note in its place."""
    if row is None:
        return _without_photo(image, "not in the index")
    try:
        pixels = decode_image(read_image_bytes(row))
    except (ImageError, LakeError) as error:
        return _without_photo(image, str(error))
    masks = read_masks(image) if image.masks else []
    side = SIDE
    while True:
        scale = min(1.0, side / max(pixels.shape[:2]))
        height, width = (max(1, round(length * scale)) for length in pixels.shape[:2])
        photo = _photo(pixels, width, height)
        overlay = _overlay(width, height, masks) if masks else None
        if len(photo) + len(overlay or "") <= max_bytes:
            return Picture(image=image, photo=photo, overlay=overlay, width=width, height=height, note=None)
        if side <= _SMALLEST_SIDE:
            return _without_photo(image, "too detailed for the room that the page has left")
        side = max(_SMALLEST_SIDE, round(side * _SMALLER))


def _without_photo(image: ImageRef, note: str) -> Picture:
    return Picture(image=image, photo=None, overlay=None, width=4, height=3, note=note)


def _photo(pixels: np.ndarray, width: int, height: int) -> str:
    small = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return _data_url(small, quality=74, method=4)


def _overlay(width: int, height: int, masks: Sequence[Mapping[str, Any]]) -> str:
    # Flat colours: without loss they are both sharper and smaller than as a photograph.
    return _data_url(Image.fromarray(mask_layer(height, width, masks)), lossless=True, method=4)


def _data_url(image: Image.Image, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", **options)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def find_rows(index_url: str, image_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The rows of an index for some images, without ever holding more of it than a batch.

    Raises:
        LakeError: if the index cannot be read.
    """
    wanted, rows = pa.array(sorted(set(image_ids)), pa.string()), {}
    with open_parquet(index_url, remedy=REMEDY) as parquet:
        columns = [name for name in _INDEX_COLUMNS if name in parquet.schema_arrow.names]
        for batch in parquet.iter_batches(batch_size=65536, columns=columns):
            for row in batch.filter(pc.is_in(batch["image_id"], value_set=wanted)).to_pylist():
                rows[row["image_id"]] = row
    return rows


def count_rows(index_url: str) -> int:
    """The number of images in an index, from its footer alone.

    Raises:
        LakeError: if the index cannot be read.
    """
    with open_parquet(index_url, remedy=REMEDY) as parquet:
        return int(parquet.metadata.num_rows)


def relocated(row: Mapping[str, Any], lake: str) -> dict[str, Any]:
    """The row of an image whose lake has moved to ``lake``.

    An ``image_id`` is the path within the lake, followed by the member's name for a tar or the row's number for
    parquet: the part of it that the old ``uri`` ends with is the file to open.
    """
    path = str(row["image_id"]).rsplit("#", 1)[0] if str(row["uri"]).endswith(".parquet") else str(row["image_id"])
    parts = path.split("/")
    for length in range(len(parts), 0, -1):
        tail = "/".join(parts[:length])
        if str(row["uri"]).endswith("/" + tail):
            return {**row, "uri": join(lake, tail)}
    return dict(row)
