"""The encoder with every layer as a module: the products of its attentions get names, and can be hooked."""

from __future__ import annotations

import torch
from timm.models.tiny_vit import Attention
from torch import nn

from tinysam.quant.fold import fold_batch_norm


class Product(nn.Module):
    """A product of two activations, as a module."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """``a @ b``."""
        return a @ b


class ExplicitAttention(nn.Module):
    """timm's attention of TinyViT with its two products as modules; the output is the same but for rounding.

    ``query_key`` and ``weights_value`` see what the nodes of these names in the exported graph see: torch's exporter
    spreads the attention's scale over queries and keys.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.val_dim = attention.num_heads, attention.key_dim, attention.val_dim
        self.norm, self.qkv, self.proj = attention.norm, attention.qkv, attention.proj
        self.query_key, self.weights_value = Product(), Product()
        biases = attention.attention_biases[:, attention.attention_bias_idxs].detach()
        self.register_buffer("biases", biases, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, C) tokens of B windows to the same."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, tokens, self.num_heads, -1).transpose(1, 2)
        queries, keys, values = qkv.split([self.key_dim, self.key_dim, self.val_dim], dim=3)
        scale = self.key_dim**-0.25
        products = self.query_key(queries * scale, keys.transpose(2, 3) * scale)
        attended = self.weights_value((products + self.biases).softmax(dim=-1), values)
        return self.proj(attended.transpose(1, 2).reshape(batch, tokens, -1))


def explicit_encoder(encoder: nn.Module) -> nn.Module:
    """A copy of an image encoder in which every layer of ``find_layers`` is a module, at the path that is its name.

    BatchNorm is folded, and weights do not require gradients.

    Args:
        encoder: in eval mode.

    Raises:
        ValueError: if it is in training mode.
    """
    explicit = fold_batch_norm(encoder).requires_grad_(False)
    for parent in list(explicit.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Attention):
                setattr(parent, name, ExplicitAttention(child))
    return explicit.eval()
