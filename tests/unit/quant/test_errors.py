import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from segment_anything.modeling import Sam
from torch import from_numpy
from torch.nn.functional import conv2d

from tinysam.quant import QuantizedEncoder
from tinysam.quant.errors import DifferenceSum, difference, layer_errors
from tinysam.quant.graph import Layer
from tinysam.quant.quantize import preprocess


@given(st.floats(0.01, 100), st.floats(0.1, 3))
def test_a_multiple_has_the_same_direction(length: float, factor: float) -> None:
    array = np.array([3.0, -4.0], dtype=np.float32) * np.float32(length)
    result = difference(array, array * np.float32(factor))
    assert result.relative_error == pytest.approx(abs(factor - 1), abs=1e-5)
    assert result.cosine == pytest.approx(1.0)


def test_zeros_have_no_error_against_zeros_and_a_whole_one_against_others() -> None:
    zeros, ones = np.zeros(3, dtype=np.float32), np.ones(3, dtype=np.float32)
    assert difference(zeros, zeros).relative_error == 0.0
    assert difference(zeros, ones).relative_error == 1.0
    assert difference(ones, zeros).relative_error == 1.0


def test_parts_add_up_to_the_whole(rng: np.random.Generator) -> None:
    a, b = rng.normal(size=(2, 50)).astype(np.float32)
    total = DifferenceSum()
    total.add(a[:20], b[:20])
    total.add(a[20:], b[20:])
    assert total.result().relative_error == pytest.approx(difference(a, b).relative_error, rel=1e-5)
    assert total.result().cosine == pytest.approx(difference(a, b).cosine, rel=1e-5)


def test_a_layers_error_is_that_of_rounding_its_own_input_and_weight(
    tiny_sam: Sam,
    images: list[np.ndarray],
    quantized: QuantizedEncoder,
    float_model: onnx.ModelProto,
    layers: list[Layer],
) -> None:
    image = preprocess(tiny_sam, images[3])
    first, report = layers[0], quantized.layers[0]
    (actual,) = layer_errors(float_model, quantized.model, layers[:1], [image], num_threads=1).values()

    constants = {tensor.name: np.array(numpy_helper.to_array(tensor)) for tensor in float_model.graph.initializer}
    weight, bias = constants[first.weight], constants[first.weight.replace("weight", "bias")]
    (step,), steps = report.activation_scales, np.array(report.weight_scales, dtype=np.float32)[:, None, None, None]
    rounded = np.clip(np.round(image / np.float32(step)), -128, 127) * np.float32(step)
    rounded_weight = np.round(weight / steps) * steps

    def convolve(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        return conv2d(from_numpy(x), from_numpy(w), from_numpy(bias), stride=2, padding=1).numpy()

    expected = difference(convolve(image, weight), convolve(rounded, rounded_weight))
    assert actual.relative_error == pytest.approx(expected.relative_error, rel=0.01)


def test_every_layer_is_measured_and_rounds_a_little(quantized: QuantizedEncoder) -> None:
    errors = [layer.relative_error for layer in quantized.layers]
    assert all(error is not None and 1e-4 < error < 0.1 for error in errors)
