"""SAM's ViT attention in one kernel.

segment-anything's writes the weights of all pairs of tokens to memory and reads them again: at 1024 pixels these are
4096 x 4096 for each of ViT-H's 16 heads, a gigabyte an image and layer in float32. torch's
``scaled_dot_product_attention`` makes them where they are used. The relative positions' part of them is added as its
mask; it is the outer sum of one product with the rows' encodings and one with the columns'.
"""

from __future__ import annotations

import torch
from segment_anything.modeling.image_encoder import Attention, ImageEncoderViT, get_rel_pos
from torch import nn
from torch.nn import functional as F


class FusedAttention(nn.Module):
    """The same parameters, by the same names, and the same results within rounding as segment-anything's.

    Args:
        attention: whose modules are taken over; has relative positions, as all of SAM's have.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        if not attention.use_rel_pos:
            raise ValueError("only attention with relative positions, as in SAM, is fused")
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.qkv, self.proj = attention.qkv, attention.proj
        self.rel_pos_h, self.rel_pos_w = attention.rel_pos_h, attention.rel_pos_w

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, H, W, C)`` to the same: attention among the H * W tokens of each of B windows."""
        batch, height, width, _ = x.shape
        qkv = self.qkv(x).unflatten(3, (3, self.num_heads, -1)).flatten(1, 2)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, H * W, d) each
        placed = query.unflatten(2, (height, width))
        by_row = torch.einsum("bnhwd,hkd->bnhwk", placed, get_rel_pos(height, height, self.rel_pos_h))
        by_column = torch.einsum("bnhwd,wkd->bnhwk", placed, get_rel_pos(width, width, self.rel_pos_w))
        bias = by_row[..., :, None] + by_column[..., None, :]  # (B, heads, H, W, H, W)
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias.flatten(4).flatten(2, 3), scale=self.scale
        )
        output: torch.Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, height, width, -1))
        return output


def fuse_attention(encoder: ImageEncoderViT) -> ImageEncoderViT:
    """Replaces the attention of all blocks, in place; returns the encoder."""
    for block in encoder.blocks:
        block.attn = FusedAttention(block.attn)
    return encoder
