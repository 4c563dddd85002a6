"""SAM's two bilinear resizes of a mask, composed into one.

``Sam.postprocess_masks`` enlarges low-resolution logits to the model's square, cuts off the padding, and resizes to the
image. Each step takes two neighbours along each axis, without antialiasing even where it shrinks, so their composition
is separable and takes a few neighbours (three for SAM's sizes): ``image = R_y @ logits @ R_x.T`` with banded matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Taps:
    """A banded matrix from n_in to n_out samples along one axis: out[j] = sum of weights[k, j] * in[start[j] + k]."""

    start: np.ndarray
    """(n_out,) int64, not falling."""

    weights: np.ndarray
    """(K, n_out) float32, not negative; each column sums to 1. K is at least 3, if there are as many inputs, because
    the mask pass takes three at once."""

    first: np.ndarray
    """(n_in,) int64: the first output that takes this input, or n_out."""

    last: np.ndarray
    """(n_in,) int64: the last output that takes this input, or -1."""


def bilinear(n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two neighbours of every output, and the second one's weight, as torch's F.interpolate has them in float32.

    Returns:
        lower and upper (n_out,) int64, and the upper one's weight (n_out,) float32.
    """
    half = np.float32(0.5)
    scale = np.float32(n_in) / np.float32(n_out)
    position = np.maximum(scale * (np.arange(n_out, dtype=np.float32) + half) - half, np.float32(0))
    lower = np.minimum(np.floor(position).astype(np.int64), n_in - 1)
    return lower, np.minimum(lower + 1, n_in - 1), np.clip(position - lower.astype(np.float32), 0, 1)


def composed(n_low: int, n_model: int, n_input: int, n_out: int) -> Taps:
    """Along one axis: ``n_low`` logits to ``n_model`` pixels, of which the first ``n_input``, to ``n_out``."""
    lower, upper, weight = bilinear(n_low, n_model)
    left, right, share = bilinear(n_input, n_out)
    weight, share = weight.astype(np.float64), share.astype(np.float64)
    index = np.stack([lower[left], upper[left], lower[right], upper[right]])
    weights = np.stack(
        [
            (1 - weight[left]) * (1 - share),
            weight[left] * (1 - share),
            (1 - weight[right]) * share,
            weight[right] * share,
        ]
    )
    start = index[0]
    index = np.where(weights > 0, index, start)
    taps = min(max(int((index - start).max()) + 1, 3), n_low)
    start = np.minimum(start, n_low - taps)
    matrix = np.zeros((taps, n_out))
    np.add.at(matrix, (index - start, np.arange(n_out)), weights)
    inputs = np.arange(n_low)
    return Taps(
        start=start,
        weights=matrix.astype(np.float32),
        first=np.searchsorted(start, inputs - taps + 1, side="left"),
        last=np.searchsorted(start, inputs, side="right") - 1,
    )
