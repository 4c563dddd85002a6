"""COCO's run lengths: pixels counted down the columns, left to right, background first."""

from __future__ import annotations

from typing import Any

import numpy as np
from segment_anything.utils.amg import coco_encode_rle

from tinysam.everything.config import OutputMode


def encode_run_lengths(mask: np.ndarray) -> np.ndarray:
    """The uint32 run lengths of an (H, W) bool mask."""
    pixels = mask.ravel(order="F")
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    edges = np.concatenate([[0] if not pixels[0] else [0, 0], changes, [pixels.size]])
    return np.diff(edges).astype(np.uint32)


def decode_run_lengths(run_lengths: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The (height, width) bool mask of those run lengths."""
    height, width = size
    is_mask = np.arange(len(run_lengths)) % 2 == 1
    return np.repeat(is_mask, run_lengths).reshape(width, height).T


def to_segmentation(run_lengths: np.ndarray, size: tuple[int, int], mode: OutputMode) -> np.ndarray | dict[str, Any]:
    """What a record of that output mode holds."""
    if mode == "binary_mask":
        return decode_run_lengths(run_lengths, size)
    return coco_rle(run_lengths, size) if mode == "coco_rle" else _uncompressed(run_lengths, size)


def coco_rle(run_lengths: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    """``size`` [height, width] and pycocotools' compressed ``counts``, a str."""
    return coco_encode_rle(_uncompressed(run_lengths, size))


def _uncompressed(run_lengths: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    return {"size": list(size), "counts": run_lengths.tolist()}
