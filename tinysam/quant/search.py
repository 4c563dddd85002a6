"""The search for scales: those with the least error in each layer's result, weighed by what it does to the masks.

As in the paper's first versions: 100 candidates between 0.01 and 1.2 times the scale that covers everything, in 3
rounds that take turns between a layer's two operands; distance is the squared error of the layer's result, weighed by
the squared gradient of the task loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from tinysam.quant.graph import Layer
from tinysam.quant.observe import Range
from tinysam.quant.qdq import ActivationType
from tinysam.quant.sampling import Operands
from tinysam.quant.steps import Steps, activation_steps_of, weight_steps_of

CHUNK = 1 << 20
"""Numbers that candidates take at a time: small enough for a processor's cache."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How scales are searched."""

    candidates: int = 100
    """Of each scale, in equal distances."""
    least: float = 0.01
    """The smallest candidate, as a part of the scale that covers every value."""
    most: float = 1.2
    """The largest."""
    rounds: int = 3
    """How often each of a layer's two operands is searched, while the other is kept."""
    bits: int = 8
    """Of weights and activations; integer graphs have 8, others are for simulation."""

    def __post_init__(self) -> None:
        if self.candidates < 1 or self.rounds < 1:
            raise ValueError("candidates and rounds must be at least 1")
        if not 0 < self.least <= self.most:
            raise ValueError(f"least must be above 0 and at most most, got {self.least} and {self.most}")
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be between 2 and 8, got {self.bits}")

    def fractions(self) -> torch.Tensor:
        """(N,) float32, the candidates."""
        return torch.linspace(self.least, self.most, self.candidates)


@dataclass(frozen=True, kw_only=True)
class LayerScales:
    """What the search found for a layer."""

    ranges: tuple[Range, ...]
    """Of each of its activations."""
    weight_bounds: np.ndarray | None
    """(output channels,) float32: what the largest integer of the weight stands for; None for ``matmul``."""
    distance: float
    """Weighed squared error on the sample; its unit is that of the importance."""
    distance_at_start: float
    """With ranges that cover everything."""

    @property
    def relative_distance(self) -> float:
        """``distance`` as a part of the one at the start."""
        return self.distance / self.distance_at_start if self.distance_at_start else 1.0


def search_scales(
    samples: Iterable[tuple[Layer, Operands]],
    ranges: Mapping[str, Range],
    activations: ActivationType,
    *,
    weigh_by_gradient: bool,
    config: SearchConfig | None = None,
    on_layer: Callable[[], None] = lambda: None,
) -> dict[str, LayerScales]:
    """Searches the scales of layers, one layer after the other.

    Args:
        samples: of ``sample_operands``.
        ranges: what each activation covers from its smallest to its largest value, where the search begins.
        activations: see ``insert_qdq``.
        weigh_by_gradient: the paper's distance; else every error of a layer's result counts alike.
        config: None: the paper's values.
        on_layer: called after each layer.

    Returns:
        By layer's name. No distance is larger than at the start, since a scale is changed for a better one only.
    """
    config = config or SearchConfig()
    found: dict[str, LayerScales] = {}
    for layer, operands in samples:
        importance = _importance(operands.gradient) if weigh_by_gradient else torch.ones_like(operands.gradient)
        found[layer.name] = search_layer(
            operands, importance, [ranges[name] for name in layer.inputs], activations, config
        )
        on_layer()
    return found


@torch.no_grad()
def search_layer(
    operands: Operands,
    importance: torch.Tensor,
    ranges: list[Range],
    activations: ActivationType,
    config: SearchConfig,
) -> LayerScales:
    """Searches the scales of a layer.

    Args:
        operands: the layer's sample.
        importance: (B, R, C), not negative: the weight of each squared error.
        ranges: one of the left operand, or two where the right one is an activation too.
        activations: see ``insert_qdq``.
        config: the candidates.
    """
    left, right, expected = operands.left, operands.right, operands.left @ operands.right
    has_weight = len(ranges) == 1

    def steps_of_activation(range_: Range) -> Callable[[torch.Tensor], Steps]:
        return lambda part: activation_steps_of(range_.low * part, range_.high * part, config.bits, activations)

    bound = right.abs().amax(1, keepdim=True)
    left_steps = steps_of_activation(ranges[0])
    right_steps: Callable[[torch.Tensor], Steps] = (
        (lambda part: weight_steps_of(bound * part, config.bits)) if has_weight else steps_of_activation(ranges[1])
    )
    part_left, part_right = torch.ones(1, 1, 1), torch.ones_like(bound) if has_weight else torch.ones(1, 1, 1)
    fractions = config.fractions()

    def errors(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """(N, B, C): of products that have N candidates in front."""
        return torch.matmul(a, b).sub_(expected).square_().mul_(importance).sum(-2)

    def least(errors_of: Callable[[torch.Tensor], torch.Tensor], current: torch.Tensor, size: int) -> torch.Tensor:
        """The best of ``current`` and the candidates, for each of ``current``'s entries."""
        best, smallest = current, _reduced(errors_of(current[None]), current)
        for chunk in fractions.split(max(1, CHUNK // size)):
            candidates = chunk.view(-1, 1, 1, 1).expand(-1, *current.shape)
            reduced = _reduced(errors_of(candidates), current)
            value, index = reduced.min(0, keepdim=True)
            better = value < smallest
            best = torch.where(better[0], candidates.gather(0, index)[0], best)
            smallest = torch.where(better, value, smallest)
        return best

    def distance() -> float:
        return float(errors(left_steps(part_left).round(left), right_steps(part_right).round(right)).double().sum())

    def errors_of_left(rounded: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        return errors(left_steps(part).round(left), rounded)

    def errors_of_right(rounded: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        return errors(rounded, right_steps(part).round(right))

    start = distance()
    for _ in range(config.rounds):
        with_right = partial(errors_of_left, right_steps(part_right).round(right))
        part_left = least(with_right, part_left, left.numel() + expected.numel())
        with_left = partial(errors_of_right, left_steps(part_left).round(left))
        part_right = least(with_left, part_right, right.numel() + expected.numel())
    parts = (part_left,) if has_weight else (part_left, part_right)
    return LayerScales(
        ranges=tuple(
            Range(low=range_.low * float(part), high=range_.high * float(part))
            for range_, part in zip(ranges, parts, strict=True)
        ),
        weight_bounds=(bound * part_right).flatten().numpy() if has_weight else None,
        distance=distance(),
        distance_at_start=start,
    )


def _importance(gradient: torch.Tensor) -> torch.Tensor:
    """Squared gradients with a mean of 1, as those of a mean over pixels are too small to square in float32."""
    squared = (gradient / gradient.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)).square()
    mean = squared.mean()
    return squared / mean if mean > 0 else torch.ones_like(squared)


def _reduced(errors: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
    """(N, B, C) errors to (N, *current.shape): of each output channel, or of all of them."""
    errors = errors.unsqueeze(2)
    return errors if current.numel() > 1 else errors.sum((1, 2, 3), keepdim=True)
