"""The search for scales, the simulation, and the integer graph that both belong to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from segment_anything.modeling import Sam

from tests.integer_cpus import needs_vnni
from tinysam.quant import QuantizationConfig, QuantizedEncoder, quantize_encoder
from tinysam.quant.calibrate import CalibrationConfig
from tinysam.quant.engine_form import engine_form
from tinysam.quant.errors import difference
from tinysam.quant.grids import GridFamily
from tinysam.quant.layers import simulated_errors
from tinysam.quant.products import MASKS
from tinysam.quant.quantize import preprocess
from tinysam.quant.samples import Sample
from tinysam.quant.scheme import Method, Scheme
from tinysam.quant.search import ProductGrids, SearchConfig, find_grids, search
from tinysam.quant.simulate import simulated
from tinysam.runtime import EngineConfig, open_engine

QUICK = SearchConfig(candidates=12, rounds=2, calibration=CalibrationConfig(rows=64, points_per_side=2))


@pytest.fixture(scope="module")
def formed(tiny_sam: Sam) -> Sam:
    return engine_form(tiny_sam).requires_grad_(False)


@pytest.fixture(scope="module")
def paper(formed: Sam, images: list[np.ndarray]) -> dict[str, ProductGrids]:
    """The paper's scheme."""
    return find_grids(formed, images[:2], Scheme(), QUICK)


@pytest.fixture(scope="module")
def searched_config() -> QuantizationConfig:
    return QuantizationConfig(method="hessian", search=QUICK, attention_products=True)


@pytest.fixture(scope="module")
def searched(tiny_sam: Sam, images: list[np.ndarray], searched_config: QuantizationConfig) -> QuantizedEncoder:
    return quantize_encoder(tiny_sam, images[:2], images[3:4], searched_config, num_threads=1)


def test_every_layer_and_every_product_of_activations_is_covered(formed: Sam, paper: dict[str, ProductGrids]) -> None:
    weighted = {
        name
        for name, module in formed.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.ConvTranspose2d)
        and not name.startswith("prompt_encoder.")
    }
    attentions = {name for name, module in formed.named_modules() if type(module).__name__.endswith("Attention")}
    products = {name + end for name in attentions for end in (".query_key", ".weights_value")}
    assert paper.keys() == weighted | products | {MASKS}


def test_scales_are_as_many_as_the_paper_has(formed: Sam, paper: dict[str, ProductGrids]) -> None:
    attention = paper["mask_decoder.transformer.layers.0.self_attn.query_key"]
    assert [family.cells for family in attention.families] == [8, 8]
    assert [family.cells for family in paper["image_encoder.neck.2"].families] == [1, 32]
    upscaling = paper["mask_decoder.output_upscaling.0"]
    assert [family.cells for family in upscaling.families] == [1, 8]
    assert [family.cells for family in paper["mask_decoder.iou_prediction_head.layers.0"].families] == [1, 1]


def test_two_ranges_are_for_what_follows_softmax_and_gelu(paper: dict[str, ProductGrids]) -> None:
    by_kind: dict[str, set[str]] = {}
    for name, grids in paper.items():
        for family in grids.families:
            by_kind.setdefault(family.kind, set()).add(name)
    assert by_kind["softmax"] == {name for name in paper if name.endswith(".weights_value")}
    assert {MASKS, "mask_decoder.output_upscaling.3"} <= by_kind["gelu"]
    assert any(name.endswith("mlp.fc2") for name in by_kind["gelu"])


def test_a_value_is_rounded_in_exactly_one_of_two_ranges() -> None:
    family = GridFamily(kind="softmax", bits=8, low=torch.zeros(1), high=torch.ones(1))
    values = torch.linspace(0, 1, 1001)
    rounded = family.grid(0.05).round(values)
    steps = torch.where(values < 0.05, 0.05 / 127, 1 / 127)
    assert ((rounded - values).abs() <= steps / 2 + 1e-6).all()
    gelu = GridFamily(kind="gelu", bits=8, low=torch.tensor([-0.17]), high=torch.tensor([5.0]))
    values = torch.linspace(-0.17, 5, 1001)
    steps = torch.where(values < 0, 0.17 / 128, 5 / 127)
    assert ((gelu.grid(1.0).round(values) - values).abs() <= steps / 2 + 1e-6).all()


def test_a_family_without_values_leaves_zeros_zero() -> None:
    for kind in ("symmetric", "affine"):
        family = GridFamily(kind=kind, bits=8, low=torch.zeros(1), high=torch.zeros(1))
        assert family.grid(1.0).round(torch.zeros(3)).tolist() == [0, 0, 0]


@pytest.fixture
def outlier(rng: np.random.Generator) -> Sample:
    """Rows of which the first is 40 times as large as the others."""
    left = torch.from_numpy(rng.normal(size=(1, 64, 8)).astype(np.float32))
    left[0, 0] *= 40
    return Sample(
        left=left,
        right=torch.from_numpy(rng.normal(size=(1, 8, 4)).astype(np.float32)),
        curvature=torch.ones(1, 64, 4),
        left_cell=torch.zeros(1, dtype=torch.long),
        right_cell=torch.arange(4)[None],
    )


def families(sample: Sample, bits: int) -> tuple[GridFamily, GridFamily]:
    left = GridFamily(kind="symmetric", bits=bits, low=sample.left.min()[None], high=sample.left.max()[None])
    columns = sample.right[0].T
    return left, GridFamily(kind="symmetric", bits=bits, low=columns.amin(1), high=columns.amax(1))


def test_what_the_task_does_not_feel_is_clipped(outlier: Sample) -> None:
    felt, _ = search(outlier, families(outlier, 6), SearchConfig())
    unfelt = replace(outlier, curvature=outlier.curvature.clone())
    unfelt.curvature[0, 0] = 0
    clipped, _ = search(unfelt, families(outlier, 6), SearchConfig())
    assert felt > 0.5
    assert clipped < 0.1


def test_each_channel_gets_the_scale_that_a_search_of_it_alone_finds(outlier: Sample) -> None:
    both, config = families(outlier, 5), SearchConfig(rounds=1)
    _, together = search(outlier, both, config)
    for channel in range(4):
        alone = replace(
            outlier,
            right=outlier.right[:, :, channel : channel + 1],
            curvature=outlier.curvature[:, :, channel : channel + 1],
            right_cell=torch.zeros(1, 1, dtype=torch.long),
        )
        family = replace(both[1], low=both[1].low[channel : channel + 1], high=both[1].high[channel : channel + 1])
        # The left scale is fixed by giving it what the search of all found.
        left, _ = search(outlier, both, config)
        fixed = replace(both[0], low=both[0].low * left, high=both[0].high * left)
        _, factor = search(alone, (fixed, family), replace(config, lowest=1.0, highest=1.0001))
        errors = []
        for candidate in (float(together[channel]), float(factor)):
            rounded = fixed.grid(1.0).round(alone.left) @ family.grid(candidate).round(alone.right)
            errors.append(float((rounded - alone.left @ alone.right).square().sum()))
        assert errors[0] <= errors[1]


def test_the_search_is_deterministic(formed: Sam, images: list[np.ndarray], paper: dict[str, ProductGrids]) -> None:
    again = find_grids(formed, images[:2], Scheme(), QUICK)
    assert again.keys() == paper.keys()
    for name, found in again.items():
        assert all(torch.equal(a, b) for a, b in zip(found.factors, paper[name].factors, strict=True)), name
        assert found.relative_error == paper[name].relative_error


def test_a_search_says_how_far_it_is(formed: Sam, images: list[np.ndarray]) -> None:
    seen: list[tuple[str, int]] = []
    scheme = Scheme(only="image_encoder.neck.*")
    find_grids(formed, images[:1], scheme, QUICK, on_product=lambda name, count: seen.append((name, count)))
    assert seen == [("image_encoder.neck.0", 2), ("image_encoder.neck.2", 2)]


def test_products_named_as_floats_stay_as_they_are(formed: Sam, images: list[np.ndarray]) -> None:
    grids = find_grids(formed, images[:1], Scheme(method="minmax", floats=("mask_decoder.*", "*.attn.*")))
    assert grids
    assert not any(name.startswith("mask_decoder.") or ".attn." in name for name in grids)


def test_fewer_bits_and_a_worse_method_have_larger_errors(formed: Sam, images: list[np.ndarray]) -> None:
    image = torch.from_numpy(preprocess(formed, images[3]))
    with torch.no_grad():
        expected = formed.image_encoder(image).numpy()

    def error(method: Method, bits: int) -> float:
        scheme = Scheme(method=method, weight_bits=bits, activation_bits=bits, only="image_encoder.*")
        with simulated(formed, find_grids(formed, images[:2], scheme, QUICK)) as sam:
            return difference(expected, sam.image_encoder(image).numpy()).relative_error

    assert error("hessian", 8) < error("hessian", 6)
    assert error("mse", 6) < error("minmax", 6)


def test_leaving_the_simulation_leaves_nothing_behind(formed: Sam, paper: dict[str, ProductGrids]) -> None:
    image = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        before = formed.image_encoder(image)
        with simulated(formed, paper) as sam:
            assert not torch.equal(sam.image_encoder(image), before)
        assert torch.equal(formed.image_encoder(image), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in formed.modules())


def test_each_layer_of_the_simulation_gets_wrong_what_that_of_the_integer_graph_does(
    formed: Sam, images: list[np.ndarray], searched: QuantizedEncoder, searched_config: QuantizationConfig
) -> None:
    simulated_alone = simulated_errors(
        formed, find_grids(formed, images[:2], searched_config.scheme(), QUICK), images[3:4]
    )
    for layer in searched.layers:
        _, error = simulated_alone[f"image_encoder.{layer.name}"]
        assert error is not None
        assert layer.relative_error == pytest.approx(error.relative_error, rel=0.02), layer.name


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_simulation_loses_as_much_as_the_integer_graph(
    engine: str,
    formed: Sam,
    images: list[np.ndarray],
    searched: QuantizedEncoder,
    searched_config: QuantizationConfig,
) -> None:
    array = preprocess(formed, images[3])
    with simulated(formed, find_grids(formed, images[:2], searched_config.scheme(), QUICK)) as sam:
        simulation = sam.image_encoder(torch.from_numpy(array)).numpy()
    config = EngineConfig(engine=engine, num_threads=1, precision="fp32")
    actual, exact = (
        open_engine(model.SerializeToString(), config).run(array) for model in (searched.model, searched.float_model)
    )
    # The embeddings themselves may differ: one value on the edge between two integers moves others over theirs.
    losses = [difference(exact, embedding).relative_error for embedding in (simulation, actual)]
    assert losses[0] == pytest.approx(losses[1], rel=0.15)


def test_the_graph_has_the_searched_scales(
    formed: Sam, images: list[np.ndarray], searched: QuantizedEncoder, searched_config: QuantizationConfig
) -> None:
    grids = find_grids(formed, images[:2], searched_config.scheme(), QUICK)
    for layer in searched.layers:
        found = grids[f"image_encoder.{layer.name}"]
        scale = found.grid(0).scale  # type: ignore[attr-defined]
        assert layer.activation_scales[0] == pytest.approx(float(scale), rel=1e-5)
        if layer.weight_scales:
            np.testing.assert_allclose(layer.weight_scales, found.weight_bounds() / 127, rtol=1e-5)


@needs_vnni
def test_openvino_runs_every_layer_with_a_weight_on_integers(searched: QuantizedEncoder) -> None:
    executed = open_engine(
        searched.model.SerializeToString(), EngineConfig(engine="openvino", num_threads=1, precision="fp32")
    ).executed_layers()
    layers = [layer for layer in executed if layer.kind in ("Convolution", "FullyConnected")]
    assert layers
    assert [layer.name for layer in layers if not layer.is_integer] == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: Scheme(weight_bits=1),
        lambda: Scheme(percentile=0.0),
        lambda: SearchConfig(candidates=1),
        lambda: SearchConfig(lowest=0.0),
        lambda: SearchConfig(floor=-1.0),
        lambda: CalibrationConfig(rows=0),
    ],
)
def test_options_out_of_range_are_refused(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"must|needs"):
        make()
