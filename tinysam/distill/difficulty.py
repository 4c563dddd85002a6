"""Hard-example mining: a running difficulty of each image, and how often it is drawn for it. Our addition."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tinysam.lake.filesystem import MissingError, read_bytes, write_once

MEMORY = 0.5
"""Share of the old value in a new one: an image is seen once or twice an epoch (our choice)."""


@dataclass(frozen=True, kw_only=True)
class MiningConfig:
    """Drawing hard images more often, within the shards that are mixed at a time."""

    strength: float = 0.0
    """The hardest image is drawn ``1 + strength`` times as often as the easiest; 0 draws all alike (the default, as
    in the paper)."""

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise ValueError(f"strength must not be negative, got {self.strength}")


@dataclass
class Difficulty:
    """By how much the teacher's IoU exceeds the student's, by image."""

    values: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Running mean and the step that it was last changed at, by ``Sample.key``."""

    def update(self, keys: Sequence[str], difficulties: Sequence[float], step: int) -> None:
        """Takes in what a step has seen; NaN, for an image that showed no mask, changes nothing."""
        for key, new in zip(keys, difficulties, strict=True):
            if not math.isnan(new):
                old = self.values[key][0] if key in self.values else new
                self.values[key] = (MEMORY * old + (1 - MEMORY) * new, step)

    def merge(self, others: Iterable[Mapping[str, tuple[float, int]]]) -> None:
        """Takes over what other workers know better, having seen it later."""
        for values in others:
            for key, (value, step) in values.items():
                if key not in self.values or self.values[key][1] < step:
                    self.values[key] = (value, step)

    def weights(self, strength: float) -> dict[str, float]:
        """How often each image is drawn, between 1 and ``1 + strength`` by its rank; empty where all count alike."""
        if strength == 0 or not self.values:
            return {}
        keys = sorted(self.values, key=lambda key: (self.values[key][0], key))
        return dict(zip(keys, (1 + strength * np.linspace(0, 1, len(keys))).tolist(), strict=True))


def save_difficulty(url: str, difficulty: Difficulty, weights: Mapping[str, float]) -> None:
    """Writes a parquet file: image, difficulty, step, and the weight that the present epoch draws it with."""
    keys = list(difficulty.values)
    table = pa.table(
        {
            "image": keys,
            "difficulty": [difficulty.values[key][0] for key in keys],
            "step": [difficulty.values[key][1] for key in keys],
            "weight": [weights.get(key) for key in keys],
        },
        schema=pa.schema([("image", "string"), ("difficulty", "float64"), ("step", "int64"), ("weight", "float64")]),
    )
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    write_once(url, sink.getvalue())


def load_difficulty(url: str) -> tuple[Difficulty, dict[str, float]]:
    """Reads what :func:`save_difficulty` wrote; nothing is known where there is no such file."""
    try:
        rows = pq.read_table(pa.BufferReader(read_bytes(url))).to_pylist()
    except MissingError:
        return Difficulty(), {}
    values = {row["image"]: (row["difficulty"], row["step"]) for row in rows}
    return Difficulty(values), {row["image"]: row["weight"] for row in rows if row["weight"] is not None}
