"""From images and points to what the mask decoder takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from segment_anything.modeling import Sam

from tinysam.predictor import ResizeLongestSide


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """What the decoder needs of an image or a crop of one."""

    embedding: torch.Tensor
    """(1, C, h, w)."""

    size: tuple[int, int]
    """(height, width) of the pixels it was made from."""

    input_size: tuple[int, int]
    """(height, width) after resizing and before padding."""


@torch.no_grad()
def encode(sam: Sam, images: Sequence[np.ndarray], dtype: torch.dtype | None = None) -> list[EncodedImage]:
    """Embeds (H, W, 3) uint8 images, of any sizes, in one batch.

    Args:
        dtype: of the encoder's products, by autocast; the model's type by default.

    Raises:
        FloatingPointError: an embedding is not finite, as happens with damaged weights.
    """
    transform = ResizeLongestSide(sam.image_encoder.img_size)
    resized = [torch.from_numpy(transform.apply_image(image)).permute(2, 0, 1).to(sam.device) for image in images]
    batch = torch.stack([sam.preprocess(image) for image in resized])
    with torch.autocast(batch.device.type, dtype=dtype, enabled=dtype is not None):
        embeddings = sam.image_encoder(batch).to(batch.dtype)
    if not torch.isfinite(embeddings).all():
        raise FloatingPointError("the image embedding holds NaN or infinity: the checkpoint's encoder is damaged")
    return [
        EncodedImage(embedding=embedding[None], size=image.shape[:2], input_size=(small.shape[1], small.shape[2]))
        for embedding, image, small in zip(embeddings, images, resized, strict=True)
    ]


@torch.no_grad()
def embed_points(sam: Sam, encoded: EncodedImage, points: np.ndarray) -> torch.Tensor:
    """The prompt encoder's tokens (B, 2, C) of (B, 2) points, each a foreground click of its own, in image pixels."""
    coords = ResizeLongestSide(sam.image_encoder.img_size).apply_coords(points, encoded.size)
    coords = torch.as_tensor(coords, device=sam.device)[:, None]
    labels = torch.ones(coords.shape[:2], dtype=torch.int, device=sam.device)
    sparse, _ = sam.prompt_encoder(points=(coords, labels), boxes=None, masks=None)
    return sparse


def embedding_at(sam: Sam, encoded: EncodedImage, points: np.ndarray) -> torch.Tensor:
    """The image embedding (B, C) where (B, 2) points lie, in image pixels: that of the embedding's cell."""
    height, width = encoded.embedding.shape[2:]
    in_input = points / encoded.size[::-1] * encoded.input_size[::-1]
    cells = np.floor(in_input / sam.image_encoder.img_size * (width, height)).astype(np.int64)
    columns, rows = torch.from_numpy(cells.clip(0, (width - 1, height - 1))).T.to(encoded.embedding.device)
    return encoded.embedding[0, :, rows, columns].T
