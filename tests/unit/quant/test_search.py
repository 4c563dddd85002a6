from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

from tinysam.quant.graph import Layer
from tinysam.quant.observe import Range
from tinysam.quant.qdq import ActivationType
from tinysam.quant.sampling import Operands
from tinysam.quant.search import LayerScales, SearchConfig, search_scales

LINEAR = Layer(name="toy", kind="linear", inputs=("x",), weight="w", output="y")
PRODUCT = Layer(name="toy", kind="matmul", inputs=("a", "b"), weight=None, output="y")
FEW = SearchConfig(candidates=40)


def operands(seed: int = 0, batch: int = 1) -> Operands:
    generator = torch.Generator().manual_seed(seed)
    left, right, gradient = (torch.randn(batch, *shape, generator=generator) for shape in ((64, 12), (12, 6), (64, 6)))
    return Operands(left=left, right=right, gradient=gradient)


def covering(values: torch.Tensor) -> Range:
    return Range(low=min(float(values.min()), 0.0), high=max(float(values.max()), 0.0))


def search(
    layer: Layer, sample: Operands, config: SearchConfig = FEW, activations: ActivationType = "int8"
) -> LayerScales:
    ranges = {name: covering(x) for name, x in zip(layer.inputs, (sample.left, sample.right), strict=False)}
    return search_scales([(layer, sample)], ranges, activations, weigh_by_gradient=True, config=config)["toy"]


def rounded(values: torch.Tensor, scale: float | torch.Tensor, largest: int = 127) -> torch.Tensor:
    return (values / scale).round().clamp(-largest - 1, largest) * scale


@pytest.mark.parametrize("layer", [LINEAR, PRODUCT], ids=["weight", "product"])
@pytest.mark.parametrize("activations", get_args(ActivationType))
@pytest.mark.parametrize("bits", [4, 8])
def test_no_distance_is_larger_than_with_ranges_that_cover_everything(
    layer: Layer, activations: ActivationType, bits: int
) -> None:
    for seed in range(3):
        found = search(layer, operands(seed), replace(FEW, bits=bits), activations)
        assert 0 < found.distance <= found.distance_at_start
        # Where every candidate clips almost everything, the start is what remains.
        kept = search(layer, operands(seed), replace(FEW, bits=bits, least=0.01, most=0.02), activations)
        assert kept.distance == kept.distance_at_start == found.distance_at_start


def test_the_distance_is_that_of_the_scales_that_are_returned() -> None:
    sample = operands()
    found = search(LINEAR, sample)
    assert found.weight_bounds is not None
    left = rounded(sample.left, found.ranges[0].bound / 127)
    right = rounded(sample.right, torch.from_numpy(found.weight_bounds) / 127)
    importance = sample.gradient.square() / sample.gradient.square().mean()
    distance = ((left @ right - sample.left @ sample.right).square() * importance).sum()
    assert found.distance == pytest.approx(float(distance), rel=1e-3)


def test_an_outlier_that_does_not_matter_is_clipped_to_the_known_optimum() -> None:
    # All values but one are multiples of 1/127 up to 1, so that steps of 1/127 make no error at all.
    sample = operands()
    left = (torch.arange(64 * 12) % 255 - 127).view(1, 64, 12) / 127
    left[0, 0, 0] = 4.0
    gradient = sample.gradient.clone()
    gradient[0, 0] = 0.0
    found = search(
        LINEAR, replace(sample, left=left, gradient=gradient), SearchConfig(candidates=25, least=0.05, most=1.25)
    )
    assert found.ranges[0].high == pytest.approx(1.0, rel=1e-4)


def test_without_gradients_the_outlier_counts() -> None:
    sample = operands()
    left = sample.left.clone()
    left[0, 0] = 40.0
    gradient = sample.gradient.clone()
    gradient[0, 0] = 0.0
    layers = [(LINEAR, replace(sample, left=left, gradient=gradient))]
    weighed, unweighed = (
        search_scales(layers, {"x": covering(left)}, "int8", weigh_by_gradient=weigh, config=FEW)["toy"]
        for weigh in (True, False)
    )
    assert weighed.ranges[0].high < 0.3 * unweighed.ranges[0].high


def test_each_output_channel_of_a_weight_gets_a_scale_of_its_own() -> None:
    sample = operands()
    wide = sample.right * torch.tensor([1.0, 10.0, 1.0, 100.0, 1.0, 1.0])
    bounds = search(LINEAR, replace(sample, right=wide)).weight_bounds
    assert bounds is not None
    assert bounds.shape == (6,)
    assert bounds[3] > 3 * bounds[1] > 9 * bounds[0]


@pytest.mark.parametrize("activations", get_args(ActivationType))
def test_a_constant_activation_is_met_exactly(activations: ActivationType) -> None:
    sample = operands()
    found = search(LINEAR, replace(sample, left=torch.full_like(sample.left, 3.0)), activations=activations)
    assert np.isfinite(found.distance)
    assert found.ranges[0].high * 1.001 >= 3.0
    silent = search(LINEAR, replace(sample, left=torch.zeros_like(sample.left)), activations=activations)
    assert silent.distance == silent.distance_at_start == 0.0


def test_without_any_gradient_all_errors_count_alike() -> None:
    sample = operands()
    silent, even = (
        search(LINEAR, replace(sample, gradient=like(sample.gradient))) for like in (torch.zeros_like, torch.ones_like)
    )
    assert silent.ranges == even.ranges
    assert silent.distance == even.distance < even.distance_at_start


@pytest.mark.parametrize(
    "options", [{"candidates": 0}, {"rounds": 0}, {"least": 0.0}, {"least": 2.0}, {"bits": 1}, {"bits": 9}]
)
def test_search_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must be|between"):
        SearchConfig(**options)  # type: ignore[arg-type]
