from __future__ import annotations

import contextlib
import copy
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tinysam.eval.average_precision import average_precision
from tinysam.eval.masks import areas, to_rles

SIZE = (120, 140)


def rectangle(rng: np.random.Generator) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    height, width = rng.integers(4, SIZE[0]), rng.integers(4, SIZE[1])
    y, x = rng.integers(0, SIZE[0] - height + 1), rng.integers(0, SIZE[1] - width + 1)
    mask[y : y + height, x : x + width] = True
    return mask


def made_up(rng: np.random.Generator, images: int, objects: int) -> tuple[dict, list[dict]]:
    """A COCO data set with crowds, and results that miss, repeat and mistake its objects."""
    annotations, results = [], []
    for image_id in range(1, images + 1):
        for _ in range(rng.integers(0, objects + 1)):
            mask = rectangle(rng)
            rle = to_rles(mask[None])[0]
            category = int(rng.integers(1, 4))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "segmentation": rle,
                    "area": areas([rle])[0],
                    "iscrowd": int(rng.random() < 0.15),
                }
            )
            for _ in range(rng.integers(0, 3)):
                shifted = np.roll(mask, rng.integers(-3, 4, 2), (0, 1))
                results.append(
                    {
                        "image_id": image_id,
                        "category_id": category if rng.random() < 0.8 else 1,
                        "segmentation": to_rles(shifted[None])[0],
                        "score": float(rng.random()),
                    }
                )
    return {
        "images": [{"id": i, "height": SIZE[0], "width": SIZE[1]} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": c} for c in (1, 2, 3)],
    }, results


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_all_values_are_pycocotools_own_summary(seed):
    dataset, results = made_up(np.random.default_rng(seed), images=5, objects=5)
    if not results or not any(not a["iscrowd"] for a in dataset["annotations"]):
        return  # what pycocotools cannot load or has no value for; see below
    found = average_precision(dataset, results, bootstrap_samples=0)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"info": {}, **copy.deepcopy(dataset)}
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(results)), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    expected = [float("nan") if value == -1 else value for value in evaluation.stats[:6]]
    names = ("ap", "ap_50", "ap_75", "ap_small", "ap_medium", "ap_large")
    np.testing.assert_allclose([found[name].value for name in names], expected)
    counted = [a["area"] for a in dataset["annotations"] if not a["iscrowd"]]
    assert found["ap"].n == found["ap_75"].n == len(counted)
    assert found["ap_small"].n == sum(area <= 32**2 for area in counted)
    assert found["ap_large"].n == sum(area >= 96**2 for area in counted)


def test_the_interval_holds_the_value_and_repeats(rng):
    dataset, results = made_up(rng, images=30, objects=4)
    found = average_precision(dataset, results, bootstrap_samples=30)["ap"]
    assert 0 < found.low < found.value < found.high < 1
    assert found == average_precision(dataset, results, bootstrap_samples=30)["ap"]


def test_one_image_has_an_interval_of_no_width(rng):
    dataset, results = made_up(rng, images=1, objects=9)
    found = average_precision(dataset, results, bootstrap_samples=3)["ap"]
    assert found.low == found.high == pytest.approx(found.value)


def test_perfect_masks_score_one_whatever_their_number(rng):
    dataset, _ = made_up(rng, images=4, objects=6)
    results = [{**annotation, "score": 0.5} for annotation in dataset["annotations"] if not annotation["iscrowd"]]
    assert average_precision(dataset, results, bootstrap_samples=0)["ap"].value == pytest.approx(1)


def test_objects_beyond_the_most_detections_cannot_be_found():
    masks = np.zeros((20, 40, 40), bool)
    for i in range(20):
        masks[i, 2 * i : 2 * i + 2] = True
    annotations = [{"id": i, "image_id": 7, "category_id": 1, "segmentation": r} for i, r in enumerate(to_rles(masks))]
    dataset = {
        "images": [{"id": 7, "height": 40, "width": 40}],
        "annotations": annotations,
        "categories": [{"id": 1}],
    }
    results = [{**annotation, "score": 1.0} for annotation in annotations]
    limited = average_precision(dataset, results, max_detections=10, bootstrap_samples=0)["ap"].value
    assert limited == pytest.approx(51 / 101)  # recall 0.5 of COCO's 101 recall levels
    assert average_precision(dataset, results, max_detections=20, bootstrap_samples=0)["ap"].value == pytest.approx(1)


def test_no_predictions_score_nothing_and_no_objects_have_no_score(rng):
    dataset, results = made_up(rng, images=3, objects=3)
    assert average_precision(dataset, [], bootstrap_samples=2)["ap"].value == 0
    empty = average_precision({**dataset, "annotations": []}, results)["ap"]
    assert np.isnan(empty.value)
    assert (empty.n, empty.images) == (0, 3)


def test_other_images_do_not_count_and_the_arguments_stay_as_they_were(rng):
    dataset, results = made_up(rng, images=6, objects=4)
    some = {**dataset, "images": dataset["images"][:3]}
    before = copy.deepcopy((some, results))
    found = average_precision(some, results, bootstrap_samples=0)
    only = [r for r in results if r["image_id"] <= 3]
    annotations = [a for a in dataset["annotations"] if a["image_id"] <= 3]
    assert (
        found["ap"].value
        == average_precision({**some, "annotations": annotations}, only, bootstrap_samples=0)["ap"].value
    )
    assert (some, results) == before
