"""What range each activation covers, over calibration images."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import onnx
import onnxruntime as ort

from tinysam.quant.graph import INPUT
from tinysam.runtime.onnxruntime_engine import session_options

T = TypeVar("T")

GROUP_BYTES = 512 << 20
"""Activations that are held at a time. More groups mean more passes over the graph: for vit_t at 1024 pixels, whose
activations take 1.5 GB, three an image."""

_BINS = 4096


@dataclass(frozen=True, kw_only=True)
class Range:
    """The values of an activation that its integers cover; what is beyond is clipped. Always includes 0."""

    low: float
    high: float

    @property
    def bound(self) -> float:
        """The largest absolute value; 0 for an activation that is always 0."""
        return max(-self.low, self.high)


class Observer(ABC):
    """Sees the values of one activation, image after image."""

    def __init__(self) -> None:
        self._low = self._high = 0.0

    def see(self, values: np.ndarray) -> None:
        """Takes note of float values of any shape."""
        self._low = min(self._low, float(values.min(initial=0.0)))
        self._high = max(self._high, float(values.max(initial=0.0)))

    @abstractmethod
    def range(self) -> Range:
        """What to cover."""


class MinMaxObserver(Observer):
    """Covers everything seen, from the smallest value to the largest."""

    def range(self) -> Range:
        return Range(low=self._low, high=self._high)


class PercentileObserver(Observer):
    """Clips the few largest values, so that the others get finer steps.

    Clips at a percentile of all absolute values seen, from a histogram of 4096 bins; so it is exact to 1/2048 of the
    largest value. The histogram's range doubles, by merging bins, when a value exceeds it.
    """

    def __init__(self, percentile: float) -> None:
        if not 0 < percentile <= 100:
            raise ValueError(f"a percentile is above 0 and at most 100, got {percentile}")
        super().__init__()
        self._percentile = percentile
        self._counts = np.zeros(_BINS, dtype=np.int64)
        self._limit = 0.0

    def see(self, values: np.ndarray) -> None:
        super().see(values)
        magnitudes = np.abs(values).ravel()
        largest = float(magnitudes.max(initial=0.0))
        if self._limit == 0.0:
            if largest == 0.0:
                self._counts[0] += magnitudes.size
                return
            self._limit = largest
        while largest > self._limit:
            self._counts = np.concatenate([self._counts.reshape(-1, 2).sum(1), np.zeros(_BINS // 2, dtype=np.int64)])
            self._limit *= 2
        # In float64: the reciprocal of a denormal range overflows float32.
        bins = np.minimum(magnitudes.astype(np.float64) / self._limit * _BINS, _BINS - 1).astype(np.int32)
        self._counts += np.bincount(bins, minlength=_BINS)

    def range(self) -> Range:
        wanted = math.ceil(self._counts.sum() * self._percentile / 100)
        bins = int(np.searchsorted(np.cumsum(self._counts), wanted)) + 1
        bound = bins / _BINS * self._limit
        return Range(low=max(self._low, -bound), high=min(self._high, bound))


def observe(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    images: Iterable[np.ndarray],
    make_observer: Callable[[], Observer],
    *,
    num_threads: int,
    on_image: Callable[[], None] = lambda: None,
) -> dict[str, Range]:
    """Runs the float graph and returns what each activation's integers should cover.

    Args:
        model: a graph of :func:`tinysam.quant.graph.export_graph`.
        tensors: names of activations in it.
        images: (1, 3, S, S) float32 each, normalised.
        make_observer: makes an observer for one activation.
        num_threads: CPU threads.
        on_image: called after each image.

    Raises:
        FloatingPointError: if an activation is not finite.
    """
    observers = {name: make_observer() for name in tensors}
    session = session_with_outputs(model, tensors, num_threads)
    groups = groups_of(model, observers, lambda name: (name,))
    for image in images:
        for group in groups:
            for name, values in zip(group, run_outputs(session, group, image), strict=True):
                if not np.isfinite(values).all():
                    raise FloatingPointError(f"the activation {name} holds NaN or infinity: the weights are damaged")
                observers[name].see(values)
        on_image()
    return {name: observer.range() for name, observer in observers.items()}


def session_with_outputs(model: onnx.ModelProto, tensors: Iterable[str], num_threads: int) -> ort.InferenceSession:
    """A session of ``model`` that can return the activations ``tensors`` as well."""
    graph = model.graph
    known = {info.name: info for info in graph.value_info}
    extended = onnx.ModelProto()
    extended.CopyFrom(model)
    outputs = {info.name for info in graph.output}
    extended.graph.output.extend(
        known[name] for name in dict.fromkeys(tensors) if name != INPUT and name not in outputs
    )
    return ort.InferenceSession(
        extended.SerializeToString(), session_options(num_threads), providers=["CPUExecutionProvider"]
    )


def run_outputs(session: ort.InferenceSession, tensors: Sequence[str], image: np.ndarray) -> list[np.ndarray]:
    """The activations ``tensors`` of one image; the graph's input counts as one."""
    wanted = [name for name in tensors if name != INPUT]
    values = dict(zip(wanted, session.run(wanted, {INPUT: image}), strict=True)) if wanted else {}
    return [image if name == INPUT else values[name] for name in tensors]


def groups_of(model: onnx.ModelProto, items: Iterable[T], tensors_of: Callable[[T], Sequence[str]]) -> list[list[T]]:
    """Cuts ``items`` into groups whose activations take at most ``GROUP_BYTES``; an item alone may take more."""
    sizes = {info.name: _bytes(info) for info in (*model.graph.value_info, *model.graph.input, *model.graph.output)}
    groups: list[list[T]] = []
    held = GROUP_BYTES
    for item in items:
        size = sum(sizes[name] for name in tensors_of(item))
        if held + size > GROUP_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(item)
        held += size
    return groups


def _bytes(info: onnx.ValueInfoProto) -> int:
    return 4 * math.prod(dim.dim_value for dim in info.type.tensor_type.shape.dim)
