"""Run-length masks and their overlaps: what every metric of this package is computed from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as mask_utils
from segment_anything.modeling import Sam

from tinysam.everything.decoding import EncodedImage
from tinysam.everything.grids import crops_of
from tinysam.everything.mask_pass import mask_frame, measure
from tinysam.everything.run_lengths import coco_rle

Rle = dict[str, Any]
"""A COCO run-length mask: ``size`` [height, width] and pycocotools' compressed ``counts`` (bytes or str)."""


def to_rles(masks: Sequence[Rle] | np.ndarray) -> list[Rle]:
    """Brings masks to COCO run lengths.

    Args:
        masks: COCO RLE dicts, which pass unchanged, or an (N, H, W) array, non-zero inside.

    Raises:
        ValueError: for an array of another number of dimensions.
    """
    if not isinstance(masks, np.ndarray):
        return list(masks)
    if masks.ndim != 3:
        raise ValueError(f"masks must have shape (N, H, W), not {masks.shape}")
    if not len(masks):
        return []
    return mask_utils.encode(np.asfortranarray(masks.transpose(1, 2, 0) != 0, dtype=np.uint8))


def paired_iou(predictions: Sequence[Rle], truths: Sequence[Rle]) -> np.ndarray:
    """IoU of each prediction with the ground truth of the same position: (N,) float64 in [0, 1], 0 for two empty masks.

    Raises:
        ValueError: if the two differ in length.
    """
    pairs = zip(predictions, truths, strict=True)
    return np.array([mask_utils.iou([p], [t], [0])[0, 0] for p, t in pairs], dtype=np.float64)


def iou_matrix(predictions: Sequence[Rle], truths: Sequence[Rle]) -> np.ndarray:
    """IoU of every prediction with every ground truth: (predictions, truths) float64, of that shape when empty too."""
    if not predictions or not truths:
        return np.zeros((len(predictions), len(truths)))
    return np.asarray(mask_utils.iou(list(predictions), list(truths), [0] * len(truths)))


def areas(masks: Sequence[Rle]) -> np.ndarray:
    """Pixels of each mask: (N,) float64."""
    # One at a time: with NumPy 2, pycocotools' area of a list raises OverflowError from 256 masks on.
    return np.array([mask_utils.area(mask) for mask in masks], dtype=np.float64)


def boxes_xyxy(masks: Sequence[Rle]) -> np.ndarray:
    """Tight box of each mask, (N, 4) float64 XYXY; right and bottom edges are exclusive, as COCO's x + w."""
    if not masks:
        return np.zeros((0, 4))
    boxes = np.asarray(mask_utils.toBbox(list(masks)), dtype=np.float64)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


@torch.no_grad()
def at_original_size(sam: Sam, image: EncodedImage, low_res_logits: torch.Tensor) -> list[Rle]:
    """Upscales low-resolution logits as SAM does and thresholds them, in everything mode's one pass.

    Args:
        sam: whose threshold is taken.
        image: that the masks are of.
        low_res_logits: (N, S/4, S/4) float.
    """
    [crop] = crops_of(image.size, 0, 0.0)
    low_size = (low_res_logits.shape[1], low_res_logits.shape[2])
    frame = mask_frame(crop, image.size, image.input_size, sam.image_encoder.img_size, low_size)
    measured = measure(low_res_logits, frame, sam.mask_threshold, offset=0.0)
    return [coco_rle(run_lengths, image.size) for run_lengths in measured.run_lengths]
