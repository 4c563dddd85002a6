from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from tinysam.eval import ClickConfig, EvalConfig, evaluate_image, summarize
from tinysam.eval.masks import to_rles
from tinysam.eval.results import to_json
from tinysam.eval.rows import SCORES, from_row, to_row


class OneMask:
    """Finds the left half of every image."""

    def generate(self, image: np.ndarray) -> list[dict]:
        mask = np.zeros((1, *image.shape[:2]), bool)
        mask[0, :, : image.shape[1] // 2] = True
        return [{"segmentation": to_rles(mask)[0], "predicted_iou": 0.9}]


def stored(row: dict) -> dict:
    """As it comes back from a shard."""
    table = pa.Table.from_pylist([{"image_id": "a", "uri": "a", "status": "ok", **row}], schema=SCORES)
    return table.to_pylist()[0]


@pytest.fixture
def truths(rng) -> list[dict]:
    return to_rles(rng.random((3, 40, 56)) > 0.5)


@pytest.mark.parametrize("tasks", [("box",), ("points",), ("everything",), ("box", "points", "everything")])
@pytest.mark.parametrize("count", [0, 3])
def test_scores_survive_the_table(tiny_sam, rng, truths, tasks, count):
    image = rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)
    config = EvalConfig(tasks=tasks, clicks=ClickConfig(clicks=2))
    scores = evaluate_image(tiny_sam, image, truths[:count], config=config, generator=OneMask())
    row = stored(to_row(scores, truths[:count], [4, 5, 6][:count]))
    assert to_json(summarize([from_row(row)])) == to_json(summarize([scores]))
    assert [item["category_id"] for item in row["objects"]] == [4, 5, 6][:count]
    assert (row["predictions"] is None) == ("box" not in tasks)


def test_predictions_carry_the_detectors_category_and_score(tiny_sam, rng, truths):
    image = rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)
    detections = [{"category_id": 9, "score": 0.25, "bbox": [1, 2, 30, 31]}]
    boxes = np.array([[1.0, 2.0, 30.0, 31.0]])
    scores = evaluate_image(tiny_sam, image, truths, config=EvalConfig(tasks=("box",)), detections=boxes)
    (prediction,) = stored(to_row(scores, truths, [4, 5, 6], detections))["predictions"]
    assert (prediction["category_id"], prediction["box_score"]) == (9, 0.25)
    assert prediction["multimask_counts"] == scores.box_predictions.multimask[0]["counts"]
    assert prediction["singlemask_score"] == pytest.approx(scores.box_predictions.singlemask_scores[0])


def test_predictions_of_the_objects_own_boxes_have_no_detectors_score(tiny_sam, rng, truths):
    image = rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)
    scores = evaluate_image(tiny_sam, image, truths, config=EvalConfig(tasks=("box",)))
    row = stored(to_row(scores, truths, [4, 5, 6]))
    assert [(p["category_id"], p["box_score"]) for p in row["predictions"]] == [(4, None), (5, None), (6, None)]
