"""What a CPU can show of it: the layers that are measured, and that each precision is."""

from __future__ import annotations

import pytest
import torch
from segment_anything.modeling import Sam
from torch import nn

from tinysam.runtime import choice, linear_speed
from tinysam.runtime.choice import engine_name
from tinysam.runtime.linear_speed import MEASURED_SHAPES, LinearShape, linear_seconds, linear_shapes


class Encoder(nn.Module):
    """Two equal layers, a wider one, and one that 8 bits are not used for."""

    img_size = 32

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(64, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_layers_are_counted_by_what_an_image_gives_them() -> None:
    encoder = Encoder()
    assert linear_shapes(encoder) == {LinearShape(96, 32, 32): 2, LinearShape(96, 32, 64): 1}
    assert not any(layer._forward_hooks for layer in encoder.modules())


def test_those_with_the_most_arithmetic_are_measured_in_what_the_device_has(
    tiny_sam: Sam, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = linear_shapes(tiny_sam.image_encoder)
    assert len(shapes) > MEASURED_SHAPES
    measured = []
    seconds = linear_speed._seconds
    monkeypatch.setattr(linear_speed, "_seconds", lambda *args: measured.append(args[0]) or seconds(*args))
    found = linear_seconds(tiny_sam.image_encoder, compiled=False)
    assert list(found) == ["bf16", "int8"]  # a CPU has no fp8
    assert all(spent > 0 for spent in found.values())
    work = {shape: count * shape.tokens * shape.in_features * shape.out_features for shape, count in shapes.items()}
    assert sorted(work[shape] for shape in measured) == sorted(work.values())[-MEASURED_SHAPES:]


@pytest.mark.parametrize(("int8", "name"), [(0.5, "torch compiled int8"), (2.0, "torch")])
def test_eight_bits_are_taken_where_they_are_faster_and_the_log_says_so(
    tiny_sam: Sam, int8: float, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(choice, "linear_seconds", lambda _: {"bf16": 0.001, "int8": 0.001 * int8})
    with caplog.at_level("INFO"):
        assert engine_name(choice.fastest_on_gpu(tiny_sam)) == name
    assert f"bf16 1.00 ms, int8 {int8:.2f} ms" in caplog.text
