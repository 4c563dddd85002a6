"""From low-resolution logits to what is known of a mask at the original resolution."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from segment_anything.utils.amg import (
    batched_mask_to_box,
    calculate_stability_score,
    mask_to_rle_pytorch,
    uncrop_masks,
)

from tinysam.everything.grids import Crop


@dataclass(frozen=True, kw_only=True)
class MeasuredMasks:
    """N masks at the original resolution; fields as in ``Candidates``."""

    run_lengths: list[np.ndarray]
    boxes: np.ndarray
    areas: np.ndarray
    stability_score: np.ndarray


@dataclass(frozen=True, kw_only=True)
class MaskFrame:
    """How low-resolution logits lie in the original image."""

    crop: Crop
    image_size: tuple[int, int]
    """(H, W) of the original image."""

    input_size: tuple[int, int]
    """(h, w) of the resized crop, padding excluded."""

    model_size: int
    """The model's image size: the side of the padded square that the low-resolution mask covers."""


def upsample(low_res: torch.Tensor, frame: MaskFrame) -> torch.Tensor:
    """Logits (N, S, S) resized to the crop (N, h, w), as ``Sam.postprocess_masks`` does."""
    square = F.interpolate(low_res[:, None], (frame.model_size,) * 2, mode="bilinear", align_corners=False)
    height, width = frame.input_size
    return F.interpolate(square[..., :height, :width], frame.crop.size, mode="bilinear", align_corners=False)[:, 0]


def measure(low_res: torch.Tensor, frame: MaskFrame, threshold: float, offset: float) -> MeasuredMasks:
    """Thresholds N masks at the original resolution.

    Args:
        low_res: (N, S, S) logits.
        frame: where they lie.
        threshold: pixels with a logit above it belong to the mask.
        offset: the stability score compares thresholds this far above and below.
    """
    logits = upsample(low_res, frame)
    stability = calculate_stability_score(logits, threshold, offset)
    masks = logits > threshold
    boxes = batched_mask_to_box(masks)
    masks = uncrop_masks(masks, frame.crop.box, *frame.image_size)
    corner = np.array([frame.crop.x0, frame.crop.y0, frame.crop.x0, frame.crop.y0])
    return MeasuredMasks(
        run_lengths=[np.array(rle["counts"], np.uint32) for rle in mask_to_rle_pytorch(masks)],
        boxes=boxes.cpu().numpy() + corner,
        areas=masks.sum((1, 2)).cpu().numpy(),
        stability_score=stability.cpu().numpy(),
    )


def probe(low_res: torch.Tensor, frame: MaskFrame, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The (N, P) logits of N masks at P pixels of the crop."""
    return upsample(low_res, frame)[:, rows, columns].cpu().numpy()
