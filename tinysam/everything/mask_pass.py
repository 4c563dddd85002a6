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

from tinysam.everything.bits import bits_above, count_bits, leading_zeros, trailing_zeros
from tinysam.everything.dense_mask_pass import sweep_dense
from tinysam.everything.grids import Crop
from tinysam.everything.resampling import Taps, composed

_ONE = np.uint64(1)


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
    row_start = rows.start.astype(np.uint32)  # which vectors gather at in half the instructions that int64 takes

    def one(i: int) -> tuple[np.ndarray, np.ndarray]:
        return _sweep(
            logits[i],
            (row_start, rows.weights, rows.first, rows.last),
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
    """Writes rows ``begin`` to ``end`` of the sum of K weighted ``columns`` (K, rows) to the first of ``out``."""
    out = out[: end - begin]
    column_0, column_1, column_2 = columns[0, begin:end], columns[1, begin:end], columns[2, begin:end]
    weight_0, weight_1, weight_2 = weights[0], weights[1], weights[2]
    for y in range(len(out)):
        out[y] = weight_0 * column_0[y] + weight_1 * column_1[y] + weight_2 * column_2[y]
    for k in range(3, len(weights)):
        column, weight = columns[k, begin:end], weights[k]
        for y in range(len(out)):
            out[y] += weight * column[y]


@numba.njit(cache=True, nogil=True)
def _threshold(values, length, thresholds, words):  # type: ignore[no-untyped-def]
    """Counts the first ``length`` values above low, middle and high; those above middle are the bits of ``words``.

    ``values`` has room for whole words, what follows ``length`` is overwritten.
    """
    low, middle, high = thresholds
    values[length : -(-length // 64) * 64] = -np.inf
    n_low, n_middle, n_high = 0, 0, 0
    for i in range(-(-length // 64)):
        address = values.ctypes.data + 256 * i
        words[i] = bits_above(address, middle)
        n_low += count_bits(bits_above(address, low))
        n_middle += count_bits(words[i])
        n_high += count_bits(bits_above(address, high))
    return n_low, n_middle, n_high


@numba.njit(cache=True, nogil=True)
def _first_and_last(words, length):  # type: ignore[no-untyped-def]
    """The positions of the first and the last of the bits of a column that has one."""
    first, last = 0, (length - 1) // 64
    while words[first] == 0:
        first += 1
    while words[last] == 0:
        last -= 1
    return 64 * first + trailing_zeros(words[first]), 64 * last + 63 - leading_zeros(words[last])


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
    values = np.empty(height + 64, np.float32)  # with room for a whole word at the end
    words = np.empty(height // 64 + 1, np.uint64)

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
            above_low, n_middle, above_high = _threshold(values, end - begin, thresholds, words)
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
        if n_middle > 0:
            top_bit, bottom_bit = _first_and_last(words, length)
            left, right = min(left, x0 + x), x0 + x
            upper, lower = min(upper, y0 + begin + top_bit), max(lower, y0 + begin + bottom_bit)
        for i in range(-(-length // 64)):
            # Where a bit differs from the one before it a run ends.
            changes = words[i] ^ ((words[i] << _ONE) | np.uint64(inside))
            if length < 64 * i + 64:
                changes &= (_ONE << np.uint64(length - 64 * i)) - _ONE
            while changes != 0:
                change = origin + begin + 64 * i + trailing_zeros(changes)
                runs[n_runs], run_start, inside = change - run_start, change, not inside
                n_runs += 1
                changes &= changes - _ONE
        if inside and length > 0 and (end < height or height < full_height):
            runs[n_runs], run_start, inside = origin + end - run_start, origin + end, False
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
