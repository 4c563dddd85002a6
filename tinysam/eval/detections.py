"""A detector's boxes: from COCO's results JSON to a table that workers read their own images' part of."""

from __future__ import annotations

import collections
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tinysam.lake.filesystem import LakeError, explained, open_filesystem, read_bytes, redact_url, write_once

DETECTIONS = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),  # the lake's
        pa.field("category_id", pa.int64(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
        pa.field("bbox", pa.list_(pa.float64(), 4), nullable=False),  # XYXY, original frame
    ]
)
_ROW_GROUP = 16_384  # a shard's images lie in one or two of them


def read_results(url: str, image_ids: Mapping[str, Any]) -> pa.Table:
    """Reads COCO results.

    Args:
        url: JSON list of ``image_id``, ``category_id``, ``bbox`` (XYWH) and ``score``; masks in it are not used.
        image_ids: COCO's id by the lake's ``image_id``. Results of other images are left out.

    Returns:
        ``DETECTIONS``, sorted by image, and by falling score within it.

    Raises:
        LakeError: if it cannot be read, is not such a list, or names none of the images.
    """
    lake_ids = {coco_id: image_id for image_id, coco_id in image_ids.items()}
    columns: dict[str, list[Any]] = {name: [] for name in DETECTIONS.names}
    try:
        for result in json.loads(read_bytes(url)):
            x, y, width, height = (float(value) for value in result["bbox"])
            box, score = [x, y, x + width, y + height], float(result["score"])
            if not np.isfinite([*box, score]).all():
                raise ValueError(f"a box or score is not finite: {result['bbox']}, {score}")
            if result["image_id"] in lake_ids:
                row = (lake_ids[result["image_id"]], result["category_id"], score, box)
                for values, value in zip(columns.values(), row, strict=True):
                    values.append(value)
        table = pa.table(columns, schema=DETECTIONS)
    except (ValueError, TypeError, KeyError, pa.ArrowException) as error:
        raise LakeError(
            f"{redact_url(url)} is not a COCO results file ({type(error).__name__}: {error}). It needs a list of "
            "image_id, category_id, bbox and score."
        ) from error
    if not table.num_rows:
        raise LakeError(f"{redact_url(url)} has no box for any of the images: check that it belongs to --annotations")
    return table.sort_by([("image_id", "ascending"), ("score", "descending")])


def write_detections(url: str, table: pa.Table) -> None:
    """Writes the table in row groups that let a worker read a few images' boxes alone.

    Raises:
        LakeError: if the storage refuses.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=_ROW_GROUP)
    write_once(url, sink.getvalue().to_pybytes())


def read_detections(url: str, image_ids: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The boxes of some images: rows of ``DETECTIONS`` by image, highest score first; images without any are absent.

    Raises:
        LakeError: if the table cannot be read.
    """
    fs, path = open_filesystem(url)
    with explained(url), fs.open(path, "rb") as file:
        table = pq.read_table(file, filters=[("image_id", "in", list(image_ids))])
    boxes = collections.defaultdict(list)
    for row in table.to_pylist():
        boxes[row["image_id"]].append(row)
    return dict(boxes)
