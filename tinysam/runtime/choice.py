"""Which engine runs a Sam's image encoder."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Literal

from segment_anything.modeling import Sam

from tinysam.modeling.image_encoder import TinyViTEncoder
from tinysam.quant.folder import with_encoder
from tinysam.quant.graph import export_graph
from tinysam.runtime.eight_bit import EightBit, EightBitEncoder
from tinysam.runtime.encoder import EngineImageEncoder
from tinysam.runtime.engine import EngineConfig, EngineError, EngineName
from tinysam.runtime.graphs import cached_graph, default_folder, identity, require_finite
from tinysam.runtime.linear_speed import Kind, linear_seconds

logger = logging.getLogger(__name__)

TorchEngine = Literal["torch", "compiled", EightBit]
EngineChoice = Literal["auto", TorchEngine, EngineName]
GRAPH_VERSION = 2
"""Raised when :func:`tinysam.quant.graph.export_graph` writes other graphs, so that cached ones are not used."""


def with_engine(sam: Sam, choice: EngineChoice = "auto", *, bf16: bool = False, graphs: Path | None = None) -> Sam:
    """A Sam whose image encoder runs on an engine; prompt encoder and mask decoder are shared with ``sam``.

    Args:
        sam: in eval mode. An encoder that is an engine already, such as a quantized one, stays as it is.
        choice: on a CPU, ``auto`` is ``openvino`` for a TinyViT, which takes a third of torch's time for it; other
            encoders stay on torch. On a GPU it is torch, unless ``bf16`` is asked for and a measurement of half a
            minute finds the encoder's linear layers faster in 8 bits (``linear_speed``); it is logged. ``compiled`` is
            ``torch.compile`` for the encoder, which takes minutes to start and so pays in long runs; ``int8`` and
            ``fp8`` are that with 8-bit linear layers, on GPUs.
        bf16: let the engine compute the encoder in bfloat16, where it and the processor can. Torch's engines take the
            precision of the autocast that they are called in instead.
        graphs: where exported graphs are kept, by the hash of their weights. None: ``graphs`` in
            ``tinysam.weights.weights_folder()``; not beside the checkpoint, which may lie in a bucket.

    Raises:
        EngineError: if the engine that was asked for cannot run this encoder.
        FloatingPointError: if one of the encoder's weights is NaN or infinite.
    """
    if choice == "torch" or isinstance(sam.image_encoder, EngineImageEncoder):
        return sam
    if choice == "auto":
        return _automatic(sam, bf16, graphs)
    if choice in ("int8", "fp8") and sam.device.type != "cuda":
        raise EngineError(f"{choice} runs on GPUs, the model is on {sam.device}; pipelines/quantize.py is for CPUs")
    if choice == "compiled" or choice == "int8" or choice == "fp8":
        return _compiled(sam, choice)
    if sam.device.type != "cpu":
        raise EngineError(f"{choice} runs on CPUs, the model is on {sam.device}; choose torch or compiled")
    config = EngineConfig(engine=choice, precision="auto" if bf16 and choice == "openvino" else "fp32")
    return with_encoder(sam, EngineImageEncoder(_float_graph(sam, graphs), config))


def engine_name(sam: Sam) -> str:
    """What embeds the images of ``sam``, for run records: ``torch``, ``openvino fp32``, ``onnxruntime fp32`` …"""
    encoder = sam.image_encoder
    if isinstance(encoder, EngineImageEncoder):
        return f"{encoder.engine.name} {encoder.engine.precision}"
    # The attribute that nn.Module.compile() sets has no public name.
    compiled = "torch" if encoder._compiled_call_impl is None else "torch compiled"
    return f"{compiled} {encoder.kind}" if isinstance(encoder, EightBitEncoder) else compiled


def _automatic(sam: Sam, bf16: bool, graphs: Path | None) -> Sam:
    if sam.device.type == "cuda":
        return fastest_on_gpu(sam) if bf16 else sam
    if not isinstance(sam.image_encoder, TinyViTEncoder):
        return sam
    try:
        return with_engine(sam, "openvino", bf16=bf16, graphs=graphs)
    except EngineError as error:
        logger.warning("the model runs on torch, because %s", error)
        return sam


def fastest_on_gpu(sam: Sam) -> Sam:
    """Torch in bfloat16, or compiled in 8 bits where they are faster."""
    seconds = linear_seconds(sam.image_encoder)
    fastest: Kind = min(seconds, key=seconds.__getitem__, default="bf16")
    measured = ", ".join(f"{kind} {1000 * spent:.2f} ms" for kind, spent in seconds.items())
    logger.info("the image encoder runs in %s: an image's linear layers take %s", fastest, measured or "no time")
    return sam if fastest == "bf16" else _compiled(sam, fastest)


def _compiled(sam: Sam, choice: Literal["compiled", EightBit]) -> Sam:
    encoder = copy.deepcopy(sam.image_encoder) if choice == "compiled" else EightBitEncoder(sam.image_encoder, choice)
    encoder.compile()
    return with_encoder(sam, encoder)


def _float_graph(sam: Sam, graphs: Path | None) -> bytes:
    """The image encoder's ONNX graph, from the cache or exported into it."""
    encoder, image_size = sam.image_encoder, sam.image_encoder.img_size
    require_finite(encoder, "the checkpoint's image encoder")
    path = (graphs or default_folder()) / f"{identity(encoder, GRAPH_VERSION, image_size)}.onnx"
    return cached_graph(path, lambda: export_graph(encoder, image_size).SerializeToString())
