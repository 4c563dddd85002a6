"""Models and an image on which everything mode finds many masks."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from segment_anything.modeling import Sam
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
