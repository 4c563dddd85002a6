"""Run-length masks as COCO writes them: ``{"size": [height, width], "counts": str}``, column by column."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

_MAX_CHARACTERS = 6  # pycocotools writes a seventh past the end of its buffer


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """Encodes a mask.

    Args:
        mask: (H, W) bool or {0, 1}.

    Returns:
        ``{"size": [H, W], "counts": str}`` in pycocotools' compressed form; JSON-serialisable.
    """
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode_rle(rle: Mapping[str, Any]) -> np.ndarray:
    """Decodes a compressed mask to (H, W) bool.

    Raises:
        ValueError: If the run lengths cannot be read or do not fill the mask.
    """
    height, width = rle["size"]
    filled = int(run_lengths(rle["counts"]).sum())
    if filled != height * width:  # pycocotools would leave the rest as the memory happened to be
        raise ValueError(f"the run lengths add up to {filled}, not to {height} x {width}")
    return coco_mask.decode(_as_coco(rle)).astype(bool)


def rle_to_uncompressed(rle: Mapping[str, Any]) -> dict[str, Any]:
    """Turns a compressed mask into ``{"size": [H, W], "counts": list[int]}``, SAM's ``uncompressed_rle``.

    ``counts`` alternates background and foreground, and starts with the background, so with 0 where the first pixel
    is foreground.
    """
    return {"size": [int(side) for side in rle["size"]], "counts": run_lengths(rle["counts"]).tolist()}


def run_lengths(counts: str | bytes) -> np.ndarray:
    """Decodes pycocotools' compressed string to (runs,) int64 run lengths.

    Each number takes characters of 5 bits, lowest first, bit 6 telling that more follow and the last one's top bit
    being the sign; from the fourth number on it is the difference to the number two before (``rleFrString``).

    Raises:
        ValueError: If it is no such string, or has a number that pycocotools could not hold (2^29 and more).
    """
    characters = np.frombuffer(counts.encode("ascii") if isinstance(counts, str) else counts, dtype=np.uint8)
    if characters.size == 0:
        return np.zeros(0, dtype=np.int64)
    values = characters.astype(np.int64) - 48
    is_last = (values & 0x20) == 0
    ends = np.flatnonzero(is_last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if not is_last[-1] or values.min() < 0 or values.max() > 63 or lengths.max() > _MAX_CHARACTERS:
        raise ValueError("not a compressed run-length string")
    position = np.arange(values.size) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((values & 0x1F) << (5 * position), starts)
    negative = (values[ends] & 0x10) != 0
    numbers[negative] -= np.int64(1) << (5 * (position[ends][negative] + 1))
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def rle_area(rle: Mapping[str, Any]) -> int:
    """Counts the foreground pixels."""
    return int(coco_mask.area(_as_coco(rle)))


def rle_bbox(rle: Mapping[str, Any]) -> list[float]:
    """Finds the box XYWH around the foreground: its left, top, width and height in pixels; zeros for an empty mask."""
    return [float(value) for value in coco_mask.toBbox(_as_coco(rle))]


def _as_coco(rle: Mapping[str, Any]) -> dict[str, Any]:
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"]}
