from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from tinysam.eval.masks import to_rles
from tinysam.eval.reduce import read_scores, reduce_scores
from tinysam.eval.rows import SCORES
from tinysam.lake import schema
from tinysam.lake.filesystem import join
from tinysam.lake.shards import write_shard

SIZE = [20, 30]


def counts(left: int, right: int) -> str:
    mask = np.zeros((1, *SIZE), bool)
    mask[0, :, left:right] = True
    return to_rles(mask)[0]["counts"].decode()


def prediction(multimask: str, singlemask: str, box_score: float | None = None, category_id: int = 1) -> dict:
    return {
        "category_id": category_id,
        "box_score": box_score,
        "multimask_counts": multimask,
        "multimask_score": 0.9,
        "singlemask_counts": singlemask,
        "singlemask_score": 0.8,
    }


def scored(image_id: str, objects: list[str], predictions: list[dict]) -> dict:
    return {
        "image_id": image_id,
        "uri": image_id,
        "height": SIZE[0],
        "width": SIZE[1],
        "status": "ok",
        "objects": [{"counts": item, "category_id": 1} for item in objects],
        "areas": [100.0] * len(objects),
        "box_multimask_iou": [1.0] * len(objects),
        "box_singlemask_iou": [0.5] * len(objects),
        "predictions": predictions,
    }


def save(folder: str, rows: list[dict], annotations: dict[str, list[dict]] | None = None) -> None:
    for number, row in enumerate(rows):
        table = pa.Table.from_pylist([row], schema=SCORES)
        write_shard(join(folder, "shards"), f"shard-{number:05d}", table, {})
    index = [
        {
            "image_id": row["image_id"],
            "uri": row["uri"],
            "offset": 0,
            "size": 1,
            "annotations": json.dumps(annotations[row["image_id"]]).encode() if annotations else None,
        }
        for row in rows
    ]
    write_shard(folder, "index", pa.Table.from_pylist(index, schema=schema.INDEX), {})


def test_rows_become_metrics_of_both_protocols(tmp_path):
    rows = [
        scored("a", [counts(0, 10)], [prediction(counts(0, 10), counts(0, 3))]),
        scored("b", [], []),
        {"image_id": "c", "uri": "c", "status": "truncated", "error": "cut short"},
        {"image_id": "d", "uri": "d", "status": "ok", "height": 5, "width": 5},
    ]
    save(str(tmp_path), rows)
    reduction = reduce_scores(*read_scores(str(tmp_path)), ap_bootstrap_samples=2)
    assert reduction.statuses == {"ok": 3, "truncated": 1}
    assert (reduction.images, reduction.without_ground_truth) == (2, 1)
    metrics = reduction.metrics
    assert (metrics["box_miou"].value, metrics["box_miou_single"].value) == (1.0, 0.5)
    assert metrics["ap"].value == pytest.approx(1)
    assert metrics["ap_single"].value == 0
    assert (metrics["ap"].n, metrics["ap"].images) == (1, 2)


def test_a_mask_in_a_crowd_is_no_mistake(tmp_path):
    crowd = {
        "category_id": 1,
        "iscrowd": 1,
        "area": 200.0,
        "segmentation": {"size": SIZE, "counts": counts(20, 30)},
    }
    own = {"category_id": 1, "iscrowd": 0, "area": 200.0, "segmentation": {"size": SIZE, "counts": counts(0, 10)}}
    found = [
        prediction(counts(20, 30), counts(20, 30), box_score=0.99),
        prediction(counts(0, 10), counts(0, 10), box_score=0.5),
    ]
    row = scored("a", [counts(0, 10)], found)
    save(str(tmp_path / "with"), [row], {"a": [crowd, own]})
    save(str(tmp_path / "without"), [row], {"a": [own]})
    with_crowd, without = (
        reduce_scores(*read_scores(str(tmp_path / name)), ap_bootstrap_samples=0).metrics["ap"].value
        for name in ("with", "without")
    )
    assert with_crowd == pytest.approx(1)
    assert without == pytest.approx(0.5)


def test_masks_are_ranked_by_the_detectors_score(tmp_path):
    right, wrong = counts(0, 10), counts(20, 30)
    rows = [scored("a", [right], [prediction(wrong, wrong, 0.4), prediction(right, right, 0.6)])]
    save(str(tmp_path), rows)
    assert reduce_scores(*read_scores(str(tmp_path)), ap_bootstrap_samples=0).metrics["ap"].value == pytest.approx(1)


def test_a_box_of_an_unknown_category_is_a_mistake_of_its_own(tmp_path):
    right = counts(0, 10)
    rows = [scored("a", [right], [prediction(right, right, 0.9, category_id=77), prediction(right, right, 0.5)])]
    save(str(tmp_path), rows)
    assert reduce_scores(*read_scores(str(tmp_path)), ap_bootstrap_samples=0).metrics["ap"].value == pytest.approx(1)


def test_an_output_without_rows_has_no_metrics(tmp_path):
    reduction = reduce_scores(*read_scores(str(tmp_path)))
    assert (reduction.metrics, reduction.images, reduction.statuses) == ({}, 0, {})
