"""ONNX Runtime on the CPU."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from tinysam.runtime.engine import Engine, EngineConfig, EngineError, EngineName, ExecutedLayer

_LOG_ERRORS_ONLY = 3
_INTEGER_KERNEL = re.compile("^(QLinear|QGemm|QAttention|ConvInteger|MatMulInteger|DynamicQuantize)")


class OnnxRuntimeEngine(Engine):
    """An ONNX graph optimised by ONNX Runtime, in float32 where it is not integer.

    Of a QDQ graph it runs linear layers and products of activations in integers, but no convolution whose output is
    float: that is computed in float32 on the rounded values, which gives the same result more slowly.

    Raises:
        EngineError: if ONNX Runtime cannot load the graph.
    """

    name: EngineName = "onnxruntime"
    precision = "fp32"

    def __init__(self, model: bytes, config: EngineConfig) -> None:
        self._model = model
        # Joins a product and its bias to a node that has no integer kernel, before the product could become one.
        self._disabled = ["MatMulAddFusion"] if b"DequantizeLinear" in model else []
        self.num_threads = config.resolved_threads()
        self._session = self._open(session_options(self.num_threads))
        self._input_names = [port.name for port in self._session.get_inputs()]
        self.input_shapes = [tuple(port.shape) for port in self._session.get_inputs()]
        self.output_shapes = [tuple(port.shape) for port in self._session.get_outputs()]

    def infer(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        inputs = [np.ascontiguousarray(array, dtype=np.float32) for array in arrays]
        return list(self._session.run(None, dict(zip(self._input_names, inputs, strict=True))))

    def executed_layers(self) -> list[ExecutedLayer]:
        # ONNX Runtime shows its optimised graph only by writing it to a file.
        with tempfile.TemporaryDirectory(prefix="tinysam-") as folder:
            options = session_options(self.num_threads)
            options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
            self._open(options)
            graph = onnx.load(options.optimized_model_filepath).graph
        return [
            ExecutedLayer(name=n.name, kind=n.op_type, precision="i8" if _INTEGER_KERNEL.match(n.op_type) else "f32")
            for n in graph.node
        ]

    def _open(self, options: ort.SessionOptions) -> ort.InferenceSession:
        try:
            return ort.InferenceSession(
                self._model, options, providers=["CPUExecutionProvider"], disabled_optimizers=self._disabled
            )
        except (RuntimeError, ValueError, *_FAILURES) as error:
            raise EngineError(f"ONNX Runtime {ort.__version__} cannot run this graph: {error}") from error


def session_options(num_threads: int) -> ort.SessionOptions:
    """Of every session: threads, no chatter, and products of 8-bit integers that are exact on any x86."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = _LOG_ERRORS_ONLY
    # Without VNNI, sums of two products of signed and unsigned integers would be cut off at 16 bits.
    options.add_session_config_entry("session.x64quantprecision", "1")
    return options


# Its exceptions derive from Exception alone and have no public common base.
_FAILURES = (
    ort.capi.onnxruntime_pybind11_state.Fail,
    ort.capi.onnxruntime_pybind11_state.InvalidArgument,
    ort.capi.onnxruntime_pybind11_state.InvalidGraph,
    ort.capi.onnxruntime_pybind11_state.InvalidProtobuf,
    ort.capi.onnxruntime_pybind11_state.NotImplemented,
    ort.capi.onnxruntime_pybind11_state.RuntimeException,
)
