"""From low-resolution logits to all that is known of a mask at the original resolution, in one pass.

Stability, area, box and run lengths come out of one sweep over the columns of a mask; a full-resolution mask is never
held, only a few columns of it. Columns and rows that cannot reach the lowest threshold are skipped, which is exact:
resampled values are averages of their neighbours.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numba
import numpy as np
import torch

from tinysam.everything.dense_mask_pass import sweep_dense
from tinysam.everything.grids import Crop
from tinysam.everything.resampling import Taps, composed


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

    rows: Taps
    """From rows of logits to rows of the crop."""

    columns: Taps
    """From columns of logits to columns of the crop."""


def mask_frame(
    crop: Crop, image_size: tuple[int, int], input_size: tuple[int, int], model_size: int, low_size: tuple[int, int]
) -> MaskFrame:
    """The frame of a crop.

    Args:
        image_size: (H, W) of the original image.
        input_size: (h, w) of the resized crop, padding excluded.
        model_size: side of the padded square.
        low_size: (h, w) of the low-resolution logits, which cover that square.
    """
    return MaskFrame(
        crop=crop,
        image_size=image_size,
        rows=composed(low_size[0], model_size, input_size[0], crop.size[0]),
        columns=composed(low_size[1], model_size, input_size[1], crop.size[1]),
    )


def measure(low_res: torch.Tensor, frame: MaskFrame, threshold: float, offset: float) -> MeasuredMasks:
    """Thresholds N masks at the original resolution, on as many threads as torch uses, or on the GPU they lie on.

    Args:
        low_res: (N, S, S) logits.
        frame: where they lie.
        threshold: pixels with a logit above it belong to the mask.
        offset: the stability score compares thresholds this far above and below.
    """
    thresholds = (threshold - offset, threshold, threshold + offset)
    if low_res.is_cuda:
        run_lengths, statistics = sweep_dense(
            low_res.float(), frame.rows, frame.columns, frame.crop, frame.image_size, thresholds
        )
    else:
        run_lengths, statistics = _sweep_all(low_res, frame, thresholds)
    # An empty union gives NaN, as in segment-anything.
    with np.errstate(invalid="ignore"):
        stability = statistics[:, 5].astype(np.float32) / statistics[:, 6].astype(np.float32)
    return MeasuredMasks(
        run_lengths=run_lengths,
        boxes=statistics[:, :4],
        areas=statistics[:, 4],
        stability_score=stability,
    )


def _sweep_all(
    low_res: torch.Tensor, frame: MaskFrame, thresholds: tuple[float, float, float]
) -> tuple[list[np.ndarray], np.ndarray]:
    """``_sweep`` of N masks: their run lengths, and (N, 7) int64 statistics."""
    logits = np.ascontiguousarray(low_res.float().numpy())
    height, width = frame.image_size
    rows, columns = frame.rows, frame.columns

    def one(i: int) -> tuple[np.ndarray, np.ndarray]:
        return _sweep(
            logits[i],
            (rows.start, rows.weights, rows.first, rows.last),
            (columns.start, columns.weights),
            (frame.crop.y0, frame.crop.x0, height, width),
            tuple(np.float32(threshold) for threshold in thresholds),
        )

    threads = min(torch.get_num_threads(), len(logits))
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            results = list(pool.map(one, range(len(logits))))
    else:
        results = [one(i) for i in range(len(logits))]
    statistics = np.array([result[1] for result in results], np.int64).reshape(-1, 7)
    return [result[0] for result in results], statistics


def probe(low_res: torch.Tensor, frame: MaskFrame, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The (N, P) float32 logits of N masks (N, S, S) at P pixels of the crop."""
    logits = low_res.float().cpu().numpy()
    row_weights, column_weights = frame.rows.weights[:, rows], frame.columns.weights[:, columns]
    row_index = frame.rows.start[rows] + np.arange(len(row_weights))[:, None]
    column_index = frame.columns.start[columns] + np.arange(len(column_weights))[:, None]
    taps = logits[:, row_index[:, None], column_index[None]]  # (N, K, K, P)
    return np.einsum("nijp,ip,jp->np", taps, row_weights, column_weights)


@numba.njit(cache=True, nogil=True)
def _extents(logits, low):  # type: ignore[no-untyped-def]
    """The first and last row of each column of ``logits`` that is above ``low``; (n_rows, -1) where none is."""
    n_rows, n_columns = logits.shape
    first = np.full(n_columns, n_rows, np.int64)
    last = np.full(n_columns, -1, np.int64)
    for r in range(n_rows):
        for c in range(n_columns):
            if logits[r, c] > low:
                first[c] = min(first[c], r)
                last[c] = r
    return first, last


# The loops below run over one-dimensional slices, from 0, and count with 32 bits: otherwise Numba allows for negative
# positions or strides, and the loop is not vectorised.


@numba.njit(cache=True, nogil=True)
def _resample(column, start, weights, begin, end, out):  # type: ignore[no-untyped-def]
    """Writes rows ``begin`` to ``end`` of a resampled column to ``out``; ``weights`` is (K, rows)."""
    start, out = start[begin:end], out[begin:end]
    weights_0, weights_1, weights_2 = weights[0, begin:end], weights[1, begin:end], weights[2, begin:end]
    for y in range(len(out)):
        i = start[y]
        out[y] = weights_0[y] * column[i] + weights_1[y] * column[i + 1] + weights_2[y] * column[i + 2]
    for k in range(3, len(weights)):
        weights_k, column_k = weights[k, begin:end], column[k:]
        for y in range(len(out)):
            out[y] += weights_k[y] * column_k[start[y]]


@numba.njit(cache=True, nogil=True)
def _blend(columns, weights, begin, end, out):  # type: ignore[no-untyped-def]
    """Writes rows ``begin`` to ``end`` of the sum of K weighted ``columns`` (K, rows) to ``out``."""
    out = out[begin:end]
    column_0, column_1, column_2 = columns[0, begin:end], columns[1, begin:end], columns[2, begin:end]
    weight_0, weight_1, weight_2 = weights[0], weights[1], weights[2]
    for y in range(len(out)):
        out[y] = weight_0 * column_0[y] + weight_1 * column_1[y] + weight_2 * column_2[y]
    for k in range(3, len(weights)):
        column, weight = columns[k, begin:end], weights[k]
        for y in range(len(out)):
            out[y] += weight * column[y]


@numba.njit(cache=True, nogil=True)
def _threshold(values, thresholds, bits):  # type: ignore[no-untyped-def]
    """Writes whether values are above the middle threshold to ``bits``; the number above low, middle and high."""
    low, middle, high = thresholds
    n_low, n_middle, n_high = np.int32(0), np.int32(0), np.int32(0)
    for y in range(len(values)):
        n_low = np.int32(n_low + np.int32(values[y] > low))
        n_middle = np.int32(n_middle + np.int32(values[y] > middle))
        n_high = np.int32(n_high + np.int32(values[y] > high))
    for y in range(len(values)):
        bits[y] = values[y] > middle
    return n_low, n_middle, n_high


@numba.njit(cache=True, nogil=True)
def _next_change(words, i, length, inside):  # type: ignore[no-untyped-def]
    """The first position from ``i`` on whose bit, a byte each in ``words``, is not ``inside``; ``length`` if none."""
    bits = words.view(np.uint8)
    same = np.uint64(0x0101010101010101) if inside else np.uint64(0)
    while i < length:
        if i % 8 == 0:
            while i + 8 <= length and words[i // 8] == same:
                i += 8
            if i >= length:
                break
        if bits[i] != inside:
            break
        i += 1
    return min(i, length)


@numba.njit(cache=True, nogil=True)
def _sweep(logits, rows, columns, place, thresholds):  # type: ignore[no-untyped-def]
    """Sweeps one mask column by column.

    Args:
        logits: (S, S) float32.
        rows: ``Taps`` along y as a tuple (start, weights, first, last).
        columns: ``Taps`` along x as a tuple (start, weights).
        place: (y0, x0, height, width): the crop's corner in the original image, and that image's size.
        thresholds: low, middle and high, float32.

    Returns:
        uint32 run lengths in the original image, and int64 (x0, y0, x1, y1, area, pixels above the high threshold,
        pixels above the low one); the box is inclusive, and zeros for an empty mask.
    """
    row_start, row_weights, row_first, row_last = rows
    column_start, column_weights = columns
    y0, x0, full_height, full_width = place
    height, width = row_weights.shape[1], column_weights.shape[1]
    n_taps = len(column_weights)

    first, last = _extents(logits, thresholds[0])
    top, bottom = 0, 0
    if last.max() >= 0:
        top, bottom = row_first[first.min()], row_last[last.max()] + 1
    # Columns of logits resampled along y: the last few of them, column c in slot c modulo their number.
    ring = np.empty((n_taps, height), np.float32)
    in_ring = np.full(n_taps, -1, np.int64)
    weights = np.empty(n_taps, np.float32)
    column = np.empty(len(logits), np.float32)
    values = np.empty(height, np.float32)
    words = np.empty(height // 8 + 1, np.uint64)

    runs, n_runs = np.empty(256, np.uint32), 0
    run_start, inside = 0, False  # of the current run: its first pixel, and whether it is of the mask
    area, n_high, n_low = 0, 0, 0
    left, upper, right, lower = full_width, full_height, -1, -1
    for x in range(width):
        begin, end = len(logits), -1
        for c in range(column_start[x], column_start[x] + n_taps):
            begin, end = min(begin, first[c]), max(end, last[c])
        n_middle = 0
        if end >= 0:
            begin, end = row_first[begin], row_last[end] + 1
            for k in range(n_taps):
                c = column_start[x] + k
                slot = c % n_taps
                if in_ring[slot] != c:
                    in_ring[slot] = c
                    for r in range(len(logits)):
                        column[r] = logits[r, c]
                    _resample(column, row_start, row_weights, top, bottom, ring[slot])
                weights[slot] = column_weights[k, x]
            _blend(ring, weights, begin, end, values)
            above_low, n_middle, above_high = _threshold(values[begin:end], thresholds, words.view(np.uint8))
            area, n_high, n_low = area + n_middle, n_high + above_high, n_low + above_low
        if n_middle == 0:
            begin, end = 0, 0

        origin = (x0 + x) * full_height + y0  # where this column begins in the original image
        length = end - begin
        if len(runs) < n_runs + length + 4:
            grown = np.empty(2 * (n_runs + length + 4), np.uint32)
            grown[:n_runs] = runs[:n_runs]
            runs = grown
        if inside and (begin > 0 or n_middle == 0):
            runs[n_runs], run_start, inside = origin - run_start, origin, False
            n_runs += 1
        i = 0
        while i < length:
            change = _next_change(words, i, length, inside)
            if inside and change > i:  # a stretch of the mask
                left, right = min(left, x0 + x), x0 + x
                upper, lower = min(upper, y0 + begin + i), max(lower, y0 + begin + change - 1)
            i = change
            if i < length or (inside and (end < height or height < full_height)):
                runs[n_runs], run_start, inside = origin + begin + i - run_start, origin + begin + i, not inside
                n_runs += 1

    total = full_height * full_width
    if inside and x0 + width < full_width:
        end = (x0 + width) * full_height
        runs[n_runs], run_start = end - run_start, end
        n_runs += 1
    if run_start < total:
        runs[n_runs] = total - run_start
        n_runs += 1
    if area == 0:
        left, upper, right, lower = 0, 0, 0, 0
    return runs[:n_runs].copy(), np.array([left, upper, right, lower, area, n_high, n_low], np.int64)
