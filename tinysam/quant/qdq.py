"""Integer graphs: QuantizeLinear and DequantizeLinear around the layers, placed by ONNX Runtime's quantizer.

Every activation gets one scale, every output channel of a weight its own. Weights are symmetric int8
(``w = scale * q``), and so are activations, or else uint8 with a zero point (``x = scale * (q - zero_point)``). Biases,
and everything that is no layer, stay float. Engines turn a layer whose inputs are dequantized into an integer kernel;
OpenVINO does so for all of them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType, TensorData, TensorsData

from tinysam.quant.graph import Layer
from tinysam.quant.observe import Range

ActivationType = Literal["int8", "uint8"]

LARGEST = 127
"""A symmetric scale is the bound over this: of an int8, -127 to 127 is used, as integer kernels prefer it."""

_PRODUCER = "tinysam"


def insert_qdq(
    model: onnx.ModelProto,
    layers: Sequence[Layer],
    ranges: Mapping[str, Range],
    activations: ActivationType = "int8",
    weight_bounds: Mapping[str, np.ndarray] | None = None,
) -> onnx.ModelProto:
    """Quantizes ``layers`` of a float graph and leaves the others as they are.

    Args:
        model: a graph of :func:`tinysam.quant.graph.export_graph`; not changed.
        layers: some of its layers.
        ranges: what the integers of each of their activations cover.
        activations: int8, symmetric; or uint8, of which all values are used where a range is one-sided, too.
        weight_bounds: by weight's name, (output channels,) the largest absolute value that the integers of each
            channel cover. Weights without one are covered whole.

    Returns:
        The QDQ graph, with int8 weights.

    Raises:
        ValueError: if a range is missing, empty or not finite.
    """
    names = list(dict.fromkeys(name for layer in layers for name in layer.inputs))
    bad = [name for name in names if name not in ranges or not 0.0 < ranges[name].bound < math.inf]
    if bad:
        raise ValueError(f"no range for the activations {', '.join(bad)}")
    if not layers:
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    covered = {
        name: TensorData(lowest=np.float32(ranges[name].low), highest=np.float32(ranges[name].high)) for name in names
    }
    with _quiet():
        quantizer = QDQQuantizer(
            copy,
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QInt8 if activations == "int8" else QuantType.QUInt8,
            tensors_range=TensorsData(CalibrationMethod.MinMax, covered),
            nodes_to_quantize=[layer.name for layer in layers],
            nodes_to_exclude=[],
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            extra_options={
                "ActivationSymmetric": activations == "int8",
                "WeightSymmetric": True,
                "QuantizeBias": False,
                # A result is rounded only where the next layer takes it as input: one rounding instead of two.
                "OpTypesToExcludeOutputQuantization": ["Conv", "Gemm", "MatMul"],
                "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1},
                "TensorQuantOverrides": _overrides(layers, weight_bounds or {}),
            },
        )
        quantizer.quantize_model()
    _keep_others_float(quantizer.model.graph(), {layer.name for layer in layers})
    quantizer.model.topological_sort()
    quantized = quantizer.model.model
    quantized.producer_name = _PRODUCER
    return quantized


def activation_steps(model: onnx.ModelProto) -> dict[str, tuple[float, int]]:
    """The scale and the zero point of each quantized activation of a QDQ graph."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    return {
        node.input[0]: (
            float(numpy_helper.to_array(constants[node.input[1]])),
            int(numpy_helper.to_array(constants[node.input[2]])),
        )
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    }


def weight_scales(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """The scales of each quantized layer's weight, (output channels,) float32, by the layer's name."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    scale_of = {
        node.output[0]: constants[node.input[1]]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in constants
    }
    return {
        node.name: np.atleast_1d(numpy_helper.to_array(scale_of[node.input[1]]))
        for node in model.graph.node
        if len(node.input) > 1 and node.input[1] in scale_of
    }


def _overrides(layers: Sequence[Layer], bounds: Mapping[str, np.ndarray]) -> dict[str, list[dict[str, object]]]:
    """Weight bounds as ONNX Runtime's quantizer takes them."""
    return {
        layer.weight: [
            {"axis": 0 if layer.kind == "conv" else 1, "rmin": np.float32(-bound), "rmax": np.float32(bound)}
            for bound in bounds[layer.weight]
        ]
        for layer in layers
        if layer.weight is not None and layer.weight in bounds
    }


def _keep_others_float(graph: onnx.GraphProto, quantized: set[str]) -> None:
    """Gives every node but the layers the activation as it was: the quantizer rounds it for all that read it.

    What reads a layer's input beside the layer is a residual connection, whose rounding errors would add up.
    """
    source = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    original = {
        node.output[0]: source[node.input[0]]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in source
    }
    for node in graph.node:
        if node.name not in quantized:
            node.input[:] = [original.get(name, name) for name in node.input]


@contextmanager
def _quiet() -> Iterator[None]:
    """Holds back the quantizer's warnings, which go to the root logger: it advises to optimise the graph first."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
