"""Whether 8 bits make an image encoder's linear layers faster on its GPU: a short measurement.

The layers are timed by themselves, those that most of the arithmetic is in, with as many tokens as an image gives them:
compiling an encoder in each precision would take minutes. Each is compiled, as it is only then that the rounding of its
inputs is fused and 8 bits have a chance.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import nn

from tinysam.runtime.eight_bit import EightBit, in_eight_bits, is_quantized
from tinysam.runtime.engine import EngineError
from tinysam.runtime.timing import interleaved_seconds

MEASURED_SHAPES = 4
"""Those with the most arithmetic; each takes seconds to compile."""
REPETITIONS = 20

Kind = Literal["bf16", EightBit]


class LinearShape(NamedTuple):
    """A linear layer's input and output."""

    tokens: int
    in_features: int
    out_features: int


@torch.no_grad()
def linear_shapes(encoder: nn.Module) -> Counter[LinearShape]:
    """How many layers of each shape, among those that 8 bits are used for, one image goes through."""
    shapes: Counter[LinearShape] = Counter()

    def count(layer: nn.Module, inputs: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        [x] = inputs
        assert isinstance(layer, nn.Linear)
        shapes[LinearShape(math.prod(x.shape[:-1]), layer.in_features, layer.out_features)] += 1

    handles = [layer.register_forward_hook(count) for layer in encoder.modules() if is_quantized(layer)]
    try:
        parameter = next(encoder.parameters())
        image = (1, 3, int(encoder.img_size), int(encoder.img_size))  # type: ignore[arg-type]
        encoder(torch.zeros(image, dtype=parameter.dtype, device=parameter.device))
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def linear_seconds(encoder: nn.Module, *, compiled: bool = True) -> dict[Kind, float]:
    """Seconds that an image's linear layers take in each precision that the encoder's device has, bf16 first."""
    shapes = linear_shapes(encoder)
    heaviest = sorted(shapes, key=lambda shape: shapes[shape] * math.prod(shape), reverse=True)[:MEASURED_SHAPES]
    total: dict[Kind, float] = {}
    for shape in heaviest:
        for kind, seconds in _seconds(shape, next(encoder.parameters()).device, compiled).items():
            total[kind] = total.get(kind, 0.0) + shapes[shape] * seconds
    return total


@torch.no_grad()
def _seconds(shape: LinearShape, device: torch.device, compiled: bool) -> dict[Kind, float]:
    """Seconds of one layer in each precision."""
    x = torch.randn(shape.tokens, shape.in_features, device=device, dtype=torch.bfloat16)
    linear = nn.Linear(shape.in_features, shape.out_features, device=device, dtype=torch.bfloat16)
    plain = nn.Sequential(linear)  # torchao replaces what lies in a module
    layers: dict[Kind, nn.Module] = {"bf16": plain}
    for kind in get_args(EightBit):
        try:
            layers[kind] = in_eight_bits(plain, kind)
        except EngineError:
            continue  # this device has no such numbers, which leaves the others
    if compiled:
        for layer in layers.values():
            layer.compile()
    calls: dict[str, Callable[[], object]] = {name: partial(_call, layer, x) for name, layer in layers.items()}
    return interleaved_seconds(calls, REPETITIONS)  # type: ignore[return-value]


def _call(layer: nn.Module, x: torch.Tensor) -> None:
    layer(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
