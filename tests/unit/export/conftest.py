"""A label job's output with masks of every shape and names of every kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tinysam.lake import schema
from tinysam.lake.rle import encode_rle, rle_area, rle_bbox
from tinysam.lake.shards import SHARDS_FOLDER, write_shard

ODD_NAMES = [
    "a b/c d.png",
    'it\'s "quoted" – ünïcode 日本.png',
    "100%25.png",
    "a#b?c=d&e.png",
    "twin.jpg",
    "twin.png",
    "twin.jpg.png",
    "tars/x.tar/inner/y.jpg",
    "z.parquet#07",
    "../../escape.jpg",
    "/etc/passwd.jpg",
    "a\\..\\..\\escape.jpg",
    "..",
    "nul.txt.jpg",
    "line\nbreak\x00.jpg",
    "long/" + "x" * 300 + ".jpg",
    "long/" + "x" * 301 + ".jpg",
]

MakeMasks = Callable[..., Path]


def masks_of(number: int) -> list[np.ndarray]:
    """Overlapping masks: with a hole, in parts that touch at a corner, at the borders, of one pixel, and empty."""
    rng = np.random.default_rng(number)
    height, width = 9 + number % 5, 12 + number % 3
    ring = np.zeros((height, width), bool)
    ring[1:7, 2:9] = True
    ring[3:5, 4:6] = False
    diagonal = np.eye(height, width, dtype=bool)
    border = np.ones((height, width), bool)
    border[2:-2, 2:-2] = False
    pixel = np.zeros((height, width), bool)
    pixel[-1, -1] = True
    noise = rng.random((height, width)) < 0.5
    return [noise, ring, diagonal, border, pixel, np.zeros((height, width), bool)]


def stored_mask(pixels: np.ndarray, score: float) -> dict[str, Any]:
    rle = encode_rle(pixels)
    return {
        **rle,
        "bbox": rle_bbox(rle),
        "area": rle_area(rle),
        "predicted_iou": score,
        "stability_score": 0.5,
        "point_coords": [[1.5, 2.5]],
    }


@pytest.fixture
def make_masks(tmp_path: Path) -> MakeMasks:
    """A function that writes an output of images with the given masks; one image more has failed."""

    def make(images: Mapping[str, list[np.ndarray]], images_per_shard: int = 3) -> Path:
        output = tmp_path / "labels"
        rows: list[dict[str, Any]] = []
        for name, masks in images.items():
            height, width = masks[0].shape if masks else (5, 7)
            row = {"image_id": name, "uri": f"s3://user:secret@lake/{name}", "status": "ok"}
            stored = [stored_mask(mask, 0.25 * number) for number, mask in enumerate(masks)]
            rows.append(row | {"height": height, "width": width, "masks": stored})
        rows.insert(1, {"image_id": "bad.jpg", "uri": "s3://lake/bad.jpg", "status": "truncated", "error": "cut"})
        for start in range(0, len(rows), images_per_shard):
            table = pa.Table.from_pylist(rows[start : start + images_per_shard], schema=schema.MASKS)
            write_shard(str(output / SHARDS_FOLDER), f"shard-{start:05d}-00000000", table, {})
        return output

    return make


@pytest.fixture
def to_mask() -> Callable[[np.ndarray, float], dict[str, Any]]:
    """A function that makes a row's mask of (H, W) bool and a predicted IoU."""
    return stored_mask


@pytest.fixture
def images() -> dict[str, list[np.ndarray]]:
    """Masks by the odd name of their image; one image has none."""
    return {name: masks_of(number) for number, name in enumerate(ODD_NAMES)} | {"without.jpg": []}
