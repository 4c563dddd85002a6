"""Linear layers in 8 bits, as far as a CPU can run them: torchao's int8 has kernels for it."""

from __future__ import annotations

import pytest
import torch
from segment_anything.modeling import Sam
from torch import nn

from tinysam.quant.folder import with_encoder
from tinysam.runtime import EngineError
from tinysam.runtime.choice import EngineChoice, engine_name, with_engine
from tinysam.runtime.eight_bit import EightBitEncoder, is_quantized


@torch.no_grad()
@pytest.mark.parametrize("bf16", [False, True])
def test_int8_embeds_nearly_as_the_encoder_that_it_was_made_of(tiny_sam: Sam, bf16: bool) -> None:
    images = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in tiny_sam.image_encoder.state_dict().items()}
    expected = tiny_sam.image_encoder(images)
    encoder = EightBitEncoder(tiny_sam.image_encoder, "int8")
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found = encoder(images)
    error = (found.float() - expected).norm() / expected.norm()
    assert 0 < error < 0.05
    for name, value in tiny_sam.image_encoder.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_its_name_says_what_it_computes_with(tiny_sam: Sam) -> None:
    sam = with_encoder(tiny_sam, EightBitEncoder(tiny_sam.image_encoder, "int8"))
    assert engine_name(sam) == "torch int8"
    assert sam.image_encoder.img_size == tiny_sam.image_encoder.img_size


@pytest.mark.parametrize("engine", ["int8", "fp8"])
def test_a_cpu_is_pointed_to_its_own_integers(tiny_sam: Sam, engine: EngineChoice) -> None:
    with pytest.raises(EngineError, match=r"runs on GPUs.*quantize\.py"):
        with_engine(tiny_sam, engine)


def test_fp8_needs_a_gpu_that_has_it(tiny_sam: Sam) -> None:
    with pytest.raises(EngineError, match="cannot multiply fp8"):
        EightBitEncoder(tiny_sam.image_encoder, "fp8")


def test_only_linear_layers_of_sides_that_kernels_take_are_quantized() -> None:
    assert is_quantized(nn.Linear(32, 48))
    assert not is_quantized(nn.Linear(32, 5))
    assert not is_quantized(nn.Conv2d(16, 16, 1))
