"""Masks and exports in tools that know nothing of this project, where they are installed: they are not in the lock."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from tinysam.export import export

Images = dict[str, list[np.ndarray]]


@pytest.fixture
def labels(make_masks: Callable[..., Path], images: Images) -> Path:
    """A label job's output."""
    return make_masks(images)


def decoded(mask: dict[str, object]) -> np.ndarray:
    return coco_mask.decode({"size": mask["size"], "counts": mask["counts"]}).astype(bool)


def test_duckdb_queries_the_shards_as_they_are(labels: Path, images: Images) -> None:
    duckdb = pytest.importorskip("duckdb")
    shards = str(labels / "shards" / "*.parquet")
    counts = duckdb.sql(f"select status, count(*) from read_parquet('{shards}') group by status").fetchall()
    assert dict(counts) == {"ok": len(images), "truncated": 1}
    found = duckdb.sql(
        f"select image_id, unnest(masks, recursive := true) from read_parquet('{shards}') where status = 'ok'"
    )
    names, rows = found.columns, found.fetchall()
    assert len(rows) == sum(map(len, images.values()))
    masks: Images = {}
    for row in rows:
        values = dict(zip(names, row, strict=True))
        masks.setdefault(values["image_id"], []).append(decoded(values))
        assert values["area"] == masks[values["image_id"]][-1].sum()
    for name, found_masks in masks.items():
        np.testing.assert_array_equal(found_masks, images[name])


def test_duckdb_reads_an_exported_coco_file(labels: Path, images: Images, tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    export(str(labels), "coco", str(tmp_path / "coco"))
    coco = f"read_json('{tmp_path}/coco/instances.json')"
    areas = duckdb.sql(
        f"select i.file_name, sum(a.area) from (select unnest(images) i from {coco})"
        f" join (select unnest(annotations) a from {coco}) on a.image_id = i.id group by 1"
    ).fetchall()
    assert dict(areas) == {name: sum(int(mask.sum()) for mask in masks) for name, masks in images.items() if masks}


def test_datasets_loads_the_shards_as_they_are(labels: Path, images: Images, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    files = [str(path) for path in sorted((labels / "shards").iterdir())]
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    rows = {row["image_id"]: row for row in loaded}
    assert rows["bad.jpg"]["status"] == "truncated"
    for name, masks in images.items():
        np.testing.assert_array_equal([decoded(mask) for mask in rows[name]["masks"]], masks or np.zeros(0))


def test_datasets_loads_the_annotations_of_an_exported_coco_file(labels: Path, images: Images, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    export(str(labels), "coco", str(tmp_path / "coco"))
    file = tmp_path / "coco" / "instances.json"
    loaded = datasets.load_dataset(
        "json", data_files=str(file), field="annotations", split="train", cache_dir=str(tmp_path / "cache")
    )
    names = {image["id"]: image["file_name"] for image in json.loads(file.read_text(encoding="utf-8"))["images"]}
    found: Images = {}
    for row in loaded:
        found.setdefault(names[row["image_id"]], []).append(decoded(row["segmentation"]))
    assert found.keys() == {name for name, masks in images.items() if masks}
    for name, masks in found.items():
        np.testing.assert_array_equal(masks, images[name])
