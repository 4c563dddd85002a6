"""The losses of full-stage distillation (TinySAM, section 3.1) and of SAM's own training.

Shapes: ``N`` prompted masks, ``M`` masks predicted for each (SAM's decoder predicts four: the single-mask output and
three ambiguous ones), ``(h, w)`` low-resolution pixels. Targets are coverages in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the terms; 0 switches a term off. Where the paper gives no value, the default is our choice."""

    embedding: float = 1.0
    """alpha: l1 between the teacher's and the student's image embeddings (paper; weight ours)."""
    token: float = 1.0
    """beta: l1 between the output tokens of the two-way transformers (paper; weight ours)."""
    output: float = 1.0
    """gamma: l1 between mask logits, weighted by how hard the mask is (paper; weight ours)."""
    focal: float = 20.0
    """Focal loss against ground truth (SAM's 20:1 of focal to dice)."""
    dice: float = 1.0
    """Dice loss against ground truth."""
    iou: float = 1.0
    """l1 between the predicted and the actual IoU (paper)."""
    hard_mask_weight: bool = True
    """Weigh each mask's output loss by H_i (paper); off: every mask weighs 0.5, H's value at parity."""
    logit_clip: float = 20.0
    """Logits beyond this count as this in the output loss: certain is certain (our choice)."""

    def __post_init__(self) -> None:
        for name in ("embedding", "token", "output", "focal", "dice", "iou"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss weight {name} must not be negative, got {getattr(self, name)}")


def embedding_loss(student: torch.Tensor, teacher: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """L_emb: mean absolute difference over the part of the embedding that shows the image.

    Args:
        student: ``(B, C, h, w)``.
        teacher: ``(B, C, h, w)``.
        valid: ``(B, h, w)`` bool, False on the letterbox's padding.
    """
    difference = (student - teacher).abs().mean(1)
    return (difference * valid).sum() / valid.sum().clamp(min=1)


def token_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """L_token: mean absolute difference of the two-way transformers' output tokens, ``(N, T, C)`` each."""
    return F.l1_loss(student, teacher)


def output_loss(student: torch.Tensor, teacher: torch.Tensor, clip: float) -> torch.Tensor:
    """L_output of each mask: mean absolute difference of logits clipped to ``[-clip, clip]``.

    Args:
        student: ``(N, M, h, w)`` logits.
        teacher: ``(N, M, h, w)`` logits.
        clip: positive.

    Returns:
        ``(N,)``.
    """
    return (student.clamp(-clip, clip) - teacher.clamp(-clip, clip)).abs().flatten(1).mean(1)


def hard_mask_weight(teacher_iou: torch.Tensor, student_iou: torch.Tensor, epsilon: float = 1e-6) -> torch.Tensor:
    """H = sigmoid(IoU_teacher / (IoU_student + epsilon) - 1): 0.5 at parity, towards 1 where only the teacher is right.

    Args:
        teacher_iou: ``(N,)`` in [0, 1], against ground truth.
        student_iou: ``(N,)`` in [0, 1].
    """
    return torch.sigmoid(teacher_iou / (student_iou + epsilon) - 1)


def focal_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Focal loss (alpha 0.25, gamma 2) of each mask, ``(N, M, h, w)`` against ``(N, 1, h, w)`` to ``(N, M)``."""
    return sigmoid_focal_loss(logits, targets.expand_as(logits)).flatten(2).mean(2)


def dice_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """1 - Dice of each mask's probabilities, smoothed by a pixel; ``(N, M, h, w)``, ``(N, 1, h, w)`` to ``(N, M)``."""
    probabilities = logits.sigmoid().flatten(2)
    targets = targets.flatten(2)
    overlap = (probabilities * targets).sum(2)
    return 1 - (2 * overlap + 1) / (probabilities.sum(2) + targets.sum(2) + 1)


@torch.no_grad()
def mask_iou(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """IoU of thresholded masks: ``(N, M, h, w)`` logits (> 0), ``(N, 1, h, w)`` coverages (> 0.5), to ``(N, M)``.

    An empty prediction of an empty target counts as 0.
    """
    predicted = (logits > 0).flatten(2)
    actual = (targets > 0.5).flatten(2)
    intersection = (predicted & actual).sum(2)
    return intersection / (predicted | actual).sum(2).clamp(min=1)
