"""A small quantized model, made once."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from PIL import Image
from segment_anything.modeling import Sam

from tinysam.quant import QuantizationConfig, QuantizedEncoder, quantize_encoder
from tinysam.quant.graph import Layer, find_layers


@pytest.fixture(scope="session")
def images() -> list[np.ndarray]:
    """Smooth random images of several shapes, (H, W, 3) uint8; the last two are for measuring."""
    rng = np.random.default_rng(0)
    sizes = [(160, 120), (120, 160), (128, 128), (200, 90), (90, 120)]
    coarse = [Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)) for _ in sizes]
    return [np.asarray(image.resize(size)) for image, size in zip(coarse, sizes, strict=True)]


@pytest.fixture(scope="session")
def everything() -> QuantizationConfig:
    """Quantizes all that can be, over the whole range seen."""
    return QuantizationConfig(method="minmax", activations="int8", attention_products=True)


@pytest.fixture(scope="session")
def quantized(tiny_sam: Sam, images: list[np.ndarray], everything: QuantizationConfig) -> QuantizedEncoder:
    return quantize_encoder(tiny_sam, images[:3], images[3:], everything, num_threads=1)


@pytest.fixture(scope="session")
def float_model(quantized: QuantizedEncoder) -> onnx.ModelProto:
    return quantized.float_model


@pytest.fixture(scope="session")
def layers(float_model: onnx.ModelProto) -> list[Layer]:
    return find_layers(float_model)
