from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tinysam.eval.everything import AREA_RANGES, MAX_DETECTIONS, match_greedily, score_everything
from tinysam.eval.image import ImageScores
from tinysam.eval.masks import areas, to_rles
from tinysam.eval.summary import summarize


def rectangles(rng: np.random.Generator, count: int, size: tuple[int, int]) -> np.ndarray:
    masks = np.zeros((count, *size), bool)
    for mask in masks:
        h, w = rng.integers(1, size[0]), rng.integers(1, size[1])
        y, x = rng.integers(0, size[0] - h + 1), rng.integers(0, size[1] - w + 1)
        mask[y : y + h, x : x + w] = True
    return masks


def jittered(rng: np.random.Generator, masks: np.ndarray, count: int) -> np.ndarray:
    """Masks that overlap the objects to all degrees, several for one object."""
    if not len(masks):
        return rectangles(rng, count, masks.shape[1:])
    picks = masks[rng.integers(0, len(masks), count)]
    shifts = rng.integers(-4, 5, (count, 2))
    return np.array([np.roll(mask, shift, (0, 1)) for mask, shift in zip(picks, shifts, strict=True)]).reshape(
        count, *masks.shape[1:]
    )


def records(masks: np.ndarray, scores: np.ndarray) -> list[dict]:
    return [
        {"segmentation": rle, "predicted_iou": float(score)} for rle, score in zip(to_rles(masks), scores, strict=True)
    ]


def coco_recall(images: list[tuple[list[dict], list[dict]]]) -> np.ndarray:
    """(areas, max detections) recall by pycocotools, class-agnostic, with 1000 detections."""
    truths, results = [], []
    for image_id, (found, objects) in enumerate(images, start=1):
        results += [
            {"image_id": image_id, "category_id": 1, "segmentation": r["segmentation"], "score": r["predicted_iou"]}
            for r in found
        ]
        truths += [
            {"image_id": image_id, "category_id": 1 + i % 3, "iscrowd": 0, "segmentation": rle, "area": area}
            for i, (rle, area) in enumerate(zip(objects, areas(objects), strict=True))
        ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": i, "height": 110, "width": 130} for i in range(1, len(images) + 1)],
            "categories": [{"id": i} for i in (1, 2, 3)],
            "annotations": [{**truth, "id": i} for i, truth in enumerate(truths, start=1)],
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "segm")
        evaluation.params.useCats = 0
        evaluation.params.maxDets = list(MAX_DETECTIONS)
        evaluation.evaluate()
        evaluation.accumulate()
    recall = evaluation.eval["recall"][:, 0]  # thresholds, areas, max detections
    return np.where((recall > -1).any(axis=0), recall.mean(axis=0), np.nan)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.tuples(st.integers(0, 12), st.integers(0, 40)), min_size=1, max_size=4))
def test_average_recall_is_pycocotools(seed, counts):
    rng = np.random.default_rng(seed)
    images = []
    for objects, found in counts:
        truth = rectangles(rng, objects, (110, 130))
        # Few distinct scores, so that the order of equals is tested too.
        images.append((records(jittered(rng, truth, found), rng.integers(0, 5, found) / 4), to_rles(truth)))
    if not any(found for found, _ in images):
        return  # pycocotools cannot load an empty result
    scores = [ImageScores(areas=areas(t), everything=score_everything(found, t)) for found, t in images]
    metrics = summarize(scores, bootstrap_samples=10)
    ours = [[metrics[f"ar_{m}"].value for m in MAX_DETECTIONS]]
    np.testing.assert_allclose(ours[0], coco_recall(images)[0], atol=1e-12)
    by_size = [metrics[f"ar_1000_{area}"].value for area in list(AREA_RANGES)[1:]]
    np.testing.assert_allclose(by_size, coco_recall(images)[1:, -1], atol=1e-12)


def test_recall_at_ten_sees_the_ten_best_masks_only():
    rng = np.random.default_rng(0)
    truth = np.zeros((12, 40, 40), bool)
    for i in range(12):
        truth[i, 3 * i : 3 * i + 3] = True
    found = score_everything(records(truth, rng.permutation(12) / 12), to_rles(truth))
    np.testing.assert_allclose(found.recalled[0], [10, 12, 12])
    assert found.best_iou.tolist() == [1.0] * 12


def test_masks_beyond_a_thousand_do_not_count():
    truth = np.zeros((1, 8, 8), bool)
    truth[0, :4] = True
    wrong = np.zeros((1000, 8, 8), bool)
    wrong[:, 7] = True
    scores = np.append(np.ones(1000), 0.5)
    found = score_everything(records(np.concatenate([wrong, truth]), scores), to_rles(truth))
    assert found.masks == 1001
    assert found.recalled[0].tolist() == [0, 0, 0]
    assert found.best_iou.tolist() == [1.0]


@pytest.mark.parametrize(("objects", "found"), [(0, 0), (0, 3), (3, 0)])
def test_nothing_to_find_and_nothing_found(objects, found):
    rng = np.random.default_rng(0)
    truth = rectangles(rng, objects, (20, 20))
    scores = score_everything(records(rectangles(rng, found, (20, 20)), np.ones(found)), to_rles(truth))
    assert scores.recalled.tolist() == np.zeros((4, 3)).tolist()
    assert scores.best_iou.tolist() == [0.0] * objects
    assert scores.objects[0] == objects


def test_a_mask_takes_the_free_object_it_overlaps_most():
    ious = np.array([[0.9, 0.8], [0.85, 0.6]])
    matches = match_greedily(ious, np.array([True, True]), np.array([0.5, 0.7]))
    assert matches.tolist() == [[0, 1], [0, -1]]


def test_an_object_of_another_size_is_taken_only_for_want_of_a_counted_one():
    ious = np.array([[0.9, 0.6], [0.9, 0.6]])
    matches = match_greedily(ious, np.array([False, True]), np.array([0.5, 0.7]))
    assert matches.tolist() == [[1, 0], [0, -1]]
