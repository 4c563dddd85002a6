from __future__ import annotations

import json

import pytest

from tinysam.eval.bootstrap import Metric
from tinysam.eval.results import title, to_json, to_markdown

NAN = float("nan")


def metric(value: float, low: float = NAN, high: float = NAN, n: int = 12) -> Metric:
    return Metric(value=value, low=low, high=high, n=n, images=3)


def test_json_has_null_for_what_has_no_value():
    content = to_json({"ap_large": metric(NAN, n=0), "ap": metric(0.5, 0.4, 0.6)})
    assert json.loads(json.dumps(content, allow_nan=False)) == {
        "ap_large": {"value": None, "low": None, "high": None, "n": 0, "images": 3},
        "ap": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 12, "images": 3},
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("click_miou_1", "mIoU after 1 click"),
        ("click_miou_5", "mIoU after 5 clicks"),
        ("ar_1000", "everything: AR@1000"),
        ("ar_1000_small", "everything: AR@1000, small"),
        ("ap_75_single", "mask AP75, single mask"),
        ("box_miou_single", "box mIoU, single mask"),
        ("box_miou", "box mIoU"),
    ],
)
def test_titles_say_what_is_measured(name, expected):
    assert title(name) == expected


def test_checkpoints_stand_side_by_side():
    entries = {
        "teacher": {"ap": metric(0.81234, 0.8, 0.82), "masks_per_image": metric(41.26, 40, 43, n=3)},
        "student": {"ap": metric(0.7), "click_miou_1": metric(NAN, n=0)},
    }
    dataset = {"images": 3, "checkpoints": {k: {"metrics": to_json(v)} for k, v in entries.items()}}
    text = to_markdown({"datasets": {"nuclei": dataset}})
    assert "## nuclei" in text
    assert "3 images with ground truth" in text
    assert "| | n | teacher | student |" in text
    assert "| mask AP | 12 | 0.812 [0.800, 0.820] | 0.700 |" in text
    assert "| everything: masks an image | 3 | 41.3 [40.0, 43.0] | – |" in text
    assert "| mIoU after 1 click | 0 | – | – |" in text
    assert "Seconds" not in text


def test_time_and_a_teacher_in_the_place_of_ground_truth_are_told():
    entries = {
        "a": {"metrics": {}, "seconds_per_image": {"embed": 0.25, "box": 1.0}},
        "b": {"metrics": {}, "seconds_per_image": {"embed": 0.5}},
    }
    text = to_markdown({"datasets": {"wild": {"images": 3, "teacher": "vit_h", "checkpoints": entries}}})
    assert "3 images with the masks of vit_h as ground truth" in text
    assert "| embed | 0.250 | 0.500 |" in text
    assert "| box | 1.000 | – |" in text
