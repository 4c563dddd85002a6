"""Area-resizing of run-length masks, exactly and without decoding them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from tinysam.lake.rle import run_lengths


def shrink_to_grid(rle: Mapping[str, Any], input_size: tuple[int, int], stride: int) -> tuple[int, int, np.ndarray]:
    """Resizes a mask to the input frame and on to a grid of ``stride`` input pixels.

    A grid pixel is set where more than half of its area is covered; of those of which exactly half is, every other one,
    as on a chessboard, so that masks neither shrink nor move (a 256-pixel image on a grid of 384 halves every third
    pixel: left out, they cost nuclei 5 % of their area). What lies outside the image counts as not covered. All
    arithmetic is on integers below 2^53, so the result is the same on every machine.

    Args:
        rle: COCO run lengths in the original frame; not empty.
        input_size: (height, width) of the input frame.
        stride: Side of a grid pixel, in pixels of the input frame.

    Returns:
        ``(top, left, patch)``: (h, w) bool with the grid pixels that the mask's box touches, and where it lies.
    """
    height, width = (int(side) for side in rle["size"])
    x, y, box_width, box_height = (int(value) for value in coco_mask.toBbox(rle))
    top, rows = _edges(y, box_height, height, input_size[0], stride)
    left, columns = _edges(x, box_width, width, input_size[1], stride)
    # Between two positions of the column-major scan, the foreground is a difference of a piecewise linear function
    # with slopes 0 and 1. Interpolating that is exact, and costs runs and edges instead of pixels.
    runs = run_lengths(rle["counts"])
    foreground = np.where(np.arange(runs.size) & 1, runs, 0)
    filled = runs > 0
    scan = np.concatenate([[0], np.cumsum(runs)[filled]]) * float(input_size[0])
    count = np.concatenate([[0], np.cumsum(foreground)[filled]]) * float(input_size[0])
    starts = np.arange(x, x + box_width)[:, None] * (height * input_size[0])
    by_column = np.diff(np.interp(starts + rows, scan, count), axis=1)
    covered = (_overlaps(x, box_width, columns, input_size[1]) @ by_column).T
    every_other = np.add.outer(np.arange(top, top + len(covered)), np.arange(left, left + covered.shape[1])) % 2 == 0
    # Of integers, twice the one plus 1 exceeds the other where it is at least as much.
    return top, left, covered * 2 + every_other > stride * height * stride * width


def _edges(start: int, length: int, source: int, target: int, stride: int) -> tuple[int, np.ndarray]:
    """Finds the grid lines around ``length`` source pixels from ``start`` on, in units of 1 / target source pixels."""
    first = start * target // (source * stride)
    last = -(-(start + length) * target // (source * stride))
    lines = np.arange(first, last + 1, dtype=np.int64) * (source * stride)
    return first, np.minimum(lines, source * target)


def _overlaps(start: int, length: int, lines: np.ndarray, target: int) -> np.ndarray:
    """Tells how much of each source pixel lies between each pair of lines: (lines - 1, length) float64."""
    pixels = np.arange(start, start + length + 1, dtype=np.int64) * target
    overlaps = np.minimum(lines[1:, None], pixels[None, 1:]) - np.maximum(lines[:-1, None], pixels[None, :-1])
    return np.maximum(overlaps, 0).astype(np.float64)
