"""What quantization changes: layer by layer, and at the end of the encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import onnx
from onnxruntime.quantization.onnx_model import ONNXModel

from tinysam.quant.graph import Layer
from tinysam.quant.observe import groups_of, run_outputs, session_with_outputs

_SUFFIX = ".int8"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """How far an array is from the one it should be."""

    relative_error: float
    """Length of the difference over the length of what it should be; 0 where both are 0."""
    cosine: float
    """Cosine of the angle between the two; 1 where either is 0."""


class DifferenceSum:
    """Adds up the difference over several arrays, as if they were one."""

    def __init__(self) -> None:
        self._expected = self._actual = self._product = self._difference = 0.0

    def add(self, expected: np.ndarray, actual: np.ndarray) -> None:
        """Takes two float arrays of one shape."""
        a, b = expected.ravel(), actual.ravel()
        difference = b - a
        # Sums of float32 products in numpy's pairwise order are exact enough for a ratio, and fast.
        self._expected += float(np.dot(a, a))
        self._actual += float(np.dot(b, b))
        self._product += float(np.dot(a, b))
        self._difference += float(np.dot(difference, difference))

    def result(self) -> Difference:
        """The difference so far."""
        lengths = (self._expected * self._actual) ** 0.5
        return Difference(
            relative_error=(self._difference / self._expected) ** 0.5 if self._expected else float(self._actual > 0),
            cosine=min(self._product / lengths, 1.0) if lengths else 1.0,
        )


def difference(expected: np.ndarray, actual: np.ndarray) -> Difference:
    """How far ``actual`` is from ``expected``; both are float arrays of one shape."""
    total = DifferenceSum()
    total.add(expected, actual)
    return total.result()


def layer_errors(
    model: onnx.ModelProto,
    quantized: onnx.ModelProto,
    layers: Sequence[Layer],
    images: Iterable[np.ndarray],
    *,
    num_threads: int,
) -> dict[str, Difference]:
    """What each layer alone gets wrong: its quantized form, given the activations of the float model.

    Args:
        model: the float graph.
        quantized: the QDQ graph made from it.
        layers: the quantized layers.
        images: (1, 3, S, S) float32 each, normalised.
        num_threads: CPU threads.

    Returns:
        By layer's name, the error of its result over all images.
    """
    both = _with_integer_branches(model, quantized, layers)
    sums = {layer.name: DifferenceSum() for layer in layers}
    outputs = [name for layer in layers for name in (layer.output, layer.output + _SUFFIX)]
    session = session_with_outputs(both, outputs, num_threads)
    groups = groups_of(both, layers, lambda layer: (layer.output, layer.output + _SUFFIX))
    for image in images:
        for group in groups:
            values = run_outputs(session, [n for layer in group for n in (layer.output, layer.output + _SUFFIX)], image)
            for layer, expected, actual in zip(group, values[::2], values[1::2], strict=True):
                sums[layer.name].add(expected, actual)
    return {name: total.result() for name, total in sums.items()}


def _with_integer_branches(
    model: onnx.ModelProto, quantized: onnx.ModelProto, layers: Sequence[Layer]
) -> onnx.ModelProto:
    """The float graph, with the quantized form of each layer beside the layer."""
    both = onnx.ModelProto()
    both.CopyFrom(model)
    graph = both.graph
    present = {tensor.name for tensor in graph.initializer}
    graph.initializer.extend(tensor for tensor in quantized.graph.initializer if tensor.name not in present)
    names = {layer.name for layer in layers}
    for node in quantized.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            graph.node.append(node)
        elif node.name in names:
            branch = graph.node.add()
            branch.CopyFrom(node)
            branch.name += _SUFFIX
            branch.output[0] += _SUFFIX
    known = {info.name: info for info in (*graph.value_info, *graph.output)}
    for layer in layers:
        info = graph.value_info.add()
        info.CopyFrom(known[layer.output])
        info.name += _SUFFIX
    extended = ONNXModel(both)
    extended.topological_sort()
    return extended.model
