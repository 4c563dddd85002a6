"""SAM's ViT with fused attention against segment-anything's own."""

from __future__ import annotations

import copy

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention

from tinysam.modeling.fused_attention import FusedAttention, fuse_attention


def encoder(image_size: int, dtype: torch.dtype) -> ImageEncoderViT:
    """Two windowed blocks and a global one, with relative positions that are not zero, as untrained ones are."""
    torch.manual_seed(0)
    vit = ImageEncoderViT(
        img_size=image_size,
        embed_dim=24,
        depth=3,
        num_heads=3,
        out_chans=16,
        use_rel_pos=True,
        window_size=5,
        global_attn_indexes=(1,),
    )
    for name, parameter in vit.named_parameters():
        if "rel_pos" in name or "pos_embed" in name:
            torch.nn.init.normal_(parameter)
    return vit.to(dtype).eval()


@pytest.mark.parametrize("image_size", [64, 176])  # of windows that fit, and of ones that need padding
def test_it_equals_segment_anythings(image_size: int) -> None:
    reference = encoder(image_size, torch.float64)
    fused = fuse_attention(copy.deepcopy(reference))
    images = torch.randn(2, 3, image_size, image_size, dtype=torch.float64)
    torch.testing.assert_close(fused(images), reference(images), rtol=1e-9, atol=1e-9)


def test_weights_keep_their_names_and_gradients_are_the_same() -> None:
    reference = encoder(80, torch.float64)
    fused = fuse_attention(encoder(80, torch.float64))
    fused.load_state_dict(reference.state_dict())
    images = torch.randn(1, 3, 80, 80, dtype=torch.float64)
    for vit in (reference, fused):
        vit(images).square().sum().backward()
    expected = dict(reference.named_parameters())
    for name, parameter in fused.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-7, atol=1e-7, msg=name)


def test_in_bfloat16_it_is_as_near_as_segment_anythings() -> None:
    exact, reference = encoder(176, torch.float64), encoder(176, torch.float32)
    fused = fuse_attention(copy.deepcopy(reference))
    images = torch.randn(1, 3, 176, 176)
    truth = exact(images.double()).float()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        errors = [(vit(images).float() - truth).norm() / truth.norm() for vit in (reference, fused)]
    assert errors[1] < 1.5 * errors[0] + 1e-3


def test_attention_without_relative_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="relative positions"):
        FusedAttention(Attention(dim=8, num_heads=2))
