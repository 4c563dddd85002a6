"""The mask pass on a GPU: full-resolution masks a few at a time, as matrix products and reductions."""

from __future__ import annotations

import numpy as np
import torch
from segment_anything.utils.amg import batched_mask_to_box, mask_to_rle_pytorch
from torch import Tensor
from torch.nn import functional as F

from tinysam.everything.grids import Crop
from tinysam.everything.resampling import Taps

BYTES_PER_PIXEL = 24
"""Of a mask at the original resolution: logits, two comparisons, the mask, and the positions where it changes."""


def sweep_dense(
    low_res: Tensor,
    rows: Taps,
    columns: Taps,
    crop: Crop,
    image_size: tuple[int, int],
    thresholds: tuple[float, float, float],
    max_bytes: int = 1 << 30,
) -> tuple[list[np.ndarray], np.ndarray]:
    """What ``mask_pass`` finds column by column, on the device of ``low_res``.

    Args:
        low_res: (N, S, S) float32 logits.
        rows: from rows of logits to rows of the crop.
        columns: likewise.
        crop: where the masks lie in the image.
        image_size: (H, W) of the image.
        thresholds: low, middle and high.
        max_bytes: limit on what is held at full resolution.

    Returns:
        N arrays of uint32 run lengths in the original image, and (N, 7) int64: the inclusive box XYXY, the area, and
        the pixels above the high and above the low threshold; the box of an empty mask is zeros.
    """
    to_rows = _matrix(rows, low_res.shape[1]).to(low_res)
    to_columns = _matrix(columns, low_res.shape[2]).to(low_res)
    together = max(1, max_bytes // (BYTES_PER_PIXEL * image_size[0] * image_size[1]))
    run_lengths: list[np.ndarray] = []
    statistics = [np.zeros((0, 7), np.int64)]
    for chunk in low_res.split(together):
        logits = to_rows @ chunk @ to_columns.T
        n_low, area, n_high = ((logits > threshold).sum((1, 2)) for threshold in thresholds)
        masks = logits > thresholds[1]
        boxes = batched_mask_to_box(masks) + (area > 0)[:, None] * _offset(crop, masks.device)
        padding = (crop.x0, image_size[1] - crop.x1, crop.y0, image_size[0] - crop.y1)
        found = mask_to_rle_pytorch(F.pad(masks, padding))
        run_lengths += [np.array(one["counts"], np.uint32) for one in found]
        statistics.append(torch.cat([boxes, torch.stack([area, n_high, n_low], 1)], 1).cpu().numpy())
    return run_lengths, np.concatenate(statistics)


def _offset(crop: Crop, device: torch.device) -> Tensor:
    """(4,) what a box in the crop lacks to be one in the image."""
    return torch.tensor([crop.x0, crop.y0, crop.x0, crop.y0], device=device)


def _matrix(taps: Taps, n_in: int) -> Tensor:
    """(n_out, n_in) float32, the banded matrix written out."""
    n_taps, n_out = taps.weights.shape
    index = torch.from_numpy(taps.start[:, None] + np.arange(n_taps))
    return torch.zeros(n_out, n_in).scatter_(1, index, torch.from_numpy(taps.weights.T.copy()))
