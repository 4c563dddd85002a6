"""What every engine offers, and the choice of one.

An engine runs one graph of float32 inputs and outputs with fixed shapes: with known shapes OpenVINO plans memory and
fuses attention when it compiles instead of at every call. Image encoders have a batch of 1, because that is what SAM's
code asks for (it embeds one image at a time), and because a batch gains a CPU nothing: one 1024-pixel image already
keeps its caches and cores full. ``EngineImageEncoder`` loops over larger batches.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

logger = logging.getLogger(__name__)

EngineName = Literal["openvino", "onnxruntime"]
Precision = Literal["auto", "fp32", "bf16"]


class EngineError(Exception):
    """A graph that an engine cannot run as asked; the message names the engine and the remedy."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a graph is run."""

    engine: EngineName | Literal["auto"] = "auto"
    """auto: OpenVINO, which has the faster integer kernels, and ONNX Runtime where OpenVINO cannot run the graph."""
    num_threads: int | None = None
    """CPU threads. None: as many as torch uses, which Ray sets to the CPUs that a worker reserved."""
    precision: Precision = "auto"
    """Arithmetic of all that is not integer. auto: bf16 where the processor has it and the engine uses it."""

    def __post_init__(self) -> None:
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError(f"num_threads must be at least 1, got {self.num_threads}")
        if self.engine == "onnxruntime" and self.precision == "bf16":
            raise ValueError("ONNX Runtime has no bf16 kernels for CPUs; use fp32 or the engine openvino")

    def resolved_threads(self) -> int:
        """The number of threads."""
        return self.num_threads or torch.get_num_threads()


DEFAULT_CONFIG = EngineConfig()


@dataclass(frozen=True, kw_only=True)
class ExecutedLayer:
    """One node of the graph as the engine executes it, after its own fusions."""

    name: str
    """The engine's name for it; usually that of an ONNX node."""
    kind: str
    """The engine's own type, such as ``Convolution`` (OpenVINO) or ``QLinearConv`` (ONNX Runtime)."""
    precision: str
    """Type of what it computes on: ``i8``, ``u8``, ``bf16``, ``f32`` …"""

    @property
    def is_integer(self) -> bool:
        """Whether it runs on 8-bit integers."""
        return self.precision in ("i8", "u8")


class Engine(ABC):
    """A compiled graph. Not thread-safe: one call at a time."""

    name: EngineName
    precision: str
    """``fp32`` or ``bf16``: arithmetic of all that is not integer."""
    num_threads: int
    input_shapes: list[tuple[int, ...]]
    output_shapes: list[tuple[int, ...]]

    @abstractmethod
    def infer(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Runs the graph.

        Args:
            arrays: float32 of ``input_shapes``.

        Returns:
            float32 of ``output_shapes``; may be the engine's own memory, valid until the next call.
        """

    def run(self, array: np.ndarray) -> np.ndarray:
        """Runs a graph of one input and one output; the result is the caller's to keep."""
        [result] = self.infer([array])
        return result.copy()

    @abstractmethod
    def executed_layers(self) -> list[ExecutedLayer]:
        """What is executed, in order: the evidence that integer kernels run."""


def open_engine(model: bytes, config: EngineConfig = DEFAULT_CONFIG) -> Engine:
    """Compiles an ONNX graph.

    ``engine="auto"`` takes the first of OpenVINO and ONNX Runtime that can run it; a fall-back is logged with its
    reason, and ``Engine.name`` says which it is.

    Raises:
        EngineError: if no engine of those allowed can run the graph as asked.
    """
    if config.engine == "onnxruntime":
        return _open_onnxruntime(model, config)
    try:
        return _open_openvino(model, config)
    except EngineError as error:
        if config.engine == "openvino" or config.precision == "bf16":
            raise
        engine = _open_onnxruntime(model, replace(config, precision="fp32"))
        logger.warning("running the graph on ONNX Runtime in fp32, because %s", error)
        return engine


def count_precisions(layers: Iterable[ExecutedLayer]) -> dict[str, dict[str, int]]:
    """How many nodes of each kind were executed in each precision, such as ``{"Convolution": {"u8": 29}}``."""
    counts: dict[str, Counter[str]] = {}
    for layer in layers:
        counts.setdefault(layer.kind, Counter())[layer.precision] += 1
    return {kind: dict(sorted(counts[kind].items())) for kind in sorted(counts)}


def _open_openvino(model: bytes, config: EngineConfig) -> Engine:
    # Imported late: either library can be missing on a platform that it has no wheel for.
    try:
        from tinysam.runtime.openvino_engine import OpenVinoEngine
    except ImportError as error:
        raise EngineError(f"OpenVINO cannot be imported ({error}); install openvino") from error
    return OpenVinoEngine(model, config)


def _open_onnxruntime(model: bytes, config: EngineConfig) -> Engine:
    try:
        from tinysam.runtime.onnxruntime_engine import OnnxRuntimeEngine
    except ImportError as error:
        raise EngineError(f"ONNX Runtime cannot be imported ({error}); install onnxruntime") from error
    return OnnxRuntimeEngine(model, config)
