from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
from pycocotools import mask as mask_utils
from segment_anything import SamAutomaticMaskGenerator, SamPredictor

from tinysam.eval import ClickConfig, EvalConfig, evaluate_image, evaluate_images
from tinysam.eval.masks import boxes_xyxy, to_rles
from tinysam.eval.prompts import predict_boxes
from tinysam.everything.decoding import encode


@pytest.fixture
def image(rng) -> np.ndarray:
    return rng.integers(0, 256, (61, 87, 3), dtype=np.uint8)


@pytest.fixture
def truth() -> np.ndarray:
    masks = np.zeros((7, 61, 87), bool)
    for i in range(7):
        masks[i, 2 * i : 2 * i + 20, 5 * i : 5 * i + 11 + i] = True
    return masks


def test_batched_boxes_equal_segment_anythings_predictor(tiny_sam, image, truth):
    boxes = boxes_xyxy(to_rles(truth))
    found = predict_boxes(tiny_sam, encode(tiny_sam, [image])[0], boxes, prompts_per_batch=3)
    predictor = SamPredictor(tiny_sam)
    predictor.set_image(image)
    for i, box in enumerate(boxes):
        masks, scores, _ = predictor.predict(box=box, multimask_output=True)
        assert found.multimask_scores[i] == pytest.approx(scores.max(), abs=1e-5)
        np.testing.assert_array_equal(mask_utils.decode(found.multimask[i]) > 0, masks[scores.argmax()])
        masks, scores, _ = predictor.predict(box=box, multimask_output=False)
        assert found.singlemask_scores[i] == pytest.approx(scores[0], abs=1e-5)
        np.testing.assert_array_equal(mask_utils.decode(found.singlemask[i]) > 0, masks[0])


def test_every_task_reports_its_objects(tiny_sam, image, truth):
    generator = SamAutomaticMaskGenerator(
        tiny_sam, points_per_side=4, pred_iou_thresh=-9, stability_score_thresh=0, output_mode="coco_rle"
    )
    config = EvalConfig(clicks=ClickConfig(clicks=2))
    scores = evaluate_image(tiny_sam, image, truth, config=config, generator=generator)
    assert scores.box_multimask_iou.shape == scores.box_singlemask_iou.shape == (7,)
    assert scores.click_iou.shape == (7, 2)
    assert scores.everything.best_iou.shape == (7,)
    metrics = evaluate_images(tiny_sam, [(image, truth)] * 2, config=config, generator=generator)
    assert metrics["box_miou"].value == pytest.approx(scores.box_multimask_iou.mean())
    assert metrics["click_miou_2"].value == pytest.approx(scores.click_iou[:, 1].mean())
    assert (metrics["best_match_miou"].n, metrics["best_match_miou"].images) == (14, 2)
    assert metrics["masks_per_image"].value == scores.everything.masks


def test_a_detectors_boxes_give_the_masks_and_the_objects_own_the_ious(tiny_sam, image, truth):
    config = EvalConfig(tasks=("box",))
    detections = np.array([[3.0, 4.0, 50.5, 40.25]])
    own = evaluate_image(tiny_sam, image, truth, config=config)
    detected = evaluate_image(tiny_sam, image, truth, config=config, detections=detections)
    assert (len(own.box_predictions), len(detected.box_predictions)) == (7, 1)
    np.testing.assert_array_equal(own.box_multimask_iou, detected.box_multimask_iou)
    expected = predict_boxes(tiny_sam, encode(tiny_sam, [image])[0], detections)
    assert detected.box_predictions.multimask == expected.multimask


def test_each_stage_is_announced_for_timing(tiny_sam, image, truth):
    stages = []

    @contextmanager
    def stage(name):
        stages.append(name)
        yield

    config = EvalConfig(tasks=("box", "points"), clicks=ClickConfig(clicks=1))
    evaluate_image(tiny_sam, image, truth, config=config, stage=stage)
    assert stages == ["embed", "box", "points"]


def test_tasks_not_asked_for_are_absent(tiny_sam, image, truth):
    scores = evaluate_image(tiny_sam, image, truth, config=EvalConfig(tasks=("box",)))
    assert scores.click_iou is None
    assert scores.everything is None
    assert set(evaluate_images(tiny_sam, [(image, truth)], config=EvalConfig(tasks=("box",)))) == {
        "box_miou",
        "box_miou_single",
    }


def test_images_without_objects_and_empty_masks_weigh_nothing(tiny_sam, image, truth):
    config = EvalConfig(tasks=("box", "points"), clicks=ClickConfig(clicks=1))
    empty = np.zeros((1, 61, 87), bool)
    alone = evaluate_images(tiny_sam, [(image, truth)], config=config)
    mixed = evaluate_images(
        tiny_sam, [(image, []), (image, np.concatenate([empty, truth])), (image, empty)], config=config
    )
    for name in alone:
        assert mixed[name].value == pytest.approx(alone[name].value)
        assert (mixed[name].n, mixed[name].images) == (7, 3)


def test_a_data_set_without_objects_has_no_value(tiny_sam, image):
    metric = evaluate_images(tiny_sam, [(image, [])], config=EvalConfig(tasks=("box",)))["box_miou"]
    assert np.isnan([metric.value, metric.low, metric.high]).all()
    assert (metric.n, metric.images) == (0, 1)


def test_ground_truth_of_another_size_is_refused(tiny_sam, image):
    with pytest.raises(ValueError, match=r"\(87, 61\) for an image of \(61, 87\)"):
        evaluate_image(tiny_sam, image, np.ones((1, 87, 61), bool))


@pytest.mark.parametrize("tasks", [(), ("boxes",)])
def test_unknown_and_missing_tasks_are_refused(tasks):
    with pytest.raises(ValueError, match="tasks must be some of box, points, everything"):
        EvalConfig(tasks=tasks)
