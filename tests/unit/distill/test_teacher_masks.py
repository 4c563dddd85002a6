from __future__ import annotations

import copy

import pytest
import torch
from segment_anything.modeling import Sam

from tinysam.distill.decoding import dense_positions
from tinysam.distill.samples import Sample
from tinysam.distill.teacher_masks import TeacherMaskConfig, add_teacher_masks, grid_points, mask_boxes, stability

ALL = TeacherMaskConfig(pred_iou_thresh=0.0, stability_score_thresh=0.0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_batch(labelled: list[bool], height: int = 128) -> Sample:
    count = len(labelled)
    torch.manual_seed(0)
    return Sample(
        image=torch.zeros(count, 3, 128, 128, dtype=torch.uint8),
        content_size=torch.tensor([[height, 128]] * count),
        origin=torch.zeros(count, 2, dtype=torch.long),
        embedding=torch.randn(count, 32, 8, 8),
        targets=torch.zeros(count, 5, 64, 64),
        dense=torch.zeros(count, 0, 64, 64),
        boxes=torch.zeros(count, 5, 4),
        weight=torch.zeros(count, 5),
        labelled=torch.tensor(labelled),
        key=tuple(map(str, range(count))),
    )


def taught(teacher: Sam, batch: Sample, config: TeacherMaskConfig = ALL) -> Sample:
    return add_teacher_masks(teacher, batch, dense_positions(teacher, batch.origin, 8), config, seeded())


@pytest.fixture
def teacher(tiny_sam: Sam) -> Sam:
    """Always sure of itself, so that thresholds let its masks pass."""
    sam = copy.deepcopy(tiny_sam)
    last = sam.mask_decoder.iou_prediction_head.layers[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([0.0, 0.5, 0.95, 0.7]))
    return sam


def test_only_images_without_ground_truth_are_given_masks(teacher: Sam) -> None:
    before = make_batch([True, False])
    after = taught(teacher, before)
    assert torch.equal(after.weight[0], before.weight[0])
    assert after.weight[1].any()
    shown = after.weight[1] > 0
    assert (after.targets[1][shown].amax((1, 2)) == 1).all()
    assert (after.targets[1][~shown] == 0).all()
    assert before.weight[1].sum() == 0  # the batch that was given is left alone


def test_masks_are_what_the_teachers_own_decoder_says_is_best(teacher: Sam) -> None:
    batch = make_batch([False])
    after = taught(teacher, batch)
    points = grid_points(batch.content_size, 5, seeded())[0]
    with torch.no_grad():
        sparse, dense = teacher.prompt_encoder(
            points=(points[:, None], torch.ones(5, 1, dtype=torch.long)), boxes=None, masks=None
        )
        logits, _ = teacher.mask_decoder.predict_masks(
            batch.embedding, teacher.prompt_encoder.get_dense_pe(), sparse, dense
        )
    resized = torch.nn.functional.interpolate(logits[:, 2:3], size=(64, 64), mode="bilinear")[:, 0]
    expected = resized > 0  # the output whose predicted IoU was made 0.95
    shown = after.weight[0] > 0
    assert torch.equal(after.targets[0][shown] > 0, expected[shown])
    assert shown.equal(expected.flatten(1).any(1))


@pytest.mark.parametrize(
    "config",
    [
        TeacherMaskConfig(enabled=False),
        TeacherMaskConfig(pred_iou_thresh=0.96, stability_score_thresh=0),
        TeacherMaskConfig(pred_iou_thresh=0, stability_score_thresh=1.0),
    ],
)
def test_what_the_teacher_is_not_sure_of_teaches_nothing(teacher: Sam, config: TeacherMaskConfig) -> None:
    after = taught(teacher, make_batch([False]), config)
    assert after.weight.sum() == 0
    assert after.targets.sum() == 0


def test_masks_and_points_stay_on_the_image(teacher: Sam) -> None:
    after = taught(teacher, make_batch([False], height=50))
    assert after.weight.any()
    assert after.targets[:, :, 25:].sum() == 0
    assert after.boxes[..., 3].max() <= 50
    points = grid_points(torch.tensor([[50, 128]] * 20), 64, seeded())
    assert (points >= 0).all()
    assert (points < torch.tensor([128, 50])).all()


def test_a_grid_has_a_point_in_each_cell() -> None:
    points = grid_points(torch.tensor([[64, 128]]), 16, seeded())[0] / torch.tensor([32.0, 16.0])
    shift = points[0] % 1
    torch.testing.assert_close(points % 1, shift.expand(16, 2), rtol=0, atol=1e-4)
    assert {(round(x), round(y)) for x, y in (points - shift).tolist()} == {(x, y) for x in range(4) for y in range(4)}


def test_boxes_are_tight() -> None:
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, 2:5, 3:4] = True
    assert mask_boxes(masks).tolist() == [[6, 4, 8, 10], [0, 0, 0, 0]]


def test_stability_is_sams() -> None:
    from segment_anything.utils.amg import calculate_stability_score

    logits = torch.randn(4, 16, 16, generator=seeded()) * 2
    torch.testing.assert_close(stability(logits), calculate_stability_score(logits, 0.0, 1.0))


def test_thresholds_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="stability"):
        TeacherMaskConfig(stability_score_thresh=1.1)
