from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tinysam.distill import losses
from tinysam.distill.losses import LossConfig


def test_padding_does_not_count_in_the_embedding_loss() -> None:
    student, teacher = torch.randn(2, 5, 4, 4), torch.randn(2, 5, 4, 4)
    valid = torch.zeros(2, 4, 4, dtype=torch.bool)
    valid[:, :3, :2] = True
    expected = (student - teacher)[:, :, :3, :2].abs().mean()
    torch.testing.assert_close(losses.embedding_loss(student, teacher, valid), expected)
    student[:, :, 3:] = 1e6
    torch.testing.assert_close(losses.embedding_loss(student, teacher, valid), expected)


def test_the_output_loss_ignores_how_certain_both_are() -> None:
    teacher = torch.tensor([[[[50.0, -3.0]]], [[[50.0, -3.0]]]])
    student = torch.tensor([[[[900.0, -3.0]]], [[[19.0, -1.0]]]])
    torch.testing.assert_close(
        losses.output_loss(student, teacher, LossConfig(logit_clip=20)), torch.tensor([0.0, (1 + 2) / 2])
    )


def test_hard_mask_weight_is_half_at_parity_and_bounded_below() -> None:
    teacher, student = torch.tensor([0.8, 0.9, 0.0]), torch.tensor([0.8, 0.1, 0.7])
    weight = losses.hard_mask_weight(teacher, student)
    assert weight[0].item() == pytest.approx(0.5, abs=1e-4)
    assert weight[1].item() == pytest.approx(1 / (1 + math.exp(-8)), abs=1e-4)
    assert weight[2].item() == pytest.approx(1 / (1 + math.e), abs=1e-6)  # 0.269, the least that SCIENCE allows


def test_dice_is_zero_for_a_perfect_mask_and_one_for_a_disjoint_one() -> None:
    target = torch.zeros(1, 1, 64, 64)
    target[..., :32] = 1
    certain = (target * 2 - 1) * 1e4
    assert losses.dice_loss(certain, target).item() == pytest.approx(0, abs=1e-6)
    assert losses.dice_loss(-certain, target).item() == pytest.approx(1, abs=1e-3)


def test_focal_is_cross_entropy_down_weighted_where_the_model_is_right() -> None:
    logits, target = torch.tensor([[[[2.0]]]]), torch.tensor([[[[1.0]]]])
    p = torch.sigmoid(logits)
    expected = 0.25 * (1 - p) ** 2 * -p.log()
    torch.testing.assert_close(losses.focal_loss(logits, target), expected.flatten(2).mean(2))


def test_soft_targets_are_best_met_by_their_own_probability() -> None:
    coverage = torch.full((1, 1, 8, 8), 0.25)
    logits = torch.linspace(-4, 4, 81)
    dice = torch.stack([losses.dice_loss(torch.full_like(coverage, float(x)), coverage).squeeze() for x in logits])
    focal = torch.stack([losses.focal_loss(torch.full_like(coverage, float(x)), coverage).squeeze() for x in logits])
    assert 0 < focal.argmin().item() < 80  # an interior optimum: certainty either way is worse
    assert dice.isfinite().all()


def test_iou_counts_pixels_above_the_thresholds() -> None:
    target = torch.zeros(3, 1, 4, 4)
    target[0, 0, :2] = 1.0
    target[1, 0, :2] = 0.4  # covers less than half of each pixel: not part of the mask
    logits = torch.full((3, 2, 4, 4), -1.0)
    logits[:, 1, :, :2] = 1.0
    iou = losses.mask_iou(logits, target)
    torch.testing.assert_close(iou, torch.tensor([[0.0, 4 / 12], [0.0, 0.0], [0.0, 0.0]]))


def test_distances_are_absolute_or_squared() -> None:
    student, teacher = torch.randn(2, 5, 4, 4), torch.randn(2, 5, 4, 4)
    everywhere = torch.ones(2, 4, 4, dtype=torch.bool)
    torch.testing.assert_close(
        losses.embedding_loss(student, teacher, everywhere, "mse"), (student - teacher).square().mean()
    )
    tokens = losses.token_loss(student.flatten(2), teacher.flatten(2), "mse")
    torch.testing.assert_close(tokens, (student - teacher).square().mean((1, 2, 3)))
    torch.testing.assert_close(
        losses.token_loss(student.flatten(2), teacher.flatten(2)), (student - teacher).abs().mean((1, 2, 3))
    )


def test_soft_masks_of_the_teacher_are_best_met_by_its_own_logits() -> None:
    config = LossConfig(output_kind="focal_dice", focal=0.0, dice=1.0)
    teacher = torch.where(torch.rand(3, 4, 8, 8) > 0.5, 9.0, -9.0)
    perfect, opposite = losses.output_loss(teacher, teacher, config), losses.output_loss(-teacher, teacher, config)
    assert perfect.shape == (3,)
    assert (perfect < 0.02).all()
    assert (opposite > 0.9).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dice": -1}, "dice"),
        ({"dice": math.nan}, "dice"),
        (dict.fromkeys(losses.TERMS, 0.0), "every loss"),
        ({"focal": 0, "dice": 0, "output_kind": "focal_dice"}, "focal_dice"),
        ({"logit_clip": 0}, "logit_clip"),
    ],
)
def test_weights_that_mean_nothing_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        LossConfig(**options)
