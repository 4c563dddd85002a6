"""Removal of small holes and islands, as segment-anything does with OpenCV, on SciPy."""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import ndimage

from tinysam.everything.candidates import Candidates
from tinysam.everything.nms import suppress
from tinysam.everything.run_lengths import decode_run_lengths, encode_run_lengths

EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)


def fill_holes(mask: np.ndarray, min_area: int) -> tuple[np.ndarray, bool]:
    """``mask`` (H, W) bool with 8-connected background regions of fewer than ``min_area`` pixels filled, and whether
    there were any."""
    regions, small = _regions(~mask, min_area)
    if not small.any():
        return mask, False
    return mask | small[regions], True


def remove_islands(mask: np.ndarray, min_area: int) -> tuple[np.ndarray, bool]:
    """``mask`` (H, W) bool without 8-connected regions of fewer than ``min_area`` pixels, and whether there were any.

    The largest region stays, however small: a mask that was a few pixels is still reported as having small regions, so
    that suppression prefers others over it (segment-anything's rule).
    """
    regions, small = _regions(mask, min_area)
    if not small.any():
        return mask, False
    if small[1:].all():
        small[1 + np.argmax(np.bincount(regions.ravel())[1:])] = False
    return mask & ~small[regions], True


def _regions(foreground: np.ndarray, min_area: int) -> tuple[np.ndarray, np.ndarray]:
    """The label of every pixel, 0 outside of ``foreground``, and for every label whether it is a small region."""
    labels, n_labels = ndimage.label(foreground, EIGHT_NEIGHBOURS)
    small = np.bincount(labels.ravel(), minlength=n_labels + 1) < min_area
    small[0] = False
    return labels, small


def remove_small_regions(
    candidates: Candidates, image_size: tuple[int, int], min_area: int, iou_threshold: float
) -> Candidates:
    """Cleans every mask, then suppresses duplicates that this made, in favour of masks that needed no cleaning."""
    parts = [candidates.select(np.array([i])) for i in range(len(candidates))]
    unchanged = np.ones(len(parts), np.float32)
    for i, part in enumerate(parts):
        mask, filled = fill_holes(decode_run_lengths(part.run_lengths[0], image_size), min_area)
        mask, removed = remove_islands(mask, min_area)
        if filled or removed:
            unchanged[i] = 0
            parts[i] = _with_mask(part, mask)
    return suppress(Candidates.concatenate(parts), unchanged, iou_threshold)


def _with_mask(one: Candidates, mask: np.ndarray) -> Candidates:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return dataclasses.replace(
        one,
        run_lengths=[encode_run_lengths(mask)],
        boxes=np.array([[columns[0], rows[0], columns[-1], rows[-1]]]),
        areas=np.array([mask.sum()]),
    )
