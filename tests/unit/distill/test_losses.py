from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from tinysam.distill import losses
from tinysam.distill.losses import LossConfig


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


def double(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_mask_losses_are_their_equations(rng: np.random.Generator, kind: str) -> None:
    logits, targets = rng.normal(scale=5, size=(3, 4, 7, 5)), rng.random((3, 1, 7, 5))
    if kind == "hard":
        targets = np.round(targets)
    p = sigmoid(logits)
    right = p * targets + (1 - p) * (1 - targets)
    cross_entropy = -(targets * np.log(p) + (1 - targets) * np.log(1 - p))
    focal = ((0.25 * targets + 0.75 * (1 - targets)) * (1 - right) ** 2 * cross_entropy).mean((2, 3))
    torch.testing.assert_close(losses.focal_loss(double(logits), double(targets)), double(focal))
    overlap, areas = (p * targets).sum((2, 3)), p.sum((2, 3)) + targets.sum((2, 3))
    torch.testing.assert_close(
        losses.dice_loss(double(logits), double(targets)), double(1 - (2 * overlap + 1) / (areas + 1))
    )
    torch.testing.assert_close(
        losses.cross_entropy_loss(double(logits), double(targets)),
        double(cross_entropy.sum((2, 3)) / (areas / 2 + 1)),
    )


def test_a_weighted_pixel_counts_as_so_many(rng: np.random.Generator) -> None:
    logits, taught = rng.normal(scale=5, size=(2, 3, 4, 6, 5))
    targets = rng.random((3, 1, 6, 5))
    counts = np.array([1, 3, 1, 2, 1, 4])

    def repeated(array: np.ndarray) -> torch.Tensor:
        return double(array.repeat(counts, axis=2))

    weight = double(counts[None, None, :, None].astype(float)).expand(3, 1, 6, 1)
    for loss in (losses.focal_loss, losses.dice_loss, losses.cross_entropy_loss):
        torch.testing.assert_close(
            loss(double(logits), double(targets), weight), loss(repeated(logits), repeated(targets))
        )
    for config in (LossConfig(), LossConfig(output_kind="focal_dice")):
        torch.testing.assert_close(
            losses.output_loss(double(logits), double(taught), config, weight),
            losses.output_loss(repeated(logits), repeated(taught), config),
        )


def test_the_focal_loss_is_torchvisions_to_its_gradient_and_where_logits_are_extreme(rng: np.random.Generator) -> None:
    targets = torch.from_numpy(rng.random((2, 3, 5, 9)).round(1)).float()
    logits = torch.from_numpy(rng.normal(scale=30, size=(2, 3, 5, 9))).float()
    results = []
    for loss in (losses.focal_loss, lambda x, t: sigmoid_focal_loss(x, t).mean((2, 3))):
        x = logits.clone().requires_grad_()
        value = loss(x, targets)
        value.sum().backward()
        results.append((value.detach(), x.grad))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("distance", ["l1", "mse"])
def test_distillation_losses_are_their_equations(rng: np.random.Generator, distance: Any) -> None:
    def compare(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.abs(a - b) if distance == "l1" else (a - b) ** 2

    student, teacher = rng.normal(size=(2, 2, 6, 3, 5))
    valid = rng.random((2, 3, 5)) < 0.6
    expected = compare(student, teacher).transpose(0, 2, 3, 1)[valid].mean()
    found = losses.embedding_loss(double(student), double(teacher), double(valid), distance)
    torch.testing.assert_close(found, torch.tensor(expected))
    student, teacher = rng.normal(size=(2, 4, 7, 6))
    expected_tokens = compare(student, teacher).mean((1, 2))
    torch.testing.assert_close(losses.token_loss(double(student), double(teacher), distance), double(expected_tokens))


def test_the_output_loss_and_its_weight_are_their_equations(rng: np.random.Generator) -> None:
    student, teacher = rng.normal(scale=9, size=(2, 3, 4, 7, 5))
    clipped = np.abs(np.clip(student, -11, 11) - np.clip(teacher, -11, 11)).mean((1, 2, 3))
    torch.testing.assert_close(
        losses.output_loss(double(student), double(teacher), LossConfig(logit_clip=11)), double(clipped)
    )
    soft = double(sigmoid(teacher))
    config = LossConfig(output_kind="focal_dice", focal=3, dice=0.5)
    expected = 3 * losses.focal_loss(double(student), soft) + 0.5 * losses.dice_loss(double(student), soft)
    torch.testing.assert_close(losses.output_loss(double(student), double(teacher), config), expected.mean(1))
    ious = rng.random((2, 20))
    expected_weight = sigmoid(ious[0] / (ious[1] + 1e-6) - 1)
    torch.testing.assert_close(losses.hard_mask_weight(double(ious[0]), double(ious[1])), double(expected_weight))


def test_iou_is_the_shares_of_pixels(rng: np.random.Generator) -> None:
    logits, targets = rng.normal(size=(3, 4, 7, 5)), rng.random((3, 1, 7, 5))
    predicted, actual = logits > 0, targets > 0.5
    expected = (predicted & actual).sum((2, 3)) / (predicted | actual).sum((2, 3))
    torch.testing.assert_close(losses.mask_iou(double(logits), double(targets)), double(expected).float())


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


@pytest.mark.parametrize("loss", [losses.dice_loss, losses.cross_entropy_loss])
def test_cross_entropy_moves_what_is_surely_wrong_and_rests_at_the_coverage_where_dice_does_not(loss: Any) -> None:
    coverage = torch.zeros(1, 1, 1, 64)
    coverage[..., :24] = 1
    coverage[..., 24] = 0.7
    logits = torch.where(coverage > 0.9, 20.0, -20.0)
    logits[..., 0] = -20
    logits[..., 24] = math.log(0.7 / 0.3)
    logits.requires_grad_()
    loss(logits, coverage).sum().backward()
    assert logits.grad is not None
    wrong, half = logits.grad[0, 0, 0, [0, 24]].tolist()
    if loss is losses.dice_loss:
        assert wrong == pytest.approx(0, abs=1e-8)
        assert half < -1e-3
    else:
        assert wrong == pytest.approx(-1 / 25, rel=0.05)
        assert half == pytest.approx(0, abs=1e-6)


def test_dice_is_zero_for_a_perfect_mask_and_one_for_a_disjoint_one() -> None:
    target = torch.zeros(1, 1, 64, 64)
    target[..., :32] = 1
    certain = (target * 2 - 1) * 1e4
    assert losses.dice_loss(certain, target).item() == pytest.approx(0, abs=1e-6)
    assert losses.dice_loss(-certain, target).item() == pytest.approx(1, abs=1e-3)


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
