"""Image encoders on a GPU whose linear layers multiply in 8 bits, by torchao."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import nn

from tinysam.runtime.engine import EngineError

EightBit = Literal["int8", "fp8"]
FP8_CAPABILITY = (8, 9)
"""Compute capability from which on NVIDIA's GPUs multiply fp8."""
MULTIPLE = 16
"""Of both sides of a weight, for the kernels."""


class EightBitEncoder(nn.Module):
    """A copy of an image encoder, with the same inputs and outputs, whose linear layers multiply in 8 bits.

    Weights have a scale for each output channel. Activations are rounded as they come, with a scale for each token, so
    nothing is calibrated. All else keeps its type, or that of the autocast that the encoder is called in.

    Args:
        encoder: in eval mode; not changed.
        kind: of 8 bits.

    Raises:
        EngineError: torchao is not installed, or this GPU cannot multiply fp8.
    """

    def __init__(self, encoder: nn.Module, kind: EightBit) -> None:
        super().__init__()
        self.kind = kind
        self.img_size = encoder.img_size
        self.encoder = in_eight_bits(encoder, kind)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, 3, S, S)`` normalised images to ``(B, C, S / 16, S / 16)``."""
        embeddings: torch.Tensor = self.encoder(x)
        return embeddings


def in_eight_bits(module: nn.Module, kind: EightBit) -> nn.Module:
    """A copy of a module whose linear layers multiply in 8 bits; raises as ``EightBitEncoder`` does."""
    try:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Int8DynamicActivationInt8WeightConfig,
            PerRow,
            quantize_,
        )
    except ImportError as error:
        raise EngineError(f"{kind} needs torchao ({error}); install tinysam[gpu]") from error
    device = next(module.parameters()).device
    if kind == "fp8":
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
            raise EngineError(f"{device} cannot multiply fp8; take int8, or torch, which computes in bfloat16")
        config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    else:
        config = Int8DynamicActivationInt8WeightConfig()
    module = copy.deepcopy(module)
    quantize_(module, config, filter_fn=lambda layer, name: is_quantized(layer))
    return module


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer is one that 8 bits are used for."""
    if not isinstance(module, nn.Linear):
        return False
    return module.in_features % MULTIPLE == 0 and module.out_features % MULTIPLE == 0
