"""Histograms that are filled shard by shard and drawn with as many bars as a page has room for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts of values between edges. Values beyond the outer edges are counted in the outer bins."""

    edges: np.ndarray
    """(bins + 1,) float64, increasing."""
    counts: np.ndarray
    """(bins,) int64."""
    total: float = 0.0
    """Sum of the values, for their mean."""

    @classmethod
    def linear(cls, low: float, high: float, bins: int) -> Histogram:
        """An empty histogram of ``bins`` equal bins."""
        return cls(edges=np.linspace(low, high, bins + 1), counts=np.zeros(bins, np.int64))

    @classmethod
    def logarithmic(cls, low: float, high: float, bins: int) -> Histogram:
        """An empty histogram whose edges grow by a constant factor."""
        return cls(edges=np.geomspace(low, high, bins + 1), counts=np.zeros(bins, np.int64))

    def add(self, values: np.ndarray) -> Histogram:
        """A histogram that counts ``values`` too; those that are not finite are left out."""
        values = values[np.isfinite(values)]
        bins = np.clip(np.searchsorted(self.edges, values, side="right") - 1, 0, len(self.counts) - 1)
        counts = self.counts + np.bincount(bins, minlength=len(self.counts))
        return Histogram(edges=self.edges, counts=counts, total=self.total + float(values.sum()))

    def merge(self, other: Histogram) -> Histogram:
        """The histogram of both; they must have been made with the same edges."""
        return Histogram(edges=self.edges, counts=self.counts + other.counts, total=self.total + other.total)

    @property
    def size(self) -> int:
        """Number of values."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float | None:
        """Mean of the values; None without values."""
        return self.total / self.size if self.size else None

    def quantile(self, share: float) -> float | None:
        """The middle of the bin below which ``share`` of the values lie; None without values."""
        if not self.size:
            return None
        rank = max(1, math.ceil(share * self.size))
        index = int(np.searchsorted(np.cumsum(self.counts), rank))
        return float(self.edges[index] + self.edges[index + 1]) / 2

    def trimmed(self, *, bars: int) -> Histogram:
        """The part that holds values, its bins joined until at most ``bars`` are left.

        Bins are joined by 1, 2, 5, 10, 20, …, counted from the first edge, so that edges stay round.
        """
        filled = np.flatnonzero(self.counts)
        if len(filled) == 0:
            return self
        first, last = int(filled[0]), int(filled[-1])
        step = next(s for s in _round_steps() if last // s - first // s < bars)
        start, stop = first // step * step, (last // step + 1) * step
        counts = np.zeros(stop - start, np.int64)
        inside = self.counts[start : min(stop, len(self.counts))]
        counts[: len(inside)] = inside
        edges = self.edges[np.minimum(np.arange(start, stop + 1, step), len(self.edges) - 1)]
        return Histogram(edges=edges, counts=counts.reshape(-1, step).sum(axis=1), total=self.total)


def _round_steps() -> list[int]:
    return [factor * 10**power for power in range(8) for factor in (1, 2, 5)]


def round_ticks(low: float, high: float, count: int) -> list[float]:
    """At most ``count`` + 1 round values between ``low`` and ``high``, both included where they are round."""
    if not high > low or count < 1:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]
