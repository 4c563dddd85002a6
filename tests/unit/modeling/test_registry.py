from __future__ import annotations

from dataclasses import replace

import pytest
import segment_anything
import torch
from segment_anything.modeling import Sam

from tinysam.modeling.registry import CONFIGS, SamConfig, TinyViTConfig, ViTConfig, build_sam, sam_model_registry


def shapes(sam: Sam) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in sam.state_dict().items()}


@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h"])
def test_vits_are_segment_anythings_own_models(name: str) -> None:
    with torch.device("meta"):  # ViT-H's shapes without its 2.4 GB
        ours, reference = sam_model_registry[name](), segment_anything.sam_model_registry[name]()
    assert shapes(ours) == shapes(reference)


def test_vit_t_has_the_published_size() -> None:
    with torch.device("meta"):
        sam = sam_model_registry["vit_t"]()
    # 10.13 M parameters are published, of which 0.32 M are a classification head that SAM never uses.
    assert sum(p.numel() for p in sam.parameters()) / 1e6 == pytest.approx(10.13 - 0.32, abs=0.01)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_builders_return_a_sam_in_eval_mode_that_knows_its_config(name: str) -> None:
    with torch.device("meta"):
        sam = sam_model_registry[name]()
    assert isinstance(sam, Sam)
    assert not sam.training
    assert sam.config == CONFIGS[name]
    assert sam.image_encoder.img_size == CONFIGS[name].image_size


@pytest.mark.parametrize("image_size", [64, 80, 176])
def test_embeddings_have_stride_16_at_any_size(image_size: int) -> None:
    config = SamConfig(
        image_size=image_size,
        prompt_embed_dim=16,
        encoder=TinyViTConfig(embed_dims=(8, 16, 16, 32), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)),
    )
    embedding = build_sam(config).image_encoder(torch.randn(2, 3, image_size, image_size))
    assert embedding.shape == (2, 16, image_size // 16, image_size // 16)


@pytest.mark.parametrize("image_size", [0, -16, 100])
def test_image_sizes_off_the_patch_grid_are_refused(image_size: int) -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        replace(CONFIGS["vit_t"], image_size=image_size)


@pytest.mark.parametrize("config", [*CONFIGS.values(), SamConfig(encoder=ViTConfig(depth=3), image_size=320)])
def test_configs_survive_json(config: SamConfig) -> None:
    import json

    assert SamConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_encoders_are_named() -> None:
    values = CONFIGS["vit_t"].to_dict()
    values["encoder"]["kind"] = "ResNet"
    with pytest.raises(ValueError, match="ResNet"):
        SamConfig.from_dict(values)
