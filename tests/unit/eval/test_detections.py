from __future__ import annotations

import json

import pytest

from tinysam.eval.detections import DETECTIONS, read_detections, read_results, write_detections
from tinysam.lake.filesystem import LakeError

IDS = {"a/1.jpg": 1, "b/2.jpg": 2, "c.jpg": 30}


def result(image_id, score, bbox=(1, 2, 3, 4), category_id=5) -> dict:
    return {"image_id": image_id, "category_id": category_id, "bbox": list(bbox), "score": score}


def write(path, content) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_boxes_come_back_by_image_and_score(tmp_path):
    url = write(
        tmp_path / "results.json",
        [result(30, 0.1), result(1, 0.2), result(30, 0.9, (10.5, 20, 5, 6), 7), result(999, 1.0)],
    )
    table = read_results(url, IDS)
    assert table.schema == DETECTIONS
    assert table.num_rows == 3
    stored = str(tmp_path / "detections.parquet")
    write_detections(stored, table)
    assert read_detections(stored, ["c.jpg", "b/2.jpg"]) == {
        "c.jpg": [
            {"image_id": "c.jpg", "category_id": 7, "score": 0.9, "bbox": [10.5, 20.0, 15.5, 26.0]},
            {"image_id": "c.jpg", "category_id": 5, "score": 0.1, "bbox": [1.0, 2.0, 4.0, 6.0]},
        ]
    }


@pytest.mark.parametrize(
    "content",
    [
        {"annotations": []},
        [{"image_id": 1}],
        [result(1, "high")],
        [result(1, 0.5, (1, 2, 3))],
        [result(1, float("nan"))],
    ],
)
def test_other_files_are_refused(tmp_path, content):
    with pytest.raises(LakeError, match="not a COCO results file"):
        read_results(write(tmp_path / "results.json", content), IDS)


def test_results_of_another_data_set_are_refused(tmp_path):
    with pytest.raises(LakeError, match="no box for any of the images"):
        read_results(write(tmp_path / "results.json", [result(77, 0.5)]), IDS)
