import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from tinysam.quant import QuantizedEncoder
from tinysam.quant.graph import Layer
from tinysam.quant.observe import Range
from tinysam.quant.qdq import activation_steps, insert_qdq, weight_scales


@pytest.fixture(scope="module")
def ranges(layers: list[Layer]) -> dict[str, Range]:
    names = dict.fromkeys(name for layer in layers for name in layer.inputs)
    return {name: Range(low=-0.1, high=0.5 * (i + 1)) for i, name in enumerate(names)}


def test_int8_activations_are_symmetric_with_their_bound_at_127(
    float_model: onnx.ModelProto, layers: list[Layer], ranges: dict[str, Range]
) -> None:
    steps = activation_steps(insert_qdq(float_model, layers, ranges))
    assert steps.keys() == ranges.keys()
    for name, covered in ranges.items():
        assert steps[name] == (pytest.approx(covered.bound / 127, rel=1e-6), 0)


def test_uint8_activations_use_all_their_values_for_the_range(
    float_model: onnx.ModelProto, layers: list[Layer], ranges: dict[str, Range]
) -> None:
    steps = activation_steps(insert_qdq(float_model, layers, ranges, "uint8"))
    for name, covered in ranges.items():
        scale, zero_point = steps[name]
        assert scale == pytest.approx((covered.high - covered.low) / 255, rel=1e-6)
        assert zero_point == round(-covered.low / scale)


def test_weights_are_int8_with_one_symmetric_scale_for_each_output_channel(
    float_model: onnx.ModelProto, layers: list[Layer], ranges: dict[str, Range]
) -> None:
    model = insert_qdq(float_model, layers, ranges)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    floats = {tensor.name: tensor for tensor in float_model.graph.initializer}
    steps = weight_scales(model)
    for layer in layers:
        if layer.weight is None:
            assert layer.name not in steps
            continue
        weight = numpy_helper.to_array(floats[layer.weight])
        channel = 0 if layer.kind == "conv" else weight.ndim - 1
        others = tuple(axis for axis in range(weight.ndim) if axis != channel)
        np.testing.assert_allclose(steps[layer.name], np.abs(weight).max(others) / 127, rtol=1e-5)
        assert layer.weight not in constants, "the float weight would be kept beside the integer one"
    zero_points = [tensor for name, tensor in constants.items() if name.endswith("zero_point")]
    assert zero_points
    assert not any(numpy_helper.to_array(tensor).any() for tensor in zero_points)
    assert {tensor.data_type for tensor in zero_points} == {TensorProto.INT8}


def test_only_the_layers_asked_for_read_rounded_activations(
    float_model: onnx.ModelProto, layers: list[Layer], ranges: dict[str, Range]
) -> None:
    chosen = {layer.name for layer in layers[2:9]}
    model = insert_qdq(float_model, [layer for layer in layers if layer.name in chosen], ranges)
    rounded = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    readers = {node.name for node in model.graph.node if rounded.intersection(node.input)}
    assert readers == chosen


def test_quantizing_nothing_changes_nothing(float_model: onnx.ModelProto) -> None:
    assert insert_qdq(float_model, [], {}) == float_model


@pytest.mark.parametrize("bound", [None, 0.0, float("nan"), float("inf")])
def test_a_range_that_is_missing_empty_or_not_finite_is_refused(
    bound: float | None, float_model: onnx.ModelProto, layers: list[Layer]
) -> None:
    ranges = {} if bound is None else {layers[0].inputs[0]: Range(low=0.0, high=bound)}
    with pytest.raises(ValueError, match="no range for the activations image"):
        insert_qdq(float_model, layers[:1], ranges)


def test_the_weights_take_less_than_half_of_the_float_ones(quantized: QuantizedEncoder) -> None:
    int8, float32 = (
        sum(weight.ByteSize() for weight in model.graph.initializer)
        for model in (quantized.model, quantized.float_model)
    )
    assert int8 < 0.5 * float32
