"""What a quantized model costs and gains: size, speed, error, agreement of the masks, and the kernels that ran."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from segment_anything.modeling import Sam

from tinysam.quant.agreement import compare
from tinysam.quant.layers import ENCODER
from tinysam.quant.quantize import QuantizedEncoder, preprocess
from tinysam.runtime import EngineConfig, EngineImageEncoder, count_precisions, open_engine
from tinysam.runtime.processor import has_vnni
from tinysam.runtime.timing import interleaved_seconds

LAYER_KINDS = ("Convolution", "FullyConnected", "MatMul", "QLinearConv", "QLinearMatMul", "MatMulIntegerToFloat")
"""Engines' types of nodes that are a layer by themselves. OpenVINO fuses the products of an
attention into nodes called Subgraph."""


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """Measured on held-out images. Times (``_ms``) are milliseconds of one image through
    the encoder."""

    engine: str
    """The engine that ran the integer graph."""
    precision: str
    """Its arithmetic beside the integers."""
    num_threads: int
    vnni: bool
    """Whether the processor that was measured on has dot products of 8-bit integers; see ``has_vnni``."""
    layers: int
    layers_int8: int
    executed_int8: int
    """Nodes of ``LAYER_KINDS`` executed on 8-bit integers."""
    bytes_float_encoder: int
    """The float32 encoder as a graph, weights included."""
    bytes_int8_encoder: int
    embedding_relative_error: float
    """Mean over the images."""
    embedding_relative_error_worst: float
    embedding_cosine: float
    """Mean over the images."""
    mask_iou: float
    """Mean IoU of the quantized model's masks with the float model's, over a grid of clicks on each image."""
    mask_iou_90: float
    """Part of these masks with an IoU of at least 0.9."""
    predicted_iou_difference: float
    """Mean absolute difference of the predicted IoU."""
    torch_fp32_ms: float
    engine_fp32_ms: float
    """The float graph on the same engine."""
    int8_ms: float
    executed: dict[str, dict[str, int]]
    """Nodes that the engine executed, by kind and precision; see ``count_precisions``."""


def layer_table(encoder: QuantizedEncoder) -> list[dict[str, object]]:
    """A row for each layer of encoder and mask decoder, for JSON: the largest error first, then those without one.

    Keys: ``name`` (path in the Sam), ``kind``, ``precision``, ``reason`` (why it stays in float), ``activation_scales``
    and ``activation_zero_points`` (of each activation), ``weight_scales`` (lowest and highest of its channels),
    ``relative_error`` and ``sensitivity``; see ``LayerReport``.
    """
    rows = [
        asdict(layer)
        | {
            "name": prefix + layer.name,
            "weight_scales": (min(layer.weight_scales), max(layer.weight_scales)) if layer.weight_scales else (),
        }
        for prefix, layers in ((ENCODER, encoder.layers), ("", encoder.decoder_layers))
        for layer in layers
    ]
    return sorted(rows, key=lambda row: -1.0 if row["relative_error"] is None else row["relative_error"], reverse=True)


def measure(
    sam: Sam,
    quantized: Sam,
    encoder: QuantizedEncoder,
    images: Sequence[np.ndarray],
    *,
    repetitions: int = 3,
    on_image: Callable[[], None] = lambda: None,
) -> QuantizationReport:
    """Compares a quantized model with the float one.

    Args:
        sam: the float model.
        quantized: the model made from it; its image encoder is an ``EngineImageEncoder``.
        encoder: the graphs.
        images: held-out images, (H, W, 3) uint8 RGB.
        repetitions: how often each encoder is timed; they take turns.
        on_image: called after each image.
    """
    assert isinstance(quantized.image_encoder, EngineImageEncoder)
    engine = quantized.image_encoder.engine
    agreements = []
    for image in images:
        agreements.append(compare(sam, quantized, image))
        on_image()
    errors = [agreement.embedding.relative_error for agreement in agreements]
    ious = np.array([iou for agreement in agreements for iou in agreement.mask_iou])
    executed = engine.executed_layers()

    float_graph = encoder.float_model.SerializeToString()
    same_engine = EngineConfig(engine=engine.name, num_threads=engine.num_threads, precision="fp32")
    float_engine = open_engine(float_graph, same_engine)
    array = preprocess(sam, images[0])
    tensor = torch.from_numpy(array).to(sam.device)

    def run_torch() -> torch.Tensor:
        with torch.inference_mode():
            return sam.image_encoder(tensor)

    seconds = interleaved_seconds(
        {"torch": run_torch, "float": lambda: float_engine.run(array), "int8": lambda: engine.run(array)}, repetitions
    )
    return QuantizationReport(
        engine=engine.name,
        precision=engine.precision,
        num_threads=engine.num_threads,
        vnni=has_vnni(),
        layers=len(encoder.layers),
        layers_int8=encoder.num_int8,
        executed=count_precisions(executed),
        executed_int8=sum(layer.is_integer and layer.kind in LAYER_KINDS for layer in executed),
        bytes_float_encoder=len(float_graph),
        bytes_int8_encoder=encoder.model.ByteSize(),
        embedding_relative_error=float(np.mean(errors)),
        embedding_relative_error_worst=float(np.max(errors)),
        embedding_cosine=float(np.mean([agreement.embedding.cosine for agreement in agreements])),
        mask_iou=float(ious.mean()),
        mask_iou_90=float((ious >= 0.9).mean()),
        predicted_iou_difference=float(np.mean([agreement.predicted_iou_difference for agreement in agreements])),
        torch_fp32_ms=1000 * seconds["torch"],
        engine_fp32_ms=1000 * seconds["float"],
        int8_ms=1000 * seconds["int8"],
    )
