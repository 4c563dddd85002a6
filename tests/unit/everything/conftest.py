"""Models and an image on which everything mode finds many masks."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn
from torch.nn import functional as F


class BlobDecoder(nn.Module):
    """Stands in for a trained mask decoder: three nested blobs around the click, ragged where the image is.

    Random weights give masks that span the image and all have one box, on which suppression and the filters for crops
    cannot be tested.
    """

    def __init__(self, click: nn.Embedding) -> None:
        super().__init__()
        self.click = click

    def forward(
        self,
        image_embeddings: torch.Tensor,
        image_pe: torch.Tensor,
        sparse_prompt_embeddings: torch.Tensor,
        dense_prompt_embeddings: torch.Tensor,
        multimask_output: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert multimask_output
        position = sparse_prompt_embeddings[:, 0] - self.click.weight
        similarity = torch.einsum("bc,chw->bhw", position, image_pe[0]) / position.shape[1] * 2  # 1 at the click
        small = torch.stack([similarity - cutoff for cutoff in (0.7, 0.5, 0.3)], 1) * 24
        small = small + image_embeddings[:, :3]
        logits = F.interpolate(small, scale_factor=4, mode="bicubic")
        # Quality depends on the prompt alone, so that no two masks tie.
        quality = 0.8 + 0.2 * torch.sin(position[:, :3] * 40 + torch.tensor([0.0, 1.0, 2.0]))
        return logits, quality


@pytest.fixture(scope="session")
def blob_sam(tiny_sam: Sam) -> Sam:
    """tiny_sam with a ``BlobDecoder``. Do not modify."""
    sam = copy.deepcopy(tiny_sam)
    sam.mask_decoder = BlobDecoder(sam.prompt_encoder.point_embeddings[1])
    return sam.requires_grad_(False)


@pytest.fixture(scope="session")
def photograph() -> np.ndarray:
    """(140, 96, 3) uint8."""
    from skimage import data

    return np.ascontiguousarray(data.astronaut()[:420:3, :288:3])


BuildSam = Callable[..., Sam]


@pytest.fixture(scope="session")
def build_decoder() -> BuildSam:
    """Builds a Sam whose decoder has random weights, LayerNorms and biases included, and no image encoder."""

    def build(
        channels: int = 32, grid: tuple[int, int] = (6, 5), heads: int = 8, downsample: int = 2, seed: int = 0
    ) -> Sam:
        torch.manual_seed(seed)
        transformer = TwoWayTransformer(
            depth=2, embedding_dim=channels, num_heads=heads, mlp_dim=64, attention_downsample_rate=downsample
        )
        prompt_encoder = PromptEncoder(
            embed_dim=channels,
            image_embedding_size=grid,
            input_image_size=(16 * grid[0], 16 * grid[1]),
            mask_in_chans=16,
        )
        sam = Sam(nn.Identity(), prompt_encoder, MaskDecoder(transformer_dim=channels, transformer=transformer))
        with torch.no_grad():
            for name, parameter in sam.named_parameters():
                parameter += (0.3 if parameter.ndim == 1 else 0.1) * torch.randn_like(parameter)
                if "cross_attn" in name:
                    parameter *= 2  # so that attention is far from uniform and updates are as large as what they update
        return sam.eval().requires_grad_(False)

    return build
