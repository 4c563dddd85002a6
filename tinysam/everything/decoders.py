"""The decoders of everything mode behind one function: low-rank where that is cheaper, SAM's own elsewhere.

The low-rank one is ``tiled_decoder``'s on a CPU and torch's on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from segment_anything.modeling import Sam
from torch import Tensor

from tinysam.everything.config import Precision
from tinysam.everything.flops import DecoderShape, low_rank_pays
from tinysam.everything.low_rank import ALL_MASKS, MULTIMASK, LowRankDecoder, is_supported
from tinysam.everything.tiled_decoder import TiledDecoder, multiplies_bfloat16

CPU_DECODED_TOGETHER = 64
"""Prompts that a CPU decodes together: enough to share products, at 2 MB a prompt. A GPU takes all it is given."""


class DecodedPrompts(NamedTuple):
    """B prompts with M masks each, of which K are worth keeping."""

    predicted_iou: Tensor
    """(B, M)."""

    kept: Tensor
    """(B, M) bool: predicted IoU above the threshold asked for."""

    logits: Tensor
    """(K, S, S) of the masks kept, in the order of ``kept``."""


class PromptDecoder(Protocol):
    """Decodes point and box prompts of one image."""

    def decode(self, sparse: Tensor, min_iou: float) -> DecodedPrompts:
        """Makes SAM's three masks of each prompt and drops those whose predicted IoU is not above ``min_iou``.

        Args:
            sparse: (B, T, C) tokens of the prompt encoder.
            min_iou: -inf keeps all.

        Raises:
            FloatingPointError: a predicted IoU or a logit is not finite, as happens with damaged weights.
        """


class PlainDecoder:
    """SAM's own mask decoder, or any module with its signature."""

    def __init__(self, sam: Sam, embedding: Tensor) -> None:
        self.sam = sam
        self.embedding = embedding
        self.position = sam.prompt_encoder.get_dense_pe()

    @torch.no_grad()
    def decode(self, sparse: Tensor, min_iou: float) -> DecodedPrompts:
        no_mask = self.sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        logits, predicted_iou = self.sam.mask_decoder(
            image_embeddings=self.embedding,
            image_pe=self.position,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=no_mask.expand(len(sparse), -1, *self.position.shape[2:]),
            multimask_output=True,
        )
        kept = _above(predicted_iou, min_iou)
        return DecodedPrompts(predicted_iou, kept, _finite(logits[kept], "the mask logits"))


class LowRankImageDecoder:
    """``LowRankDecoder`` on one image: prompts that keep no mask are not upscaled."""

    def __init__(self, decoder: LowRankDecoder, embedding: Tensor) -> None:
        self.decoder = decoder
        self.image = decoder.share(embedding)
        self.on_cpu = embedding.device.type == "cpu"

    @torch.no_grad()
    def decode(self, sparse: Tensor, min_iou: float, masks: slice = MULTIMASK) -> DecodedPrompts:
        chunks = sparse.split(CPU_DECODED_TOGETHER) if self.on_cpu and len(sparse) else [sparse]
        parts = [self._decode_chunk(chunk, min_iou, masks) for chunk in chunks]
        return parts[0] if len(parts) == 1 else DecodedPrompts(*map(torch.cat, zip(*parts, strict=True)))

    def decode_all(self, sparse: Tensor) -> tuple[Tensor, Tensor]:
        """All of a prompt's masks, the single one first: logits (B, 4, S, S) and predicted IoUs (B, 4)."""
        decoded = self.decode(sparse, -torch.inf, ALL_MASKS)
        return decoded.logits.unflatten(0, decoded.predicted_iou.shape), decoded.predicted_iou

    def _decode_chunk(self, sparse: Tensor, min_iou: float, masks: slice) -> DecodedPrompts:
        decoded = self.decoder.decode(self.image, sparse, masks)
        kept = _above(decoded.predicted_iou, min_iou)
        prompts = kept.any(1).nonzero()[:, 0]
        logits = self.decoder.upscale(self.image, decoded, prompts)[kept[prompts]]
        return DecodedPrompts(decoded.predicted_iou, kept, _finite(logits, "the mask logits"))


class ImageDecoders:
    """Makes the decoder of each image of a batch.

    Args:
        sam: the model; its weights are rearranged once, so this lives as long as they stay as they are.
        dtype: of the low-rank decoder's products; the model's type by default. A CPU without tile registers for
            bfloat16 multiplies in float32 all the same.
    """

    def __init__(self, sam: Sam, dtype: torch.dtype | None = None) -> None:
        self.sam = sam
        self.dtype = dtype
        self._low_rank: LowRankDecoder | None = None

    def of(self, embedding: Tensor, prompts: int, tokens: int) -> PromptDecoder:
        """The cheaper decoder of an image; arguments as for ``low_rank_of``."""
        return self.low_rank_of(embedding, prompts, tokens) or PlainDecoder(self.sam, embedding)

    def low_rank_of(self, embedding: Tensor, prompts: int, tokens: int) -> LowRankImageDecoder | None:
        """The low-rank decoder of an image; None where SAM's own is cheaper, or not SAM's as it is known.

        Args:
            embedding: (1, C, h, w).
            prompts: how many prompts are going to be decoded, about.
            tokens: of each, without the output tokens: 2 for a point or a box, one more for each further point.
        """
        decoder = self.sam.mask_decoder
        if not is_supported(decoder):
            return None
        all_tokens = 1 + decoder.num_mask_tokens + tokens
        if not low_rank_pays(DecoderShape.of(self.sam), prompts, all_tokens):
            return None
        if self._low_rank is None:
            tiled = embedding.device.type == "cpu" and embedding.dtype == torch.float32
            self._low_rank = TiledDecoder(self.sam, self.dtype) if tiled else LowRankDecoder(self.sam, self.dtype)
        return LowRankImageDecoder(self._low_rank, embedding)


def decoder_precision(sam: Sam, precision: Precision) -> Precision:
    """In which the products of everything mode's decoder are computed on the model's device, for run records."""
    if precision == "float32" or sam.device.type != "cpu" or not is_supported(sam.mask_decoder):
        return precision
    return "bfloat16" if multiplies_bfloat16(sam.mask_decoder) else "float32"


def _above(predicted_iou: Tensor, min_iou: float) -> Tensor:
    return _finite(predicted_iou, "the predicted IoU") > min_iou


def _finite(values: Tensor, what: str) -> Tensor:
    if not torch.isfinite(values.sum()):  # which one number that is not finite decides, in a tenth of the time
        raise FloatingPointError(f"{what} of a prompt is NaN or infinite: the checkpoint's mask decoder is damaged")
    return values
