"""An auxiliary task for encoders that start from nothing (our choice): say of every pixel which object it is part of.

A prompted mask tells an image encoder about one object, through a decoder that has to be learned as well. A linear map
of the embedding that gives each pixel the sides of its object's box learns from all objects of an image at once, and
costs a hundredth of a prompt. The map is thrown away after training.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tinysam.distill.frame import EMBEDDING_STRIDE, TARGET_STRIDE

CHANNELS = 5
"""Object or not; left, top, right and bottom side of the object's box, as seen from the pixel."""
MIRRORED, OVERTURNED, TRANSPOSED = [0, 3, 2, 1, 4], [0, 1, 4, 3, 2], [0, 2, 1, 4, 3]
"""Which channel becomes which, with the image."""
SIDE_SCALE = 8.0
"""Input pixels; sides are told as ``asinh(distance / SIDE_SCALE)``: small ones exactly, large ones relatively."""
UPSAMPLING = EMBEDDING_STRIDE // TARGET_STRIDE


class DenseHead(nn.Module):
    """``(B, C, s, s)`` embeddings to ``(B, 5, 8s, 8s)``: a logit and four sides for each pixel of the targets."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Conv2d(channels, CHANNELS * UPSAMPLING**2, 1)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return F.pixel_shuffle(self.linear(embeddings), UPSAMPLING)


def dense_target(inside: np.ndarray, boxes: np.ndarray) -> torch.Tensor:
    """What the head should say of a crop.

    Where objects overlap, the smaller one counts.

    Args:
        inside: ``(N, h, w)`` bool masks.
        boxes: ``(N, 4)`` x0, y0, x1, y1 in input pixels of the crop, which they may leave.

    Returns:
        ``(5, h, w)`` float32; the sides are 0 where there is no object.
    """
    target = np.zeros((CHANNELS, *inside.shape[1:]), np.float32)
    for number in np.argsort(-inside.sum((1, 2)), kind="stable"):
        ys, xs = np.nonzero(inside[number])
        x0, y0, x1, y1 = boxes[number]
        x, y = (xs + 0.5) * TARGET_STRIDE, (ys + 0.5) * TARGET_STRIDE
        target[0, ys, xs] = 1
        target[1:, ys, xs] = np.arcsinh(np.stack([x - x0, y - y0, x1 - x, y1 - y]) / SIDE_SCALE)
    return torch.from_numpy(target)


def dense_loss(predicted: torch.Tensor, target: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of the objects' pixels plus the l1 distance of their sides; a scalar.

    Args:
        predicted: ``(B, 5, h, w)`` from :class:`DenseHead`.
        target: ``(B, 5, h, w)`` from :func:`dense_target`.
        valid: ``(B, h, w)`` bool: what shows the image, and is annotated.
    """
    covered = target[:, 0] * valid
    found = F.binary_cross_entropy_with_logits(predicted[:, 0], target[:, 0], reduction="none")
    sides = (predicted[:, 1:] - target[:, 1:]).abs().mean(1)
    return (found * valid).sum() / valid.sum().clamp(min=1) + (sides * covered).sum() / covered.sum().clamp(min=1)
