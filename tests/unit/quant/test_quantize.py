import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from segment_anything.modeling import Sam

from tinysam.quant import (
    QuantizationConfig,
    QuantizationError,
    QuantizedEncoder,
    compare,
    quantize_encoder,
    with_encoder,
)
from tinysam.quant import agreement as agreement_module
from tinysam.quant import quantize as quantize_module
from tinysam.quant.budget import layers_over_budget
from tinysam.quant.errors import difference
from tinysam.quant.graph import Layer
from tinysam.quant.layers import IS_CONSTANT
from tinysam.quant.observe import Range
from tinysam.quant.qdq import insert_qdq
from tinysam.quant.quantize import preprocess
from tinysam.quant.report import measure
from tinysam.quant.scheme import Method
from tinysam.quant.search import SearchConfig
from tinysam.runtime import EngineConfig, EngineImageEncoder, open_engine

ONE_THREAD = EngineConfig(engine="onnxruntime", num_threads=1)


@pytest.fixture
def without_export(float_model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exporting takes seconds and gives the same graph every time."""
    monkeypatch.setattr(quantize_module, "export_graph", lambda encoder, image_size: float_model)


@pytest.fixture
def quantize(
    tiny_sam: Sam, images: list[np.ndarray], without_export: None
) -> Callable[[QuantizationConfig], QuantizedEncoder]:
    return lambda config: quantize_encoder(tiny_sam, images[:3], images[3:], config, num_threads=1)


def embedding_error(sam: Sam, encoder: QuantizedEncoder, image: np.ndarray) -> float:
    array = preprocess(sam, image)
    expected, actual = (
        open_engine(model.SerializeToString(), ONE_THREAD).run(array) for model in (encoder.float_model, encoder.model)
    )
    return difference(expected, actual).relative_error


def test_every_layer_is_quantized_and_the_embedding_stays_close(
    tiny_sam: Sam, quantized: QuantizedEncoder, layers: list[Layer], images: list[np.ndarray]
) -> None:
    assert [layer.name for layer in quantized.layers] == [layer.name for layer in layers]
    assert quantized.num_int8 == len(layers)
    assert 0 < embedding_error(tiny_sam, quantized, images[3]) < 0.05


def test_the_same_images_give_the_same_bytes(
    quantize: Callable[[QuantizationConfig], QuantizedEncoder],
    quantized: QuantizedEncoder,
    everything: QuantizationConfig,
) -> None:
    again = quantize(everything)
    assert again.model.SerializeToString(deterministic=True) == quantized.model.SerializeToString(deterministic=True)
    assert again.layers == quantized.layers


def test_a_lower_percentile_makes_finer_steps(
    quantize: Callable[[QuantizationConfig], QuantizedEncoder],
    quantized: QuantizedEncoder,
    everything: QuantizationConfig,
) -> None:
    clipped = quantize(replace(everything, method="percentile", percentile=99.0))
    pairs = [
        (a, b)
        for fine, coarse in zip(clipped.layers, quantized.layers, strict=True)
        for a, b in zip(fine.activation_scales, coarse.activation_scales, strict=True)
    ]
    assert all(fine <= coarse * 1.001 for fine, coarse in pairs)
    assert any(fine < 0.8 * coarse for fine, coarse in pairs)


def test_unsigned_activations_make_finer_steps_behind_a_gelu(
    tiny_sam: Sam,
    images: list[np.ndarray],
    quantize: Callable[[QuantizationConfig], QuantizedEncoder],
    quantized: QuantizedEncoder,
    everything: QuantizationConfig,
) -> None:
    unsigned = quantize(replace(everything, activations="uint8"))
    for fine, coarse in zip(unsigned.layers, quantized.layers, strict=True):
        assert coarse.activation_zero_points == (0,) * len(coarse.activation_scales)
        if fine.name.endswith(("mlp.fc2", ".downsample.conv2")):
            assert fine.activation_scales[0] < coarse.activation_scales[0]
    assert embedding_error(tiny_sam, unsigned, images[3]) < embedding_error(tiny_sam, quantized, images[3])


def test_the_products_of_attentions_stay_float_unless_asked_for(
    quantize: Callable[[QuantizationConfig], QuantizedEncoder],
) -> None:
    encoder = quantize(QuantizationConfig())
    floats = {layer.name for layer in encoder.layers if layer.precision == "float32"}
    assert floats == {layer.name for layer in encoder.layers if layer.kind == "matmul"}
    assert floats


def test_layers_that_are_named_stay_float(
    quantize: Callable[[QuantizationConfig], QuantizedEncoder], everything: QuantizationConfig
) -> None:
    encoder = quantize(replace(everything, float_layers=("neck.*", "*.query_key")))
    for layer in encoder.layers:
        named = layer.name.startswith("neck.") or layer.name.endswith(".query_key")
        assert (layer.precision == "float32") == named
        assert (layer.reason is not None) == named
        assert (layer.relative_error is None) == named


def test_an_input_that_is_always_zero_keeps_its_layer_float(
    quantize: Callable[[QuantizationConfig], QuantizedEncoder],
    layers: list[Layer],
    everything: QuantizationConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dead = layers[4].inputs[0]
    ranges = {name: Range(low=-1.0, high=1.0) for layer in layers for name in layer.inputs}
    ranges[dead] = Range(low=0.0, high=0.0)
    monkeypatch.setattr(quantize_module, "observe", lambda *args, **kwargs: ranges)
    encoder = quantize(everything)
    floats = {layer.name: layer.reason for layer in encoder.layers if layer.precision == "float32"}
    assert floats == {layer.name: "an input of it is 0 on every calibration image" for layer in layers[4:5]}


@pytest.mark.parametrize("method", ["hessian", "minmax"])
def test_a_layer_behind_one_that_gives_zeros_alone_stays_float(
    method: Method, tiny_sam: Sam, images: list[np.ndarray]
) -> None:
    dead = copy.deepcopy(tiny_sam)
    silent = dead.image_encoder.backbone.stages[1].blocks[0].mlp.fc1
    for parameter in (silent.weight, silent.bias, dead.mask_decoder.transformer.layers[0].mlp.lin1.weight):
        torch.nn.init.zeros_(parameter)
    torch.nn.init.constant_(dead.mask_decoder.transformer.layers[0].mlp.lin1.bias, -1.0)  # before a ReLU
    config = QuantizationConfig(method=method, search=SearchConfig(candidates=2, rounds=1))
    encoder = quantize_encoder(dead, images[:1], images[3:4], config, num_threads=1)
    constant = [layer.name for layer in (*encoder.layers, *encoder.decoder_layers) if layer.reason == IS_CONSTANT]
    assert constant == ["backbone.stages.1.blocks.0.mlp.fc2", "mask_decoder.transformer.layers.0.mlp.lin2"]
    assert embedding_error(dead, encoder, images[4]) < 0.05


def test_onnxruntime_runs_linear_layers_and_products_of_activations_on_integers(quantized: QuantizedEncoder) -> None:
    executed = open_engine(quantized.model.SerializeToString(), ONE_THREAD).executed_layers()
    on_integers = {layer.name for layer in executed if layer.is_integer}
    kinds = {layer.kind for layer in executed if layer.is_integer}
    assert kinds <= {"MatMulIntegerToFloat", "QLinearMatMul"}
    assert {layer.name for layer in quantized.layers if layer.kind != "conv"} <= on_integers


def test_a_budget_keeps_the_worst_layers_float_and_as_few_as_suffice(
    tiny_sam: Sam,
    images: list[np.ndarray],
    float_model: onnx.ModelProto,
    layers: list[Layer],
    quantized: QuantizedEncoder,
) -> None:
    some = layers[-6:]
    ranges = {
        name: Range(low=-127 * step, high=127 * step)
        for layer, report in zip(layers, quantized.layers, strict=True)
        for name, step in zip(layer.inputs, report.activation_scales, strict=True)
    }
    worst = some[-1]  # what it rounds badly, no layer behind it evens out
    ranges[worst.inputs[0]] = Range(low=0.0, high=30 * ranges[worst.inputs[0]].high)
    array = preprocess(tiny_sam, images[0])

    def error(chosen: list[Layer]) -> float:
        models = [float_model, insert_qdq(float_model, chosen, ranges)]
        a, b = (open_engine(model.SerializeToString(), ONE_THREAD).run(array) for model in models)
        return difference(a, b).relative_error

    whole, rest = error(some), error(some[:-1])
    assert rest < 0.5 * whole
    calls: list[int] = []
    kept = layers_over_budget(
        float_model, some, ranges, [array], (whole + rest) / 2, num_threads=1, on_layer=lambda: calls.append(1)
    )
    assert list(kept) == [worst.name]
    assert kept[worst.name] == pytest.approx(error([worst]), rel=1e-4)
    assert len(calls) == len(some)
    assert layers_over_budget(float_model, some, ranges, [array], whole * 1.01, num_threads=1) == {}


def test_a_budget_that_nothing_meets_is_an_error(
    quantize: Callable[[QuantizationConfig], QuantizedEncoder], layers: list[Layer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_module, "find_layers", lambda model: layers[:2])
    with pytest.raises(QuantizationError, match="no layer is left"):
        quantize(QuantizationConfig(max_error=1e-9))


def test_a_pattern_that_names_no_layer_is_an_error(quantize: Callable[[QuantizationConfig], QuantizedEncoder]) -> None:
    with pytest.raises(QuantizationError, match=r"no layer is called nick\.\*"):
        quantize(QuantizationConfig(float_layers=("neck.*", "nick.*")))


def test_a_quantized_model_is_not_quantized_again(
    tiny_sam: Sam, quantized: QuantizedEncoder, images: list[np.ndarray]
) -> None:
    sam = with_encoder(tiny_sam, EngineImageEncoder(quantized.model.SerializeToString(), ONE_THREAD))
    with pytest.raises(QuantizationError, match="quantized already"):
        quantize_encoder(sam, images[:1], images[1:], QuantizationConfig())


def test_no_image_is_an_error(tiny_sam: Sam, images: list[np.ndarray]) -> None:
    with pytest.raises(QuantizationError, match="at least one"):
        quantize_encoder(tiny_sam, [], images, QuantizationConfig())


@pytest.mark.parametrize("options", [{"percentile": 0.0}, {"percentile": 101.0}, {"max_error": 0.0}])
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        QuantizationConfig(**options)


def test_preprocessing_is_what_the_predictor_does(tiny_sam: Sam, images: list[np.ndarray]) -> None:
    from tinysam import SamPredictor

    predictor = SamPredictor(tiny_sam)
    predictor.set_image(images[0])
    with torch.no_grad():
        embedding = tiny_sam.image_encoder(torch.from_numpy(preprocess(tiny_sam, images[0])))
    torch.testing.assert_close(embedding, predictor.get_image_embedding())


def test_a_model_agrees_with_itself(tiny_sam: Sam, images: list[np.ndarray]) -> None:
    agreement = compare(tiny_sam, tiny_sam, images[0], points_per_side=3)
    assert agreement.mask_iou == (1.0,) * 9
    assert agreement.embedding.relative_error == 0.0
    assert agreement.predicted_iou_difference == 0.0


def test_masks_are_compared_where_the_float_model_is_surest(
    tiny_sam: Sam, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected_masks = np.zeros((2, 3, 4, 4), dtype=bool)
    expected_masks[0, 1, :2] = True
    masks = expected_masks.copy()
    masks[0, 1, 1:] = True  # 8 pixels of 16 are in both
    masks[:, 0] = True  # neither model thinks these best
    expected_iou = np.array([[0.1, 0.9, 0.2], [0.0, 0.1, 0.5]])
    iou = expected_iou + np.array([[5.0, 0.1, 5.0], [5.0, 5.0, -0.3]])
    embedding = np.ones((1, 2, 2, 2), dtype=np.float32)
    quantized = with_encoder(tiny_sam, torch.nn.Identity())
    monkeypatch.setattr(
        agreement_module,
        "_predict",
        lambda sam, image, points: (
            (expected_masks, expected_iou, embedding) if sam is tiny_sam else (masks, iou, embedding * 1.5)
        ),
    )
    agreement = compare(tiny_sam, quantized, images[0], points_per_side=1)
    assert agreement.mask_iou == (0.5, 1.0)  # the second: both empty
    assert agreement.predicted_iou_difference == pytest.approx(0.2)
    assert agreement.embedding.relative_error == pytest.approx(0.5)


def test_the_report_counts_what_ran_and_compares_with_the_float_model(
    tiny_sam: Sam, quantized: QuantizedEncoder, images: list[np.ndarray]
) -> None:
    encoder = EngineImageEncoder(quantized.model.SerializeToString(), ONE_THREAD)
    seen: list[int] = []
    report = measure(
        tiny_sam,
        with_encoder(tiny_sam, encoder),
        quantized,
        images[3:],
        repetitions=1,
        on_image=lambda: seen.append(1),
    )
    assert len(seen) == 2
    assert (report.engine, report.precision, report.num_threads) == ("onnxruntime", "fp32", 1)
    assert report.layers == report.layers_int8 == len(quantized.layers)
    assert 0 < report.embedding_relative_error <= report.embedding_relative_error_worst < 0.05
    assert 0.9 < report.mask_iou <= 1
    assert report.bytes_int8_encoder < 0.6 * report.bytes_float_encoder  # a graph this small is half names
    assert min(report.torch_fp32_ms, report.engine_fp32_ms, report.int8_ms) > 0
