"""Quantization: 8-bit integer image encoders, what they lose, and the folder that keeps them."""

from __future__ import annotations

from tinysam.quant.agreement import Agreement, compare
from tinysam.quant.folder import load_quantized, save_quantized, with_encoder
from tinysam.quant.layers import LayerReport
from tinysam.quant.quantize import (
    QuantizationConfig,
    QuantizationError,
    QuantizedEncoder,
    quantize_encoder,
)

__all__ = [
    "Agreement",
    "LayerReport",
    "QuantizationConfig",
    "QuantizationError",
    "QuantizedEncoder",
    "compare",
    "load_quantized",
    "quantize_encoder",
    "save_quantized",
    "with_encoder",
]
