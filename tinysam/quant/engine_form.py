"""A model in the form that engines run: fewer roundings, and fewer copies of activations in memory.

The outputs stay the same but for rounding (relative 1e-6). On a CPU much of a TinyViT's time goes into moving
activations, so what matters beside the arithmetic is that tensors keep the order in memory that the next layer reads:

* Queries, keys and values stand one after the other, instead of mixed head by head, so that one transposition makes
  all three.
* Windows are padded, cut and put together again as rows of ``width * channels`` values: a tensor of three dimensions,
  which engines leave as it is, while they reorder one of four dimensions as if it were an image of channels.
"""

from __future__ import annotations

import copy
import math
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from timm.models.tiny_vit import Attention, ConvNorm, TinyVitBlock
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

M = TypeVar("M", bound=nn.Module)


def engine_form(module: M) -> M:
    """A copy of ``module`` whose convolutions have BatchNorm folded in, and whose TinyViT blocks move less memory.

    Quantizing comes after: the folded weights are what the integer kernel multiplies with, and there is one rounding
    less. Names of layers stay the same, and a module in this form already is only copied.

    Args:
        module: in eval mode, as BatchNorm's running statistics are what is folded.

    Raises:
        ValueError: if it is in training mode.
    """
    if module.training:
        raise ValueError("BatchNorm can be folded in eval mode only; call .eval() first")
    # eval() clears the attention biases that timm caches, which may hang on a graph of gradients and then not copy.
    return _convert(copy.deepcopy(module.eval())).eval()


def _convert(module: nn.Module) -> Any:
    for name, child in module.named_children():
        setattr(module, name, _convert(child))
    if isinstance(module, ConvNorm):
        return fuse_conv_bn_eval(module.conv, module.bn)
    if isinstance(module, Attention):
        return WindowAttention(module)
    if isinstance(module, TinyVitBlock):
        return WindowBlock(module)
    return module


class WindowAttention(nn.Module):
    """timm's ``Attention`` of a TinyViT: (windows, tokens, channels) to the same shape.

    Args:
        attention: whose modules are taken over; the rows of ``qkv`` are reordered, queries of all heads first, then
            keys, then values.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.norm, self.qkv, self.proj = attention.norm, attention.qkv, attention.proj
        self.attention_biases = attention.attention_biases
        for parameter in (self.qkv.weight, self.qkv.bias):
            by_head = parameter.detach().unflatten(0, (self.num_heads, 3, -1))
            parameter.data = by_head.transpose(0, 1).flatten(0, 2).contiguous()
        place = torch.arange(attention.resolution[0], dtype=torch.int32)
        self.register_buffer("distance", (place[:, None] - place).abs().flatten(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        windows, tokens, channels = x.shape
        qkv = self.qkv(self.norm(x)).view(windows, tokens, 3, self.num_heads, channels // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (query * self.scale @ key.transpose(-2, -1) + self._biases()).softmax(-1)
        return self.proj((weights @ value).transpose(1, 2).reshape(windows, tokens, channels))

    def _biases(self) -> torch.Tensor:
        """(heads, tokens, tokens), looked up by vertical and horizontal distance.

        As a lookup in timm's small table they take next to nothing in a graph, where expanded ones would be 40 % of an
        int8 file; engines expand them when they compile.
        """
        assert isinstance(self.distance, torch.Tensor)
        heads, side = self.num_heads, math.isqrt(len(self.distance))
        table = self.attention_biases.view(heads, side, side)
        pairs = table.index_select(1, self.distance).index_select(2, self.distance)  # (heads, y1 * y2, x1 * x2)
        return pairs.view(heads, side, side, side, side).transpose(2, 3).reshape(heads, side**2, side**2)


class WindowBlock(nn.Module):
    """timm's ``TinyVitBlock`` without stochastic depth: (B, H, W, C) to the same shape.

    Args:
        block: whose modules are taken over, with a ``WindowAttention``.
    """

    def __init__(self, block: TinyVitBlock) -> None:
        super().__init__()
        self.window_size = block.window_size
        self.attn, self.local_conv, self.mlp = block.attn, block.local_conv, block.mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        batch, height, width, channels = x.shape
        tokens = x.reshape(batch, height * width, channels) + self._attend(x)
        image = tokens.view(batch, height, width, channels).permute(0, 3, 1, 2)
        tokens = self.local_conv(image).permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        return (tokens + self.mlp(tokens)).view(batch, height, width, channels)

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        """Attention within windows: (B, H, W, C) to (B, H * W, C)."""
        batch, height, width, channels = x.shape
        side = self.window_size
        if (height, width) == (side, side):
            return self.attn(x.reshape(batch, height * width, channels))
        below, right = -height % side, -width % side
        rows = x.reshape(batch, height, width * channels)
        if below or right:
            rows = F.pad(rows, (0, right * channels, 0, below))
        down, across = (height + below) // side, (width + right) // side
        windows = rows.reshape(batch, down, side, across, side * channels).transpose(2, 3)
        attended = self.attn(windows.reshape(batch * down * across, side * side, channels))
        rows = attended.view(batch, down, across, side, side * channels).transpose(2, 3)
        rows = rows.reshape(batch, height + below, (width + right) * channels)
        if below or right:
            rows = rows[:, :height, : width * channels]
        return rows.reshape(batch, height * width, channels)
