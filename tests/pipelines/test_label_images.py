"""Labelling images: the rows, the filters, and the job as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pycocotools import mask as coco_mask
from segment_anything.modeling import Sam

from pipelines import label_images
from pipelines.common.shard_worker import Placement
from pipelines.label_images import LabelImagesConfig, LabelImagesWorker
from tests.plans import plan_of
from tinysam import SamAutomaticMaskGenerator, SamHierarchicalMaskGenerator
from tinysam.everything.config import HierarchicalConfig
from tinysam.lake import schema
from tinysam.lake.filesystem import join, list_files
from tinysam.lake.images import decode_image
from tinysam.lake.index import IndexConfig, build_index
from tinysam.lake.shards import read_shard_metadata

# Random weights are sure of nothing, so that only thresholds this low let masks through.
EASY = HierarchicalConfig(
    points_per_side=3,
    coarse_ratio=1.5,
    pred_iou_thresh=-1e9,
    stability_score_thresh=0.0,
    output_mode="coco_rle",
)


def make_worker(lake: Path, checkpoint: str, **options: Any) -> LabelImagesWorker:
    defaults = {"lake": str(lake), "output": "", "student": checkpoint, "engine": "torch", "everything": EASY}
    config = LabelImagesConfig(**defaults | options)
    return LabelImagesWorker(config, "0" * 64, Placement(device="cpu", num_cpus=1))


def process(lake: Path, worker: LabelImagesWorker) -> list[dict[str, Any]]:
    """Rows of a whole lake, computed in this process."""
    [shard] = plan_of(build_index(IndexConfig(lake=str(lake))), images_per_shard=1000)
    table = worker.process(shard.rows)
    assert table.schema.equals(schema.MASKS)
    return table.to_pylist()


@pytest.mark.parametrize("rounds", [2, 1])
def test_rows_hold_the_generators_masks_at_original_resolution(
    rounds: int, tmp_path: Path, make_lake: Any, tiny_sam: Sam, tiny_checkpoint: str
) -> None:
    lake = make_lake(tmp_path / "lake", 2)
    rows = process(lake, make_worker(lake, tiny_checkpoint, everything=replace(EASY, rounds=rounds)))
    options: dict[str, Any] = {"points_per_side": 3, "pred_iou_thresh": -1e9, "stability_score_thresh": 0.0}
    expected_generator = SamAutomaticMaskGenerator(tiny_sam, **options)
    if rounds == 2:
        expected_generator = SamHierarchicalMaskGenerator(tiny_sam, coarse_ratio=1.5, **options)
    for row in rows:
        pixels = decode_image((lake / row["image_id"]).read_bytes())
        expected = expected_generator.generate(pixels)
        assert expected, "random weights gave no masks, so the test compares nothing"
        assert (row["status"], row["height"], row["width"]) == ("ok", *pixels.shape[:2])
        assert len(row["masks"]) == len(expected)
        for found, record in zip(row["masks"], expected, strict=True):
            np.testing.assert_array_equal(coco_mask.decode(found).astype(bool), record["segmentation"])
            assert found["area"] == record["area"]
            assert found["predicted_iou"] == pytest.approx(record["predicted_iou"])
            np.testing.assert_allclose(found["bbox"], record["bbox"])
            np.testing.assert_allclose(found["point_coords"], record["point_coords"])


class FixedGenerator:
    """Stands in for a generator: the same five masks for every image."""

    def generate_batch(self, images: list[np.ndarray], encoder_batch_size: int) -> list[list[dict[str, Any]]]:
        assert encoder_batch_size == 1
        return [self.generate(image) for image in images]

    def generate(self, image: np.ndarray) -> list[dict[str, Any]]:
        common = {"bbox": [0, 0, 1, 1], "stability_score": 1.0, "point_coords": [[0.5, 0.5]]}
        rle = {"size": list(image.shape[:2]), "counts": "1"}
        quality = {5: 0.7, 50: 0.9, 10: 0.8, 200: 0.6, 100: 0.9}
        return [{"segmentation": rle, "area": area, "predicted_iou": q, **common} for area, q in quality.items()]


@pytest.mark.parametrize(
    ("options", "areas"),
    [
        ({}, [5, 50, 10, 200, 100]),
        ({"min_area": 50}, [50, 200, 100]),
        ({"max_area": 50}, [5, 50, 10]),
        ({"min_area": 10, "max_area": 10}, [10]),
        ({"max_masks": 3}, [50, 10, 100]),
        ({"max_masks": 1}, [50]),
        ({"max_masks": 2, "max_area": 60}, [50, 10]),
        ({"min_area": 1000}, []),
    ],
)
def test_masks_are_filtered_by_area_then_by_predicted_iou(
    options: dict[str, int],
    areas: list[int],
    tmp_path: Path,
    make_lake: Any,
    tiny_checkpoint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = make_worker(tmp_path, tiny_checkpoint, **options)
    monkeypatch.setattr(worker, "_generator", FixedGenerator())
    [row] = process(make_lake(tmp_path / "lake", 1), worker)
    assert [mask["area"] for mask in row["masks"]] == areas


def test_odd_files_are_rows_at_their_upright_size(tmp_path: Path, odd_lake: Any, tiny_checkpoint: str) -> None:
    expected = odd_lake(tmp_path / "lake")
    worker = make_worker(tmp_path, tiny_checkpoint)
    rows = {row["image_id"]: row for row in process(tmp_path / "lake", worker)}
    assert {name: row["status"] for name, row in rows.items()} == expected
    assert (rows["rotated.jpg"]["height"], rows["rotated.jpg"]["width"]) == (60, 40)
    for row in rows.values():
        assert (row["masks"] is None) == (row["status"] != "ok")
        for mask in row["masks"] or []:
            assert mask["size"] == [row["height"], row["width"]]


@pytest.mark.starts_ray_in_make_test
def test_the_job_writes_masks_and_its_record_to_s3(
    s3: Any,
    ray_address: str,
    make_lake: Callable[[Path, int], Path],
    read_output: Callable[[str], pa.Table],
    tiny_checkpoint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = s3.upload(make_lake(tmp_path / "images", 3), "labels/images")
    config = tmp_path / "label.yaml"
    config.write_text(
        "everything:\n  points_per_side: 4\n  coarse_ratio: 2\n"
        "  pred_iou_thresh: -1.0e+9\n  stability_score_thresh: 0.0\n"
    )
    output = "s3://tests/labels/masks"
    args = ["--config", str(config), "--lake", images, "--output", output]
    args += ["--student", tiny_checkpoint, "--images-per-shard", "2"]
    assert label_images.main(args) == 0
    rows = read_output(output)
    assert rows["image_id"].to_pylist() == ["000.jpg", "001.jpg", "002.jpg"]
    assert all(rows["masks"].to_pylist())
    record = json.loads((s3.folder / "labels" / "masks" / "run.json").read_text())
    assert record["counts"] == {"ok": 3}
    assert {"load", "read", "decode", "segment", "write"} <= set(record["time_split"])
    assert record["config"]["everything"]["points_per_side"] == 4
    summary = capsys.readouterr().out
    assert "3 in 2 shards" in summary
    assert "segment" in summary
    metadata = read_shard_metadata(list_files(join(output, "shards"), "*.parquet")[0])
    assert metadata["model"] == tiny_checkpoint


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"student": "a", "quantized": "b"}, "--quantized"),
        ({"quantized": "b", "device": "cuda"}, "--device"),
        ({"min_area": -1}, "--min-area"),
        ({"min_area": 10, "max_area": 9}, "--max-area"),
        ({"max_masks": 0}, "--max-masks"),
        ({"everything": HierarchicalConfig(output_mode="binary_mask")}, "--everything.output-mode"),
    ],
)
def test_flags_that_contradict_are_refused_by_name(options: dict[str, Any], flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        LabelImagesConfig(lake="lake", output="output", **options)


def test_the_batch_of_prompts_is_no_part_of_the_run(tmp_path: Path) -> None:
    def labelling(**options: Any) -> dict[str, Any]:
        everything = HierarchicalConfig(output_mode="coco_rle", **options)
        return LabelImagesConfig(lake="lake", output="output", everything=everything).labelling()

    assert labelling(points_per_batch=16) == labelling(points_per_batch=256)
    assert labelling(points_per_side=16) != labelling(points_per_side=32)


def test_the_engine_that_ran_is_named_in_the_shards(tmp_path: Path, make_lake: Any, tiny_checkpoint: str) -> None:
    lake = make_lake(tmp_path / "lake", 1)
    assert make_worker(lake, tiny_checkpoint).metadata()["engine"] == "torch"
    worker = make_worker(lake, tiny_checkpoint, engine="auto")
    assert worker.metadata()["engine"] == "openvino fp32"
    assert worker.metadata()["decoder_precision"] == "float32"
    assert process(lake, worker)[0]["masks"]


def test_a_batch_has_no_influence_on_a_row(
    tmp_path: Path, odd_lake: Any, tiny_checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd_lake(tmp_path / "lake")  # some of its files are no images
    worker = make_worker(tmp_path, tiny_checkpoint)
    alone = process(tmp_path / "lake", worker)
    monkeypatch.setitem(label_images.EMBEDDED_TOGETHER, "cpu", 3)
    batched = process(tmp_path / "lake", worker)
    assert [row["status"] for row in batched] == [row["status"] for row in alone]
    assert [len(row["masks"] or []) for row in batched] == [len(row["masks"] or []) for row in alone]
