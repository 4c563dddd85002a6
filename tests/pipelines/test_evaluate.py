"""Evaluating models: the rows, detector boxes, and the job as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from segment_anything.modeling import Sam

from pipelines import evaluate
from pipelines.common.cli import JobError
from pipelines.common.shard_worker import Placement
from pipelines.evaluate import EvaluateConfig, EvaluateWorker, labels, prepare_detections
from tests.plans import plan_of
from tinysam import SamHierarchicalMaskGenerator
from tinysam.eval import ClickConfig, EvalConfig, evaluate_image
from tinysam.eval.detections import read_detections
from tinysam.eval.results import to_json
from tinysam.eval.rows import SCORES, from_row
from tinysam.eval.summary import summarize
from tinysam.everything import HierarchicalConfig
from tinysam.lake.images import decode_image
from tinysam.lake.index import IndexConfig, build_index
from tinysam.lake.rle import encode_rle

# Random weights are sure of nothing, so that only thresholds this low let masks through.
EASY: dict[str, Any] = {
    "points_per_side": 4,
    "coarse_ratio": 2,
    "pred_iou_thresh": -1e9,
    "stability_score_thresh": 0.0,
    "output_mode": "coco_rle",
}
SHA = "0" * 64


def rectangles(size: tuple[int, int]) -> np.ndarray:
    masks = np.zeros((3, *size), bool)
    masks[0, 5:40, 8:50] = masks[1, 60:100, 20:110] = masks[2, 10:30, 90:99] = True
    return masks


@pytest.fixture
def labelled(tmp_path: Path, make_lake: Callable[[Path, int], Path]) -> tuple[Path, Path]:
    """Four images; objects of three kinds in the first two, none in the third, and the fourth is not annotated."""
    lake = make_lake(tmp_path / "lake", 4)
    images, annotations = [], []
    for number, name in enumerate(["000.jpg", "001.jpg", "002.jpg"], start=10):
        with Image.open(lake / name) as image:
            width, height = image.size
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for kind, mask in enumerate(rectangles((height, width)) if name != "002.jpg" else [], start=1):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": kind,
                    "iscrowd": 0,
                    "area": int(mask.sum()),
                    "segmentation": encode_rle(mask),
                }
            )
    instances = tmp_path / "instances.json"
    content = {"images": images, "annotations": annotations, "categories": [{"id": i} for i in (1, 2, 3)]}
    instances.write_text(json.dumps(content))
    return lake, instances


def process(config: EvaluateConfig, detections_url: str | None = None) -> list[dict[str, Any]]:
    """Rows of a whole lake, computed in this process."""
    [shard] = plan_of(build_index(config.index_config()), images_per_shard=1000)
    worker = EvaluateWorker(config, config.checkpoints[0], SHA, detections_url, Placement(device="cpu", num_cpus=1))
    table = worker.process(shard.rows)
    assert table.schema.equals(SCORES)
    return table.to_pylist()


def test_rows_hold_the_scores_of_each_image(labelled: tuple[Path, Path], tiny_sam: Sam, tiny_checkpoint: str) -> None:
    lake, instances = labelled
    config = EvaluateConfig(
        lake=str(lake),
        annotations=str(instances),
        output="",
        checkpoints=(tiny_checkpoint,),
        clicks=ClickConfig(clicks=2),
        engine="torch",
        everything=HierarchicalConfig(**EASY),
    )
    rows = {row["image_id"]: row for row in process(config)}
    generator = SamHierarchicalMaskGenerator(tiny_sam, **EASY)
    for name in ("000.jpg", "001.jpg"):
        pixels = decode_image((lake / name).read_bytes())
        masks = rectangles(pixels.shape[:2])
        expected = evaluate_image(
            tiny_sam, pixels, masks, config=EvalConfig(clicks=ClickConfig(clicks=2)), generator=generator
        )
        assert to_json(summarize([from_row(rows[name])])) == to_json(summarize([expected]))
        assert [item["category_id"] for item in rows[name]["objects"]] == [1, 2, 3]
        assert [item["category_id"] for item in rows[name]["predictions"]] == [1, 2, 3]
    assert rows["002.jpg"]["objects"] == []
    assert rows["002.jpg"]["everything"]["masks"] > 0
    assert rows["003.jpg"]["objects"] is None
    assert rows["003.jpg"]["everything"] is None


def test_odd_files_are_rows_with_a_status(tmp_path: Path, odd_lake: Any, tiny_checkpoint: str) -> None:
    expected = odd_lake(tmp_path / "lake")
    sizes = {"rotated.jpg": (60, 40), "1x1.png": (1, 1), "narrow.png": (2000, 1)}
    for name in expected:
        content = {"annotations": [{"segmentation": encode_rle(np.ones(sizes.get(name, (40, 60)), bool))}]}
        (tmp_path / "lake" / name).with_suffix(".json").write_text(json.dumps(content))
    config = EvaluateConfig(
        lake=str(tmp_path / "lake"), output="", checkpoints=(tiny_checkpoint,), tasks=("box", "points")
    )
    rows = {row["image_id"]: row for row in process(config)}
    assert {name: row["status"] for name, row in rows.items()} == expected
    for row in rows.values():
        assert (row["box_multimask_iou"] is None) == (row["status"] != "ok")


def test_without_annotations_models_are_compared_with_a_teachers_masks(
    make_lake: Callable[[Path, int], Path], tmp_path: Path, tiny_checkpoint: str
) -> None:
    config = EvaluateConfig(
        lake=str(make_lake(tmp_path / "lake", 2)),
        output="",
        checkpoints=(tiny_checkpoint,),
        teacher=tiny_checkpoint,
        tasks=("box", "everything"),
        engine="torch",
        everything=HierarchicalConfig(**EASY),
    )
    for row in process(config):
        assert len(row["objects"]) == row["everything"]["masks"] > 0
        # A model agrees with itself: the same masks are found, and each is its own best match.
        assert row["everything"]["best_iou"] == [1.0] * len(row["objects"])
        assert len(row["predictions"]) == len(row["objects"])


def test_the_time_of_everything_mode_is_told_by_its_parts(labelled: tuple[Path, Path], tiny_checkpoint: str) -> None:
    lake, instances = labelled
    config = EvaluateConfig(
        lake=str(lake),
        annotations=str(instances),
        output="",
        checkpoints=(tiny_checkpoint,),
        tasks=("everything",),
        everything=HierarchicalConfig(**EASY),
    )
    [shard] = plan_of(build_index(config.index_config()), images_per_shard=1000)
    worker = EvaluateWorker(config, tiny_checkpoint, SHA, None, Placement(device="cpu", num_cpus=1))
    worker.process(shard.rows)
    seconds = worker.clock.take()
    parts = {name: value for name, value in seconds.items() if name.startswith("everything: ")}
    assert {"everything: encode", "everything: decode", "everything: masks", "everything: rest"} == set(parts)
    assert min(parts.values()) > 0
    assert "everything" not in seconds


def test_a_detectors_boxes_are_segmented_for_the_images_that_have_them(
    labelled: tuple[Path, Path], tmp_path: Path, tiny_checkpoint: str
) -> None:
    lake, instances = labelled
    detections = [
        {"image_id": 10, "category_id": 2, "bbox": [8, 5, 42, 35], "score": 0.5},
        {"image_id": 10, "category_id": 3, "bbox": [20, 60, 90, 40], "score": 0.75},
        {"image_id": 12, "category_id": 1, "bbox": [1, 1, 9, 9], "score": 0.125},
    ]
    (tmp_path / "results.json").write_text(json.dumps(detections))
    config = EvaluateConfig(
        lake=str(lake),
        annotations=str(instances),
        detections=str(tmp_path / "results.json"),
        output=str(tmp_path / "output"),
        checkpoints=(tiny_checkpoint,),
        tasks=("box",),
    )
    url = prepare_detections(config)
    assert set(read_detections(url, ["000.jpg", "001.jpg", "002.jpg"])) == {"000.jpg", "002.jpg"}
    rows = {row["image_id"]: row for row in process(config, url)}
    found = [(p["category_id"], p["box_score"]) for p in rows["000.jpg"]["predictions"]]
    assert found == [(3, 0.75), (2, 0.5)]
    assert rows["001.jpg"]["predictions"] == []
    assert len(rows["001.jpg"]["box_multimask_iou"]) == 3
    assert [p["box_score"] for p in rows["002.jpg"]["predictions"]] == [0.125]


def test_the_job_compares_checkpoints_and_goes_on_where_it_stopped(
    ray_address: str,
    labelled: tuple[Path, Path],
    tiny_sam: Sam,
    tiny_checkpoint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lake, instances = labelled
    (lake / "broken.jpg").write_bytes(b"no image")
    output = tmp_path / "output"
    args = ["--lake", str(lake), "--annotations", str(instances), "--output", str(output), "--tasks", "box", "points"]
    args += ["--clicks.clicks", "2", "--images-per-shard", "2", "--bootstrap-samples", "50", "--max-error-rate", "0.5"]
    args += ["--ap-bootstrap-samples", "3", "--name", "boxes", "--num-workers", "1"]
    assert evaluate.main([*args, "--checkpoints", tiny_checkpoint]) == 0
    before = {path: path.stat().st_mtime_ns for path in (output / "tiny sam" / "shards").iterdir()}
    first = json.loads((output / "results.json").read_text())["datasets"]["boxes"]
    assert len(before) == 3

    other = tmp_path / "other.safetensors"
    other.write_bytes(Path(tiny_checkpoint).read_bytes())
    assert evaluate.main([*args, "--checkpoints", tiny_checkpoint, str(other)]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    both = json.loads((output / "results.json").read_text())["datasets"]["boxes"]
    assert both["checkpoints"]["tiny sam"] == first["checkpoints"]["tiny sam"]
    assert both["checkpoints"]["other"]["metrics"] == first["checkpoints"]["tiny sam"]["metrics"]
    entry = both["checkpoints"]["tiny sam"]
    assert (both["images"], entry["images_without_ground_truth"]) == (3, 1)
    assert entry["statuses"] == {"not_an_image": 1, "ok": 4}

    config = EvalConfig(tasks=("box", "points"), clicks=ClickConfig(clicks=2))
    scores = []
    for name in ("000.jpg", "001.jpg"):
        pixels = decode_image((lake / name).read_bytes())
        scores.append(evaluate_image(tiny_sam, pixels, rectangles(pixels.shape[:2]), config=config))
    for name, metric in summarize(scores).items():
        assert entry["metrics"][name]["value"] == pytest.approx(metric.value)
        assert entry["metrics"][name]["n"] == 6
    assert {"ap", "ap_single", "ap_small", "click_miou_2"} <= set(entry["metrics"])

    table = (output / "results.md").read_text()
    assert "| | n | tiny sam | other |" in table
    assert "Seconds an image, by stage:" in table
    assert "Evaluation of" in (output / "results.html").read_text(encoding="utf-8")
    assert entry["seconds_per_image"]["box"] > 0
    record = json.loads((output / "run.json").read_text())
    assert record["job"] == "evaluate"
    assert record["counts"] == entry["statuses"]
    part = json.loads((output / "tiny sam" / "run.json").read_text())
    assert {"read", "decode", "annotations", "embed", "box", "points"} <= set(part["time_split"])
    assert "box mIoU" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(
    labelled: tuple[Path, Path], tmp_path: Path, tiny_checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lake, instances = labelled
    args = ["--lake", str(lake), "--annotations", str(instances), "--output", str(tmp_path / "output"), "--dry-run"]
    assert evaluate.main([*args, "--checkpoints", tiny_checkpoint, "--limit", "3"]) == 0
    assert not (tmp_path / "output").exists()
    assert "dry run" in capsys.readouterr().out


def test_a_lake_without_ground_truth_is_an_error_that_says_so(
    ray_address: str, make_lake: Callable[[Path, int], Path], tmp_path: Path, tiny_checkpoint: str
) -> None:
    lake = make_lake(tmp_path / "lake", 1)
    args = ["--lake", str(lake), "--output", str(tmp_path / "output"), "--checkpoints", tiny_checkpoint]
    with pytest.raises(JobError, match="--annotations"):
        evaluate.main([*args, "--tasks", "box", "--num-workers", "1"])


def test_files_of_one_name_keep_apart() -> None:
    assert labels(["a/x.safetensors", "b/y.pth", "demo_student", "s3://b/int8/"], ["1", "2", "3", "4"]) == [
        "x",
        "y",
        "demo_student",
        "int8",
    ]
    assert labels(["a/x.pt", "b/x.pt"], ["1" * 64, "2" * 64]) == ["x-11111111", "x-22222222"]


@pytest.mark.parametrize("names", [["x.pt", "x.pt"], ["a/x.pt", "b/x.pt"]])
def test_one_model_given_twice_is_an_error(names: list[str]) -> None:
    with pytest.raises(JobError, match=r"twice|same content"):
        labels(names, ["1" * 64, "1" * 64])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoints": ()}, "--checkpoints"),
        ({"detections": "d.json"}, "--annotations"),
        ({"detections": "d.json", "annotations": "i.json", "tasks": ("points",)}, "the task box"),
        ({"protocol": "lvis"}, "--annotations"),
        ({"teacher": "demo_teacher", "annotations": "i.json"}, "two ground truths"),
        ({"everything": HierarchicalConfig()}, "--everything.output-mode"),
        ({"bootstrap_samples": 0}, "--bootstrap-samples"),
        ({"ap_bootstrap_samples": -1}, "--ap-bootstrap-samples"),
        ({"tasks": ()}, "tasks"),
        ({"prompts_per_batch": 0}, "prompts_per_batch"),
    ],
)
def test_flags_that_cannot_be_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluateConfig(**{"lake": "lake", "output": "output", "checkpoints": ("demo_student",), **options})


def test_what_no_row_depends_on_is_no_part_of_the_run() -> None:
    def identity(**options: Any) -> dict[str, Any]:
        return EvaluateConfig(lake="lake", output="output", checkpoints=("demo_student",), **options).identity()

    def grid(**options: Any) -> HierarchicalConfig:
        return HierarchicalConfig(output_mode="coco_rle", **options)

    assert identity(prompts_per_batch=8) == identity(prompts_per_batch=64) == identity(bootstrap_samples=7)
    assert identity(tasks=("box", "points")) == identity(tasks=("points", "box"))
    assert identity(everything=grid(points_per_batch=8)) == identity(everything=grid())
    assert identity(everything=grid(points_per_side=8)) != identity(everything=grid())
    assert identity(clicks=ClickConfig(clicks=2)) != identity()
    assert identity(tasks=("box",), clicks=ClickConfig(clicks=2)) == identity(tasks=("box",))
    assert identity(engine="torch") != identity(engine="openvino")


def test_a_lake_in_sa1bs_layout_needs_no_annotation_file(
    make_lake: Callable[[Path, int], Path], tmp_path: Path, tiny_checkpoint: str
) -> None:
    lake = make_lake(tmp_path / "lake", 1)
    pixels = decode_image((lake / "000.jpg").read_bytes())
    items = [{"segmentation": encode_rle(mask)} for mask in rectangles(pixels.shape[:2])]
    (lake / "000.json").write_text(json.dumps({"annotations": items}))
    assert build_index(IndexConfig(lake=str(lake))).num_rows == 1
    config = EvaluateConfig(lake=str(lake), output="", checkpoints=(tiny_checkpoint,), tasks=("box",))
    [row] = process(config)
    assert len(row["box_multimask_iou"]) == 3
    assert {item["category_id"] for item in row["objects"] + row["predictions"]} == {1}
