"""SAM's two-way transformer for many prompts of each image, arranged for training: the same answers in half the time.

``segment_anything.modeling.TwoWayTransformer`` keeps the S image tokens of C channels once for every prompt, adds the
positional encodings to them five times and projects them eight times. Here each attention takes the few tokens of a
prompt back through the image's projection instead: ``(x W_q) (K W_k)' = (x W_q W_k') K'``. So image tokens are only
ever multiplied by R = heads x tokens rows of C numbers; positional encodings, which belong to the image, are multiplied
apart; and until the first update, all prompts of an image share its tokens. Softmax runs along contiguous memory.

Everything mode goes further (``tinysam.everything.low_rank``), but would have to repeat its derivation for gradients.
"""

from __future__ import annotations

import torch
from segment_anything.modeling import TwoWayTransformer
from segment_anything.modeling.transformer import Attention
from torch import Tensor

from tinysam.everything.algebra import (
    absorbed,
    by_shared,
    input_by_head,
    join_heads,
    output_by_head,
    scaled,
    self_attention,
    split_heads,
)


def two_way(transformer: TwoWayTransformer, image: Tensor, positions: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """``transformer`` applied to N prompts of B images, in order of the images.

    Args:
        image: ``(B, S, C)`` image tokens that prompts share, or ``(N, S, C)`` of each prompt.
        positions: ``(B, S, C)`` positional encodings of the image tokens.
        tokens: ``(N, T, C)`` of the prompts.

    Returns:
        ``(N, T, C)`` and ``(N, S, C)``: the prompts' and the image's tokens.
    """
    queries = tokens
    positions = _for_products(positions)
    for layer in transformer.layers:
        queries = self_attention(layer, queries, tokens)
        read = _read(layer.cross_attn_token_to_image, queries + tokens, _for_products(image), positions)
        queries = layer.norm2(queries + read)
        queries = layer.norm3(queries + layer.mlp(queries))
        written = _write(layer.cross_attn_image_to_token, queries + tokens, queries, _for_products(image), positions)
        # What prompts have shared is each one's own from here on.
        image = (image[:, None] + written.unflatten(0, (len(image), -1))).flatten(0, 1)
        image = layer.norm4(image)
    read = _read(transformer.final_attn_token_to_image, queries + tokens, _for_products(image), positions)
    return transformer.norm_final_attn(queries + read), image


def _read(attention: Attention, queries: Tensor, image: Tensor, positions: Tensor) -> Tensor:
    """Prompts' tokens ``(N, T, C)`` attend to the image: ``(N, T, C)``."""
    heads = attention.num_heads
    rows = absorbed(scaled(split_heads(attention.q_proj(queries), heads)), attention.k_proj)
    # The keys' bias adds the same to all scores of a row.
    weights = _scores(rows, image, positions).softmax(-1)
    averages = _grouped(weights, len(image)) @ image
    averages = averages.reshape(len(rows), heads, -1, averages.shape[-1])
    values = by_shared(averages, input_by_head(attention.v_proj, heads).transpose(1, 2))
    return attention.out_proj(join_heads(values) + attention.v_proj.bias)


def _write(attention: Attention, keys: Tensor, values: Tensor, image: Tensor, positions: Tensor) -> Tensor:
    """The image attends to prompts' tokens ``(N, T, C)``: ``(N, S, C)``."""
    heads = attention.num_heads
    key = scaled(split_heads(attention.k_proj(keys), heads))
    # The queries' bias adds the same to a token's score at all places, but not to all tokens' scores at one place.
    bias = (key * attention.q_proj.bias.view(heads, 1, -1)).sum(-1).flatten(1)[..., None]
    scores = _scores(absorbed(key, attention.q_proj), image, positions) + bias
    weights = scores.unflatten(1, (heads, -1)).softmax(2).flatten(1, 2)
    value = split_heads(attention.v_proj(values), heads)
    rows = by_shared(value, output_by_head(attention.out_proj, heads)).flatten(1, 2)
    return weights.transpose(1, 2) @ rows + attention.out_proj.bias


def _scores(rows: Tensor, image: Tensor, positions: Tensor) -> Tensor:
    """``(N, R, C)`` by the image's tokens and their positions: ``(N, R, S)``."""
    scores = _grouped(rows, len(positions)) @ positions.transpose(1, 2)
    scores = torch.baddbmm(_grouped(scores, len(image)), _grouped(rows, len(image)), image.transpose(1, 2))
    return scores.reshape(len(rows), -1, image.shape[1])


def _grouped(rows: Tensor, groups: int) -> Tensor:
    """``(N, R, X)`` as ``(groups, N / groups * R, X)``."""
    return rows.reshape(groups, -1, rows.shape[-1])


def _for_products(image: Tensor) -> Tensor:
    """In autocast's type: converted once rather than before each product."""
    device = image.device.type
    return image.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else image
