"""Which engine embeds the images of a Sam, and the float graphs that engines other than torch run."""

from __future__ import annotations

import copy
import hashlib
import logging
from pathlib import Path
from typing import Literal

import torch
from segment_anything.modeling import Sam
from torch import nn

from tinysam.lake.filesystem import read_bytes, write_once
from tinysam.modeling.image_encoder import TinyViTEncoder
from tinysam.quant.folder import with_encoder
from tinysam.quant.graph import export_graph
from tinysam.runtime.encoder import EngineImageEncoder
from tinysam.runtime.engine import EngineConfig, EngineError
from tinysam.weights import weights_folder

logger = logging.getLogger(__name__)

EngineChoice = Literal["auto", "torch", "compiled", "openvino", "onnxruntime"]
GRAPH_VERSION = 1
"""Raised when :func:`tinysam.quant.graph.export_graph` writes other graphs, so that cached ones are not used."""


def with_engine(sam: Sam, choice: EngineChoice = "auto", *, bf16: bool = False, graphs: Path | None = None) -> Sam:
    """A Sam whose image encoder runs on an engine; prompt encoder and mask decoder are shared with ``sam``.

    Args:
        sam: in eval mode. One whose encoder is an engine already, such as a quantized one, is returned as it is.
        choice: ``auto`` is ``openvino`` for a TinyViT on a CPU, where it takes a third of torch's time, and ``torch``
            everywhere else. ``compiled`` is ``torch.compile``, which takes minutes to start and so pays in long runs.
        bf16: let the engine compute in bfloat16, where it and the processor can. Torch's two take the precision of
            the autocast that they are called in instead.
        graphs: where exported graphs are kept, by the hash of their weights. None: ``graphs`` in
            ``tinysam.weights.weights_folder()``; not beside the checkpoint, which may lie in a bucket.

    Raises:
        EngineError: if the engine that was asked for cannot run this encoder.
    """
    if isinstance(sam.image_encoder, EngineImageEncoder):
        return sam
    if choice == "auto":
        return _automatic(sam, bf16, graphs)
    if choice == "torch":
        return sam
    if choice == "compiled":
        encoder = copy.deepcopy(sam.image_encoder)
        encoder.compile()
        return with_encoder(sam, encoder)
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
    return "torch" if encoder._compiled_call_impl is None else "torch compiled"


def _automatic(sam: Sam, bf16: bool, graphs: Path | None) -> Sam:
    if sam.device.type != "cpu" or not isinstance(sam.image_encoder, TinyViTEncoder):
        return sam
    try:
        return with_engine(sam, "openvino", bf16=bf16, graphs=graphs)
    except EngineError as error:
        logger.warning("the image encoder runs on torch, because %s", error)
        return sam


def _float_graph(sam: Sam, graphs: Path | None) -> bytes:
    """The image encoder's ONNX graph, from the cache or exported into it."""
    encoder, image_size = sam.image_encoder, sam.image_encoder.img_size
    path = (graphs or weights_folder() / "graphs") / f"{_identity(encoder, image_size)}.onnx"
    if path.exists():
        return read_bytes(str(path))
    graph: bytes = export_graph(encoder, image_size).SerializeToString()
    # Whole or not at all: other workers of this machine may look for it right now.
    write_once(str(path), graph)
    return graph


def _identity(encoder: nn.Module, image_size: int) -> str:
    """A hash of all that an exported graph depends on."""
    digest = hashlib.sha256(f"{GRAPH_VERSION} {torch.__version__} {image_size} {encoder}".encode())
    for name, value in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
