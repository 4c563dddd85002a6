"""SAM's mask decoder for several images at once, showing the tokens that distillation compares."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, Sam

from tinysam.distill.frame import EMBEDDING_STRIDE, LOW_RES_STRIDE, TARGET_STRIDE
from tinysam.distill.prompts import Prompts, embed_prompts
from tinysam.distill.two_way import two_way

CELL_PIXELS = (EMBEDDING_STRIDE // LOW_RES_STRIDE) ** 2
"""Pixels of a mask of low resolution in a cell of the embedding."""


@dataclass(frozen=True)
class Decoded:
    """What the decoder says of ``N`` prompts."""

    tokens: torch.Tensor
    """``(N, T, C)`` output tokens of the two-way transformer: IoU, four masks, then the prompt's."""
    logits: torch.Tensor
    """``(N, 4, h, w)`` low-resolution mask logits; the first is the single-mask output."""
    predicted_iou: torch.Tensor
    """``(N, 4)``."""
    image: torch.Tensor
    """``(N, s * s, C)`` image tokens, from which the logits are made."""
    hyper: torch.Tensor
    """``(N, 4, C / 8)``, what each mask multiplies the upscaled image by."""


def dense_positions(sam: Sam, origins: torch.Tensor, size: int) -> torch.Tensor:
    """Positional encodings of crops of the model's frame.

    Args:
        origins: ``(B, 2)`` int64 (x, y) of the crops in embedding pixels.
        size: side of the crops in embedding pixels.

    Returns:
        ``(B, C, size, size)``.
    """
    frame = sam.prompt_encoder.get_dense_pe()[0]
    # Indices rather than slices: a GPU need not tell the CPU where the crops are, for which it would have to stop.
    columns, rows = (origins[:, axis, None] + torch.arange(size, device=origins.device) for axis in (0, 1))
    return frame[:, rows[:, :, None], columns[:, None]].transpose(0, 1)


def at_target_stride(logits: torch.Tensor) -> torch.Tensor:
    """Low-resolution logits, ``(N, M, h, w)``, resized to the ground truth's frame as SAM resizes them to the image:
    ``(N, M, 2h, 2w)`` float32.
    """
    return F.interpolate(logits.float(), scale_factor=LOW_RES_STRIDE / TARGET_STRIDE, mode="bilinear")


def decode(
    sam: Sam,
    embeddings: torch.Tensor,
    positions: torch.Tensor,
    prompts: Prompts,
    mask_logits: torch.Tensor | None = None,
    *,
    differentiable_logits: bool = True,
) -> Decoded:
    """Decodes ``N = B * P`` prompts, the first P of them on the first image and so on.

    Says the same as ``MaskDecoder.predict_masks``, which takes one image only and keeps its tokens to itself.

    Args:
        embeddings: ``(B, C, s, s)``.
        positions: ``(B, C, s, s)`` from :func:`dense_positions`.
        prompts: ``N`` prompts.
        mask_logits: ``(N, 1, 4s, 4s)`` mask prompts, or None.
        differentiable_logits: False makes the logits without their gradients, for :func:`cell_logits`.
    """
    decoder: MaskDecoder = sam.mask_decoder
    encoder = sam.prompt_encoder
    n, (_, channels, height, width) = len(prompts.points), embeddings.shape

    output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([output_tokens.expand(n, -1, -1), embed_prompts(encoder, prompts)], 1)
    if mask_logits is None:
        image = embeddings + encoder.no_mask_embed.weight.view(1, channels, 1, 1)
    else:
        image = embeddings.repeat_interleave(n // len(embeddings), 0) + encoder.mask_downscaling(mask_logits)
    tokens, image = two_way(decoder.transformer, _as_tokens(image), _as_tokens(positions), tokens)

    mask_tokens = tokens[:, 1 : 1 + decoder.num_mask_tokens]
    hyper = torch.stack([mlp(mask_tokens[:, i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], 1)
    with nullcontext() if differentiable_logits else torch.no_grad():
        logits = _masks(decoder, image.transpose(1, 2).unflatten(2, (height, width)), hyper)
    return Decoded(tokens, logits, decoder.iou_prediction_head(tokens[:, 0]), image, hyper)


def cell_logits(sam: Sam, decoded: Decoded, cells: torch.Tensor) -> torch.Tensor:
    """The logits of some of the embedding's cells, ``(N, K)`` indices in it, as ``(N, 4, K, 16)``.

    SAM upscales each cell of an embedding by itself, so these are the values of ``decoded.logits`` there.
    """
    chosen = decoded.image.gather(1, cells[..., None].expand(-1, -1, decoded.image.shape[2]))
    # Cells side by side in a picture of one row, which the convolutions do not mix.
    masks = _masks(sam.mask_decoder, chosen.transpose(1, 2)[:, :, None], decoded.hyper)
    return cell_pixels(masks)


def cell_pixels(masks: torch.Tensor) -> torch.Tensor:
    """``(N, M, 4h, 4w)`` masks of low resolution, ordered by the embedding's cells: ``(N, M, h * w, 16)``."""
    side = EMBEDDING_STRIDE // LOW_RES_STRIDE
    n, m, height, width = masks.shape
    cells = masks.reshape(n, m, height // side, side, width // side, side).transpose(3, 4)
    return cells.reshape(n, m, -1, CELL_PIXELS)


def _as_tokens(image: torch.Tensor) -> torch.Tensor:
    """``(B, C, h, w)`` as ``(B, h * w, C)``."""
    return image.flatten(2).transpose(1, 2)


def _masks(decoder: MaskDecoder, image: torch.Tensor, hyper: torch.Tensor) -> torch.Tensor:
    """Logits ``(N, 4, 4h, 4w)`` of images ``(N, C, h, w)`` and what masks multiply their upscaled channels by."""
    upscaled = decoder.output_upscaling(image)
    # The upscaled pixels lie in memory channels last; multiplied in this order, so does their gradient.
    logits = upscaled.flatten(2).transpose(1, 2) @ hyper.transpose(1, 2)
    return logits.transpose(1, 2).contiguous().unflatten(2, upscaled.shape[2:])
