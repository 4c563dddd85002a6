"""The losses of full-stage distillation (TinySAM, section 3.1) and of SAM's own training.

Shapes: ``N`` prompted masks, ``M`` masks predicted for each (SAM's decoder predicts four: the single-mask output and
three ambiguous ones), ``(h, w)`` pixels of the targets' frame. Targets are coverages in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

FOCAL_ALPHA = 0.25  # SAM's, as its gamma of 2

TERMS = ("embedding", "token", "output", "focal", "dice", "cross_entropy", "iou", "dense")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the terms; 0 switches a term off, its computation included. Where the paper gives no value, the
    default is our choice."""

    embedding: float = 1.0
    """alpha: l1 between the teacher's and the student's image embeddings (paper; weight ours)."""
    token: float = 1.0
    """beta: l1 between the output tokens of the two-way transformers (paper; weight ours)."""
    output: float = 1.0
    """gamma: l1 between mask logits, weighted by how hard the mask is (paper; weight ours)."""
    focal: float = 20.0
    """Focal loss against ground truth (SAM's 20:1 of focal to dice). Its alpha counts an object's pixels a third as
    much as the background's, so what is uncertain is left out: end with 0 where masks come out too small (ours)."""
    dice: float = 1.0
    """Dice loss against ground truth."""
    cross_entropy: float = 0.0
    """Cross-entropy with ground truth, a pixel of the object (our choice). It moves what a model is surely wrong about,
    where dice has no gradient left, and asks for a logit of 0 at a pixel that is half covered, so that logits tell
    where within their pixels a boundary runs: for precise rims of small objects."""
    iou: float = 1.0
    """l1 between the predicted and the actual IoU (paper)."""
    dense: float = 0.0
    """An auxiliary task that speeds up encoders which start from nothing: every pixel tells its object's box (our
    choice; see tinysam/distill/dense.py)."""
    mask_cells: int | None = None
    """Compare each mask in this many cells of the embedding (16 x 16 input pixels) instead of everywhere, at the
    resolution of its logits: in half of them because there is most of the mask or of what is predicted, in the others
    by chance, weighed for all the rest (our choice; see tinysam/distill/cells.py). Many prompts an image cost less;
    objects of a few pixels of the logits get worse."""
    hard_mask_weight: bool = True
    """Weigh each mask's output loss by H_i (paper); off: every mask weighs 0.5, H's value at parity."""
    distance: Literal["l1", "mse"] = "l1"
    """Of embeddings and tokens. The paper found the squared distance too small to train with."""
    output_kind: Literal["l1", "focal_dice"] = "l1"
    """How masks are compared with the teacher's: their logits, or their probabilities as soft targets, with the
    weights of focal and dice above."""
    logit_clip: float = 20.0
    """Logits beyond this count as this in the l1 output loss: certain is certain (our choice)."""

    def __post_init__(self) -> None:
        weights = {name: getattr(self, name) for name in TERMS}
        for name, weight in weights.items():
            if not weight >= 0:
                raise ValueError(f"loss weight {name} must not be negative, got {weight}")
        if not any(weights.values()):
            raise ValueError("every loss is switched off")
        if self.output > 0 and self.output_kind == "focal_dice" and not self.focal + self.dice > 0:
            raise ValueError("output_kind focal_dice needs the weights of focal and dice")
        if self.mask_cells is not None and self.mask_cells < 2:
            raise ValueError(f"mask_cells must be at least 2, got {self.mask_cells}")
        if self.logit_clip <= 0:
            raise ValueError(f"logit_clip must be positive, got {self.logit_clip}")

    @property
    def needs_prompts(self) -> bool:
        """Whether a term is about masks, rather than about the image encoder's output alone."""
        return self.needs_teacher_masks or self.focal + self.dice + self.cross_entropy + self.iou > 0

    @property
    def needs_teacher_masks(self) -> bool:
        """Whether a term compares with what the teacher decodes, rather than with its embedding alone."""
        return self.token > 0 or self.output > 0


def embedding_loss(
    student: torch.Tensor, teacher: torch.Tensor, valid: torch.Tensor, distance: Literal["l1", "mse"] = "l1"
) -> torch.Tensor:
    """L_emb: mean absolute (or squared) difference over the part of the embedding that shows the image.

    Args:
        student: ``(B, C, h, w)``.
        teacher: ``(B, C, h, w)``.
        valid: ``(B, h, w)`` bool, False on the letterbox's padding.
        distance: of single values.
    """
    difference = _differences(student, teacher, distance).mean(1)
    return (difference * valid).sum() / valid.sum().clamp(min=1)


def token_loss(student: torch.Tensor, teacher: torch.Tensor, distance: Literal["l1", "mse"] = "l1") -> torch.Tensor:
    """L_token: mean difference of the two-way transformers' output tokens, ``(N, T, C)`` each, to ``(N,)``."""
    return _differences(student, teacher, distance).flatten(1).mean(1)


def _differences(student: torch.Tensor, teacher: torch.Tensor, distance: Literal["l1", "mse"]) -> torch.Tensor:
    compare = F.l1_loss if distance == "l1" else F.mse_loss
    return compare(student, teacher, reduction="none")


def output_loss(
    student: torch.Tensor, teacher: torch.Tensor, config: LossConfig, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """L_output of each mask, averaged over the decoder's ``M`` outputs.

    ``l1``: mean absolute difference of logits clipped to ``[-logit_clip, logit_clip]``. ``focal_dice``: focal and dice
    loss against ``sigmoid(teacher)``.

    Args:
        student: ``(N, M, h, w)`` logits.
        teacher: ``(N, M, h, w)`` logits.
        config: the kind, and what belongs to it.
        weight: of the pixels, ``(N, 1, h, w)`` or less that expands to it; None for 1 each.

    Returns:
        ``(N,)``.
    """
    if config.output_kind == "l1":
        clip = config.logit_clip
        return _mean((student.clamp(-clip, clip) - teacher.clamp(-clip, clip)).abs(), weight).mean(1)
    soft = teacher.sigmoid()
    return (config.focal * focal_loss(student, soft, weight) + config.dice * dice_loss(student, soft, weight)).mean(1)


def hard_mask_weight(teacher_iou: torch.Tensor, student_iou: torch.Tensor, epsilon: float = 1e-6) -> torch.Tensor:
    """H = sigmoid(IoU_teacher / (IoU_student + epsilon) - 1): 0.5 at parity, towards 1 where only the teacher is right.

    Args:
        teacher_iou: ``(N,)`` in [0, 1], against ground truth.
        student_iou: ``(N,)`` in [0, 1].
    """
    return torch.sigmoid(teacher_iou / (student_iou + epsilon) - 1)


def focal_loss(logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Focal loss of each mask: the mean over pixels of ``alpha_t * (1 - p_t)^2 * cross entropy``, alpha 0.25.

    torchvision's ``sigmoid_focal_loss`` in half as many passes over the pixels, of which ``targets`` may have fewer.

    Args:
        logits: ``(N, M, h, w)``.
        targets: ``(N, 1 or M, h, w)``.
        weight: of the pixels, ``(N, 1, h, w)`` or less that expands to it; None for 1 each.

    Returns:
        ``(N, M)``.
    """
    error = torch.addcmul(targets, logits.sigmoid(), 1 - 2 * targets)  # 1 - p_t, with p_t = p t + (1 - p) (1 - t)
    log_likelihood = torch.addcmul(F.logsigmoid(logits), logits, targets - 1)
    alpha = FOCAL_ALPHA * targets + (1 - FOCAL_ALPHA) * (1 - targets)
    return -_mean(alpha * (log_likelihood * error.square()), weight)


def dice_loss(logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """1 - Dice of each mask's probabilities, smoothed by a pixel; shapes as for :func:`focal_loss`."""
    probabilities = logits.sigmoid()
    overlap = _sum(probabilities * targets, weight)
    return 1 - (2 * overlap + 1) / (_sum(probabilities, weight) + _sum(targets, weight) + 1)


def cross_entropy_loss(logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Binary cross-entropy of each mask, summed over its pixels, a pixel of the mean of the target's and the found
    area (smoothed by one; without gradient); shapes as for :func:`focal_loss`.

    So boundaries count as much on small objects as on large ones, and a mask that is wrong altogether no more than its
    pixels' mean, though it be a thousand times the object.
    """
    of_pixels = F.softplus(logits) - logits * targets
    area = (_sum(logits.detach().sigmoid(), weight) + _sum(targets, weight)) / 2
    return _sum(of_pixels, weight) / (area + 1)


def _sum(values: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Of ``(N, M, h, w)`` over pixels, each of its weight: ``(N, M)``."""
    return (values if weight is None else values * weight).flatten(2).sum(2)


def _mean(values: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """As :func:`_sum`."""
    return (
        values.flatten(2).mean(2) if weight is None else _sum(values, weight) / _sum(weight.expand(values.shape), None)
    )


@torch.no_grad()
def mask_iou(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """IoU of thresholded masks: ``(N, M, h, w)`` logits (> 0), ``(N, 1, h, w)`` coverages (> 0.5), to ``(N, M)``.

    An empty prediction of an empty target counts as 0.
    """
    predicted = (logits > 0).flatten(2)
    actual = (targets > 0.5).flatten(2)
    intersection = (predicted & actual).sum(2)
    return intersection / (predicted | actual).sum(2).clamp(min=1)
