"""SAM's mask decoder for several images at once, showing the tokens that distillation compares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, Sam

from tinysam.distill.frame import LOW_RES_STRIDE, TARGET_STRIDE
from tinysam.distill.prompts import Prompts, embed_prompts


@dataclass(frozen=True)
class Decoded:
    """What the decoder says of ``N`` prompts."""

    tokens: torch.Tensor
    """``(N, T, C)`` output tokens of the two-way transformer: IoU, four masks, then the prompt's."""
    logits: torch.Tensor
    """``(N, 4, h, w)`` low-resolution mask logits; the first is the single-mask output."""
    predicted_iou: torch.Tensor
    """``(N, 4)``."""


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
) -> Decoded:
    """Decodes ``N = B * P`` prompts, the first P of them on the first image and so on.

    The arithmetic is ``MaskDecoder.predict_masks``'s, which takes one image only and keeps its tokens to itself.

    Args:
        embeddings: ``(B, C, s, s)``.
        positions: ``(B, C, s, s)`` from :func:`dense_positions`.
        prompts: ``N`` prompts.
        mask_logits: ``(N, 1, 4s, 4s)`` mask prompts, or None.
    """
    decoder: MaskDecoder = sam.mask_decoder
    encoder = sam.prompt_encoder
    n, (_, channels, height, width) = len(prompts.points), embeddings.shape
    repeats = n // len(embeddings)

    output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([output_tokens.expand(n, -1, -1), embed_prompts(encoder, prompts)], 1)
    if mask_logits is None:
        dense = encoder.no_mask_embed.weight.view(1, channels, 1, 1)
    else:
        dense = encoder.mask_downscaling(mask_logits)
    source = embeddings.repeat_interleave(repeats, 0) + dense

    tokens, source = decoder.transformer(source, positions.repeat_interleave(repeats, 0), tokens)
    upscaled = decoder.output_upscaling(source.transpose(1, 2).reshape(n, channels, height, width))
    mask_tokens = tokens[:, 1 : 1 + decoder.num_mask_tokens]
    weights = torch.stack([mlp(mask_tokens[:, i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], 1)
    # The upscaled pixels lie in memory channels last; multiplied in this order, so does their gradient.
    logits = upscaled.flatten(2).transpose(1, 2) @ weights.transpose(1, 2)
    logits = logits.transpose(1, 2).contiguous().unflatten(2, upscaled.shape[2:])
    return Decoded(tokens, logits, decoder.iou_prediction_head(tokens[:, 0]))
