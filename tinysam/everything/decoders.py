"""The decoders of everything mode behind one function: low-rank where that is cheaper, SAM's own elsewhere.

The low-rank one runs on an engine where the model carries one and the prompts are many (``graph_decoder``).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from segment_anything.modeling import Sam
from torch import Tensor

from tinysam.everything.flops import DecoderShape, low_rank_pays
from tinysam.everything.graph_decoder import POINT_TOKENS, PROMPTS, DecoderEngines
from tinysam.everything.low_rank import LowRankDecoder, is_supported

CPU_DECODED_TOGETHER = PROMPTS
"""Prompts that a CPU decodes together. A GPU takes all it is given."""

PROMPTS_FOR_ENGINES = 100
"""Prompts an image from which on graphs are worth the second that it takes to open them."""


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

    def decode(self, sparse: Tensor, min_iou: float, multimask_output: bool = True) -> DecodedPrompts:
        """Decodes prompts and drops masks whose predicted IoU is not above ``min_iou``.

        Args:
            sparse: (B, T, C) tokens of the prompt encoder.
            min_iou: -inf keeps all.
            multimask_output: SAM's three masks rather than its single one.

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
    def decode(self, sparse: Tensor, min_iou: float, multimask_output: bool = True) -> DecodedPrompts:
        no_mask = self.sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        logits, predicted_iou = self.sam.mask_decoder(
            image_embeddings=self.embedding,
            image_pe=self.position,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=no_mask.expand(len(sparse), -1, *self.position.shape[2:]),
            multimask_output=multimask_output,
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
    def decode(self, sparse: Tensor, min_iou: float, multimask_output: bool = True) -> DecodedPrompts:
        chunks = sparse.split(CPU_DECODED_TOGETHER) if self.on_cpu and len(sparse) else [sparse]
        parts = [self._decode_chunk(chunk, min_iou, multimask_output) for chunk in chunks]
        return DecodedPrompts(*(torch.cat(values) for values in zip(*parts, strict=True)))

    def _decode_chunk(self, sparse: Tensor, min_iou: float, multimask_output: bool) -> DecodedPrompts:
        decoded = self.decoder.decode(self.image, sparse, multimask_output)
        kept = _above(decoded.predicted_iou, min_iou)
        prompts = kept.any(1).nonzero()[:, 0]
        # One at a time on a CPU, as slices: their matrices stay where they are.
        chunks = [slice(i, i + 1) for i in prompts.tolist()] if self.on_cpu and len(prompts) else [prompts]
        logits = [self.decoder.upscale(self.image, decoded.select(chunk))[kept[chunk]] for chunk in chunks]
        # A copy, as engines use their memory again.
        predicted_iou = decoded.predicted_iou.clone()
        return DecodedPrompts(predicted_iou, kept, _finite(torch.cat(logits), "the mask logits"))


class ImageDecoders:
    """Makes the decoder of each image of a batch.

    Args:
        sam: the model; its weights are rearranged once, so this lives as long as they stay as they are.
        dtype: of the low-rank decoder's products; the model's type by default.
    """

    def __init__(self, sam: Sam, dtype: torch.dtype | None = None) -> None:
        self.sam = sam
        self.dtype = dtype
        self._low_rank: dict[bool, LowRankDecoder] = {}

    def of(self, embedding: Tensor, prompts: int, tokens: int) -> PromptDecoder:
        """The cheaper decoder of an image.

        Args:
            embedding: (1, C, h, w).
            prompts: how many prompts are going to be decoded, about.
            tokens: of each, without the output tokens: 2 for a point or a box, one more for each further point.
        """
        decoder = self.sam.mask_decoder
        if not is_supported(decoder):
            return PlainDecoder(self.sam, embedding)
        all_tokens = 1 + decoder.num_mask_tokens + tokens
        if not low_rank_pays(DecoderShape.of(self.sam), prompts, all_tokens):
            return PlainDecoder(self.sam, embedding)
        on_engines = embedding.device.type == "cpu" and prompts >= PROMPTS_FOR_ENGINES and tokens == POINT_TOKENS
        if on_engines not in self._low_rank:
            self._low_rank[on_engines] = self._open(on_engines)
        return LowRankImageDecoder(self._low_rank[on_engines], embedding)

    def _open(self, on_engines: bool) -> LowRankDecoder:
        engines: DecoderEngines | None = getattr(self.sam, "decoder_engines", None)
        if engines is None or not on_engines:
            return LowRankDecoder(self.sam, self.dtype)
        return engines.open(self.sam, bf16=self.dtype == torch.bfloat16)


def _above(predicted_iou: Tensor, min_iou: float) -> Tensor:
    return _finite(predicted_iou, "the predicted IoU") > min_iou


def _finite(values: Tensor, what: str) -> Tensor:
    if not torch.isfinite(values).all():
        raise FloatingPointError(f"{what} of a prompt is NaN or infinite: the checkpoint's mask decoder is damaged")
    return values
