"""Attention by head, centring and products that prompts share: the vocabulary of the low-rank decoder
and of training.

B prompts, H heads of d channels, T tokens a prompt, N image tokens, C channels.
"""

from __future__ import annotations

import torch
from segment_anything.modeling.transformer import TwoWayAttentionBlock
from torch import Tensor, nn


def inverse_deviation(square: Tensor, norm: nn.LayerNorm) -> Tensor:
    """1 / sqrt(variance + eps) of rows whose sums of squares are ``square`` (B, N), as (B, 1, N)."""
    return torch.rsqrt(square.clamp(min=0) / norm.normalized_shape[0] + norm.eps)[:, None]


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def scaled(query: Tensor) -> Tensor:
    return query * query.shape[-1] ** -0.5


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, H d) to (B, H, T, d)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, H, T, d) to (B, T, H d)."""
    return x.transpose(1, 2).flatten(2)


def input_by_head(projection: nn.Linear, heads: int) -> Tensor:
    """The weight (H d, C) of a projection to queries, keys or values, as (H, d, C)."""
    return projection.weight.unflatten(0, (heads, -1))


def output_by_head(projection: nn.Linear, heads: int) -> Tensor:
    """The weight (C, H d) of an output projection, as (H, d, C)."""
    return projection.weight.t().unflatten(0, (heads, -1))


def by_shared(x: Tensor, shared: Tensor) -> Tensor:
    """(B, H, T, d) by (H, d, N), as (B, H, T, N): one product a head for all prompts."""
    n_prompts, _, n_tokens, _ = x.shape
    product = torch.bmm(x.transpose(0, 1).flatten(1, 2), shared)
    return product.unflatten(1, (n_prompts, n_tokens)).transpose(0, 1)


def absorbed(query: Tensor, projection: nn.Linear) -> Tensor:
    """Queries (B, H, T, d) taken back through the projection of what they are multiplied by, as (B, H T, C)."""
    return by_shared(query, input_by_head(projection, query.shape[1])).flatten(1, 2)


def average_shared(weights: Tensor, shared: Tensor) -> Tensor:
    """(B, H, T, N) by (H, N, d), as (B, H, T, d): one product a head for all prompts."""
    n_prompts, _, n_tokens, _ = weights.shape
    product = torch.bmm(weights.transpose(0, 1).flatten(1, 2), shared)
    return product.unflatten(1, (n_prompts, n_tokens)).transpose(0, 1)


def as_linear(convolution: nn.ConvTranspose2d) -> tuple[Tensor, Tensor]:
    """A 2x2 transposed convolution of stride 2 as a product: weight (C_in, 2 * 2 * C_out) and bias (2 * 2 * C_out)."""
    assert convolution.bias is not None, "SAM's convolutions have a bias"
    weight = convolution.weight.permute(0, 2, 3, 1).flatten(1)
    return weight, convolution.bias.repeat(4)


def self_attention(layer: TwoWayAttentionBlock, queries: Tensor, tokens: Tensor) -> Tensor:
    """The self-attention of a layer of SAM's transformer and the LayerNorm after it, (B, T, C)."""
    if layer.skip_first_layer_pe:
        return layer.norm1(layer.self_attn(q=queries, k=queries, v=queries))
    placed = queries + tokens
    return layer.norm1(queries + layer.self_attn(q=placed, k=placed, v=queries))
