"""Caching the teacher: what a row holds, and that it depends on the image alone."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from segment_anything.modeling import Sam

from pipelines import cache_teacher
from pipelines.cache_teacher import CacheTeacherConfig, CacheTeacherWorker
from pipelines.common.cli import JobError
from pipelines.common.shard_worker import Placement
from tests.plans import plan_of
from tinysam.lake import schema
from tinysam.lake.codecs import decode_embedding
from tinysam.lake.filesystem import join, list_files
from tinysam.lake.fingerprint import file_sha256
from tinysam.lake.index import IndexConfig, build_index
from tinysam.lake.rle import decode_rle
from tinysam.lake.shards import read_shard, read_shard_metadata

CPU = Placement(device="cpu", num_cpus=2)


def process(lake: Path, annotations: Path | None = None, **options: Any) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows and metadata of a whole lake as one shard, computed in this process."""
    config = CacheTeacherConfig(lake=str(lake), output="", **options)
    index = build_index(IndexConfig(lake=str(lake), annotations=str(annotations) if annotations else None))
    worker = CacheTeacherWorker(config, "0" * 64, CPU)
    [shard] = plan_of(index, images_per_shard=1000)
    table = worker.process(shard.rows)
    assert table.schema.equals(schema.EMBEDDING)
    return table.to_pylist(), worker.metadata()


def pixels_of(row: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(row["image"])))


@pytest.mark.parametrize(("codec", "tolerance"), [("fp16", 2e-3), ("int8", 2e-2), ("int6", 8e-2)])
def test_the_embedding_is_the_teachers_of_the_kept_pixels(
    codec: str, tolerance: float, tmp_path: Path, make_lake: Any, tiny_sam: Sam, tiny_checkpoint: str
) -> None:
    rows, metadata = process(make_lake(tmp_path / "lake", 3), teacher=tiny_checkpoint, codec=codec, batch_size=2)
    shape = tuple(int(side) for side in metadata["embedding_shape"].split(","))
    assert shape == (32, 8, 8)
    assert (metadata["image_size"], metadata["codec"], metadata["teacher"]) == ("128", codec, tiny_checkpoint)
    for row in rows:
        pixels = pixels_of(row)
        assert max(pixels.shape[:2]) == 128
        assert pixels.shape[:2] == (row["input_height"], row["input_width"])
        tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        with torch.inference_mode():
            expected = tiny_sam.image_encoder(tiny_sam.preprocess(tensor)[None])[0].numpy()
        found = decode_embedding(row["embedding"], shape, metadata["codec"])
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()
        assert row["masks"] is None


def test_a_batch_has_no_influence_on_a_row(tmp_path: Path, make_lake: Any, tiny_checkpoint: str) -> None:
    lake = make_lake(tmp_path / "lake", 5)
    (lake / "001.jpg").write_bytes(b"broken, so batches shift")
    one, _ = process(lake, teacher=tiny_checkpoint, batch_size=1)
    many, _ = process(lake, teacher=tiny_checkpoint, batch_size=4)
    assert [row["status"] for row in one] == ["ok", "not_an_image", "ok", "ok", "ok"]
    for a, b in zip(one, many, strict=True):
        assert a["image"] == b["image"]
        if a["embedding"] is not None:
            pair = [decode_embedding(row["embedding"], (32, 8, 8), "fp16") for row in (a, b)]
            np.testing.assert_allclose(*pair, rtol=2e-3, atol=2e-3)


def test_ground_truth_lands_in_the_mask_frame(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (128, 64), "gray").save(tmp_path / "images" / "wide.png")
    Image.new("RGB", (50, 50)).save(tmp_path / "images" / "unlabelled.png")
    mask = np.zeros((64, 128), dtype=np.uint8, order="F")
    mask[16:48, 32:96] = 1
    rle = coco_mask.encode(mask)
    annotation = {"id": 1, "image_id": 7, "iscrowd": 0, "category_id": 1, "bbox": [32, 16, 64, 32], "area": 2048}
    annotation["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
    instances = {
        "images": [{"id": 7, "file_name": "wide.png", "height": 64, "width": 128}],
        "annotations": [annotation],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    rows, _ = process(tmp_path / "images", tmp_path / "instances.json", teacher="none", image_size=64)
    by_id = {row["image_id"]: row for row in rows}
    wide = by_id["wide.png"]
    assert (wide["input_height"], wide["input_width"]) == (32, 64)
    [stored] = wide["masks"]
    assert stored["bbox"] == [16, 8, 32, 16]
    expected = np.zeros((32, 32), np.uint8)
    expected[4:12, 8:24] = 1
    np.testing.assert_array_equal(decode_rle(stored), expected)
    [(x, y)] = stored["point_coords"]
    assert 16 < x < 48
    assert 8 < y < 24
    assert by_id["unlabelled.png"]["masks"] is None
    assert wide["embedding"] is None


def test_odd_files_become_upright_rgb_of_the_right_size(tmp_path: Path, odd_lake: Any) -> None:
    expected = odd_lake(tmp_path / "lake")
    rows, metadata = process(tmp_path / "lake", teacher="none", image_size=64)
    by_id = {row["image_id"]: row for row in rows}
    assert {name: row["status"] for name, row in by_id.items()} == expected
    assert "embedding_shape" not in metadata
    for name, row in by_id.items():
        if row["status"] != "ok":
            assert row["error"]
            continue
        size = {"1x1.png": (1, 1), "rotated.jpg": (60, 40), "narrow.png": (2000, 1)}.get(name, (40, 60))
        assert (row["height"], row["width"]) == size, name
        assert max(row["input_height"], row["input_width"]) == 64
        assert pixels_of(row).shape == (row["input_height"], row["input_width"], 3)
    same = [by_id[name]["image"] for name in ("good/same name.jpg", "other/same name.jpg")]
    assert same[0] != same[1]


def test_bad_annotations_are_a_status(tmp_path: Path, make_lake: Any) -> None:
    lake = make_lake(tmp_path / "lake", 2)
    (lake / "000.json").write_text("{not json")
    rows, _ = process(lake, teacher="none", image_size=64)
    assert [row["status"] for row in rows] == ["bad_annotations", "ok"]
    assert rows[0]["image"] is None


def test_shards_are_the_same_bytes_for_any_number_of_workers(
    s3: Any,
    ray_address: str,
    make_lake: Callable[[Path, int], Path],
    odd_lake: Callable[[Path], dict[str, str]],
    tiny_checkpoint: str,
    tmp_path: Path,
) -> None:
    make_lake(tmp_path, 8)
    odd_lake(tmp_path)
    images = s3.upload(tmp_path, "workers/images")
    shards = {}
    for count in ("1", "2"):
        output = f"s3://tests/workers/output-{count}"
        args = ["--lake", images, "--output", output, "--teacher", tiny_checkpoint]
        args += ["--images-per-shard", "5", "--batch-size", "3", "--num-workers", count, "--max-error-rate", "0.5"]
        assert cache_teacher.main(args) == 0
        folder = s3.folder / "workers" / f"output-{count}" / "shards"
        shards[count] = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(shards["1"]) == 5
    assert shards["1"] == shards["2"]

    url = list_files(join(output, "shards"), "*.parquet")[0]
    metadata = read_shard_metadata(url)
    assert metadata["teacher_sha256"] == file_sha256(tiny_checkpoint)
    assert {"schema_version", "embedding_shape", "embedding_dtype", "codec", "image_size", "preprocessing"} <= {
        *metadata
    }
    assert read_shard(url).schema.remove_metadata().equals(schema.EMBEDDING)


def test_other_weights_under_the_same_name_are_another_run(
    tmp_path: Path, make_lake: Any, tiny_checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lake = make_lake(tmp_path / "lake", 1)
    weights = tmp_path / "teacher.safetensors"
    fingerprints = set()
    for tail in (b"", b"\0"):
        weights.write_bytes(Path(tiny_checkpoint).read_bytes() + tail)
        config = CacheTeacherConfig(lake=str(lake), output=str(tmp_path / "output"), teacher=str(weights))
        fingerprints.add(cache_teacher.job(config).fingerprint())
    assert len(fingerprints) == 2


def test_a_teacher_of_another_image_size_is_explained(tmp_path: Path, make_lake: Any, tiny_checkpoint: str) -> None:
    with pytest.raises(JobError, match=r"--image-size 64 does not fit the teacher .* takes 128"):
        process(make_lake(tmp_path / "lake", 1), teacher=tiny_checkpoint, image_size=64)


def test_an_architecture_without_weights_is_no_teacher(tmp_path: Path, make_lake: Any) -> None:
    lake = make_lake(tmp_path / "lake", 1)
    with pytest.raises(JobError, match=r"vit_h.*without weights"):
        cache_teacher.main(["--lake", str(lake), "--output", str(tmp_path / "output"), "--teacher", "vit_h"])
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"teacher": "none"}, "--image-size"),
        ({"teacher": "none", "image_size": 100}, "--image-size"),
        ({"teacher": "x", "batch_size": 0}, "--batch-size"),
        ({"teacher": "x", "jpeg_quality": 101}, "--jpeg-quality"),
        ({"teacher": "x", "max_masks": 0}, "--max-masks"),
        ({"teacher": "x", "min_mask_area": -1.0}, "--min-mask-area"),
    ],
)
def test_flags_out_of_range_are_refused_by_name(options: dict[str, Any], flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        CacheTeacherConfig(lake="lake", output="output", **options)
