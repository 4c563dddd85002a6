"""How much arithmetic the two decoders need, so that the cheaper one can be chosen.

Counted are the products that involve the N image tokens, as multiply-adds; all that is done on the prompts' few tokens
is the same in both and left out, as are element-wise operations. For SAM at 1024 pixels (N 4096, C 256, D 128, H 8)
and a point (T 7), the plain decoder needs 1.79 G a prompt, the low-rank one 0.44 G (of which 0.18 G before the
predicted IoU is known) and 1.74 G once an image.
"""

from __future__ import annotations

from dataclasses import dataclass

from segment_anything.modeling import Sam


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """What the cost of a mask decoder depends on."""

    image_tokens: int
    """N, the image embedding's height times its width."""

    channels: int
    """C of the image embedding."""

    attention_channels: int
    """D, the width of the attention between tokens and image, all heads together."""

    heads: int
    """H of that attention."""

    masks: int
    """Masks made of a prompt."""

    @classmethod
    def of(cls, sam: Sam) -> DecoderShape:
        attention = sam.mask_decoder.transformer.final_attn_token_to_image
        height, width = sam.prompt_encoder.image_embedding_size
        return cls(
            image_tokens=height * width,
            channels=attention.embedding_dim,
            attention_channels=attention.internal_dim,
            heads=attention.num_heads,
            masks=sam.mask_decoder.num_multimask_outputs,
        )


def after_first_convolution(shape: DecoderShape) -> int:
    """Multiply-adds a prompt that both decoders spend on upscaling after its first convolution."""
    second = shape.image_tokens * shape.channels * shape.channels // 2
    return second + 16 * shape.image_tokens * (shape.channels // 8) * shape.masks


def plain_cost(shape: DecoderShape, tokens: int) -> int:
    """Multiply-adds a prompt of ``tokens`` tokens in SAM's decoder.

    Three attentions to the image project its keys and values, two from it project its queries and outputs: ten
    products N x C x D. Each attention then has two of T x N x D. The first convolution is N x C x C.
    """
    n, c, d = shape.image_tokens, shape.channels, shape.attention_channels
    return 10 * n * c * d + 5 * 2 * tokens * n * d + n * c * c + after_first_convolution(shape)


def low_rank_cost(shape: DecoderShape, tokens: int) -> tuple[int, int]:
    """Multiply-adds (once an image, a prompt) of the low-rank decoder.

    An image: eleven projections N x C x D and the first convolution. A prompt: products of T x N x D for keys, values,
    queries and the statistics of LayerNorm (11), and with rank R = H T: R x R x N four times in layer 1 and its first
    LayerNorm, 2R x 2R x N in the second, 2R x C x N in the first convolution. The final attention is that of F tokens,
    those of the masks and of their predicted IoU: F x N x D three times, and H F x 2R x N twice.
    """
    n, c, d = shape.image_tokens, shape.channels, shape.attention_channels
    rank, final = shape.heads * tokens, 1 + shape.masks
    image = 11 * n * c * d + n * c * c
    prompt = (11 * tokens + 3 * final) * n * d + (4 + 4) * rank * rank * n + 2 * rank * c * n
    prompt += 2 * shape.heads * final * 2 * rank * n
    return image, prompt + after_first_convolution(shape)


def low_rank_pays(shape: DecoderShape, prompts: int, tokens: int) -> bool:
    """Whether ``prompts`` prompts of ``tokens`` tokens each, output tokens included, cost less by low rank."""
    image, prompt = low_rank_cost(shape, tokens)
    return image + prompts * prompt < prompts * plain_cost(shape, tokens)
