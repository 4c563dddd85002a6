"""Folding BatchNorm into the convolution before it."""

from __future__ import annotations

import copy
from typing import TypeVar

from timm.models.tiny_vit import ConvNorm
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

M = TypeVar("M", bound=nn.Module)


def fold_batch_norm(module: M) -> M:
    """A copy of ``module`` in which every convolution with BatchNorm is one convolution with a bias.

    The output stays the same but for rounding (relative 1e-6). Quantizing comes after: the folded weights are what the
    integer kernel multiplies with, and there is one rounding less.

    Args:
        module: in eval mode, as BatchNorm's running statistics are what is folded.

    Raises:
        ValueError: if it is in training mode.
    """
    if module.training:
        raise ValueError("BatchNorm can be folded in eval mode only; call .eval() first")
    # eval() clears the attention biases that timm caches, which may hang on a graph of gradients and then not copy.
    folded = copy.deepcopy(module.eval())
    for parent in list(folded.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ConvNorm):
                setattr(parent, name, fuse_conv_bn_eval(child.conv, child.bn))
    return folded
