"""AdamW with warm-up and cosine decay, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

Tensors = tuple[torch.Tensor, ...] | list[torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up and cosine decay. Our choice: the paper says Adam and 8 epochs, and no more."""

    learning_rate: float = 1e-3
    """At the end of the warm-up."""
    final_learning_rate: float = 1e-5
    """At the end of training."""
    warmup_steps: int = 200
    """Steps of linear warm-up."""
    weight_decay: float = 0.05
    """Of matrices and kernels; biases, scales and embeddings have none."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    ema_decay: float = 0.999
    """Of the averaged weights, which are what is validated and saved; it rises to this from 0.1."""

    def __post_init__(self) -> None:
        if not 0 <= self.final_learning_rate <= self.learning_rate or not self.learning_rate > 0:
            raise ValueError("learning rates need 0 <= final_learning_rate <= learning_rate, and learning_rate > 0")
        if self.warmup_steps < 0 or self.weight_decay < 0:
            raise ValueError("warmup_steps and weight_decay must not be negative")
        if not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, got {self.clip_norm}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")


def learning_rate(step: int, total: int, config: OptimizerConfig) -> float:
    """Linear warm-up, then half a cosine down to ``final_learning_rate``."""
    warmup = min(config.warmup_steps, total // 2)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, total - warmup)
    span = config.learning_rate - config.final_learning_rate
    return config.final_learning_rate + span * (1 + math.cos(math.pi * min(1.0, share))) / 2


def moving_average(
    decay: float,
) -> Callable[[Tensors, Tensors, torch.Tensor | int], None]:
    """An exponential moving average whose decay rises from 0.1 to ``decay``: the first weights are soon forgotten."""

    @torch.no_grad()
    def update(averaged: Tensors, current: Tensors, num_averaged: torch.Tensor | int) -> None:
        now = min(decay, (1 + float(num_averaged)) / (10 + float(num_averaged)))
        if averaged[0].is_floating_point():  # AveragedModel hands over tensors of one type at a time
            torch._foreach_lerp_(averaged, current, 1 - now)
        else:
            torch._foreach_copy_(averaged, current)

    return update


def parameter_groups(student: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weight decay for matrices and kernels, none for biases, scales and embeddings of one dimension."""
    trained = [p for p in student.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim > 1]
    others = [p for p in trained if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
