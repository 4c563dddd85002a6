"""OpenVINO on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino as ov

from tinysam.runtime.engine import Engine, EngineConfig, EngineError, EngineName, ExecutedLayer
from tinysam.runtime.processor import has_vnni

_HINTS = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoEngine(Engine):
    """An ONNX graph compiled by OpenVINO.

    Raises:
        EngineError: if OpenVINO cannot read or compile the graph, or bf16 is asked for and the CPU has none.
    """

    name: EngineName = "openvino"

    def __init__(self, model: bytes, config: EngineConfig) -> None:
        core = _core()
        has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if config.precision == "bf16" and not has_bf16:
            raise EngineError("OpenVINO has no bf16 on this CPU; use precision auto or fp32")
        self.precision = ("bf16" if has_bf16 else "fp32") if config.precision == "auto" else config.precision
        self.num_threads = config.resolved_threads()
        properties: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": _HINTS[self.precision],
            "INFERENCE_NUM_THREADS": self.num_threads,
            "PERFORMANCE_HINT": "LATENCY",
            # Pinned threads of several workers on one machine would all sit on its first cores.
            "ENABLE_CPU_PINNING": False,
        }
        if not has_vnni():
            # Sums of two products would be cut off at 16 bits (an embedding was wrong by a quarter), so the rounded
            # values are multiplied in float. Not among the documented properties.
            properties["LP_TRANSFORMS_MODE"] = "NO"
        try:
            self._compiled = core.compile_model(core.read_model(model), "CPU", properties)
        except RuntimeError as error:
            raise EngineError(f"OpenVINO {ov.__version__} cannot run this graph: {_first_line(error)}") from error
        self._request = self._compiled.create_infer_request()
        self.input_shapes = [tuple(port.shape) for port in self._compiled.inputs]
        self.output_shapes = [tuple(port.shape) for port in self._compiled.outputs]

    def infer(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        inputs = [np.ascontiguousarray(array, dtype=np.float32) for array in arrays]
        results = self._request.infer(inputs, share_inputs=True, share_outputs=True)
        return [results[i] for i in range(len(self.output_shapes))]

    def executed_layers(self) -> list[ExecutedLayer]:
        layers = []
        for node in self._compiled.get_runtime_model().get_ordered_ops():
            info = node.get_rt_info()
            if "layerType" in info:
                kind, precision = _text(info["layerType"]), _text(info["runtimePrecision"])
                layers.append(ExecutedLayer(name=node.get_friendly_name(), kind=kind, precision=precision))
        return layers


@functools.cache
def _core() -> ov.Core:
    """The one core of this process.

    A core's CPU plugin gives its thread an alternate signal stack and takes it away when the core ends. Of two cores
    that end in the order in which they began, the second restores the stack of the first, which is gone: the next
    signal would crash the process.
    """
    return ov.Core()


def _text(value: Any) -> str:
    return str(value.astype(str))


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
