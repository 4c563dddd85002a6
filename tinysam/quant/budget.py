"""Which layers to keep in float so that the embedding stays within an error budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx

from tinysam.quant.errors import DifferenceSum
from tinysam.quant.graph import Layer
from tinysam.quant.observe import Range
from tinysam.quant.qdq import ActivationType, insert_qdq
from tinysam.runtime import EngineConfig, open_engine


def layers_over_budget(
    model: onnx.ModelProto,
    layers: Sequence[Layer],
    ranges: Mapping[str, Range],
    images: Sequence[np.ndarray],
    max_error: float,
    *,
    activations: ActivationType = "int8",
    weight_bounds: Mapping[str, np.ndarray] | None = None,
    num_threads: int,
    on_layer: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The layers that must stay in float for the embedding's relative error to be at most ``max_error``.

    Each layer is quantized alone, and the error that it causes at the encoder's end is its sensitivity. Layers return
    to float in the order of it, as few as suffice. Our choice; takes one run of the encoder for each layer and image.

    Args:
        model: the float graph.
        layers: the layers to choose from.
        ranges: what the integers of each of their activations cover.
        images: (1, 3, S, S) float32 each, normalised; one or two do.
        max_error: largest relative error over ``images``.
        activations: see :func:`insert_qdq`.
        weight_bounds: see :func:`insert_qdq`.
        num_threads: CPU threads.
        on_layer: called after each layer; not at all when everything fits into the budget.

    Returns:
        Sensitivity by the name of each layer that has to stay in float, the worst first.
    """

    def embeddings(some: Sequence[Layer]) -> list[np.ndarray]:
        config = EngineConfig(engine="onnxruntime", num_threads=num_threads)
        quantized = insert_qdq(model, some, ranges, activations, weight_bounds)
        engine = open_engine(quantized.SerializeToString(), config)
        return [engine.run(image) for image in images]

    expected = embeddings([])

    def error(some: Sequence[Layer]) -> float:
        total = DifferenceSum()
        for a, b in zip(expected, embeddings(some), strict=True):
            total.add(a, b)
        return total.result().relative_error

    if error(layers) <= max_error:
        return {}
    sensitivity: dict[str, float] = {}
    for layer in layers:
        sensitivity[layer.name] = error([layer])
        on_layer()
    worst_first = sorted(layers, key=lambda layer: -sensitivity[layer.name])
    least, most = 1, len(layers)
    while least < most:
        middle = (least + most) // 2
        if error(worst_first[middle:]) <= max_error:
            most = middle
        else:
            least = middle + 1
    return {layer.name: sensitivity[layer.name] for layer in worst_first[:least]}
