"""The arithmetic of quantization: from a range to a step, and rounding to multiples of it.

The same as ONNX's QuantizeLinear and DequantizeLinear at 8 bits; other widths can be simulated only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tinysam.quant.qdq import ActivationType


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Steps and integers of one or several quantizers at once; tensors that broadcast over what is rounded."""

    scale: torch.Tensor
    """Positive; 1 where a range is empty, so that zeros stay zeros."""
    zero_point: torch.Tensor
    """The integer that stands for 0."""
    lowest: int
    highest: int

    def round(self, values: torch.Tensor) -> torch.Tensor:
        """``values`` rounded to multiples of the step, half to even, and clipped to what the integers reach."""
        rounded = (values / self.scale).round_().add_(self.zero_point).clamp_(self.lowest, self.highest)
        return rounded.sub_(self.zero_point).mul_(self.scale)


def activation_steps_of(low: torch.Tensor, high: torch.Tensor, bits: int, activations: ActivationType) -> Steps:
    """Quantizers of activations between ``low`` <= 0 and ``high`` >= 0; unsigned ones have a zero point."""
    if activations == "int8":
        largest = 2 ** (bits - 1) - 1
        scale = torch.maximum(-low, high) / largest
        return Steps(scale=_positive(scale), zero_point=torch.zeros_like(low), lowest=-largest - 1, highest=largest)
    levels = 2**bits - 1
    scale = _positive((high - low) / levels)
    return Steps(scale=scale, zero_point=(-low / scale).round(), lowest=0, highest=levels)


def weight_steps_of(bound: torch.Tensor, bits: int) -> Steps:
    """Symmetric quantizers of weights, or of parts of them, that reach from -``bound`` to ``bound``."""
    largest = 2 ** (bits - 1) - 1
    scale = _positive(bound / largest)
    return Steps(scale=scale, zero_point=torch.zeros_like(scale), lowest=-largest, highest=largest)


def _positive(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale))
