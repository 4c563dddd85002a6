from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from segment_anything.modeling import Sam
from torch import nn

from tinysam.quant import sampling
from tinysam.quant.explicit import explicit_encoder
from tinysam.quant.graph import Layer
from tinysam.quant.observe import run_outputs, session_with_outputs
from tinysam.quant.quantize import preprocess
from tinysam.quant.sampling import Operands, sample_operands, task_loss

SIZE = (128, 96)


@pytest.fixture(scope="module")
def encoder(tiny_sam: Sam) -> nn.Module:
    return explicit_encoder(tiny_sam.image_encoder)


@pytest.fixture(scope="module")
def arrays(tiny_sam: Sam, images: list[np.ndarray]) -> list[np.ndarray]:
    return [preprocess(tiny_sam, image) for image in images[:2]]


@pytest.fixture(scope="module")
def ends(encoder: nn.Module, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """The embeddings of an encoder that is a little off."""
    with torch.no_grad():
        return [encoder(torch.from_numpy(array)).numpy() * 1.05 for array in arrays]


def sample(
    sam: Sam, encoder: nn.Module, layers: list[Layer], arrays: list[np.ndarray], ends: list[np.ndarray]
) -> dict[str, Operands]:
    found = sample_operands(sam, encoder, layers, arrays, [SIZE] * len(arrays), ends)
    return {layer.name: operands for layer, operands in found}


def test_the_explicit_encoder_is_the_encoder(tiny_sam: Sam, encoder: nn.Module, arrays: list[np.ndarray]) -> None:
    image = torch.from_numpy(arrays[0])
    with torch.no_grad():
        torch.testing.assert_close(encoder(image), tiny_sam.image_encoder(image), rtol=1e-4, atol=1e-4)


def test_samples_multiply_to_what_the_graph_computes(
    tiny_sam: Sam,
    encoder: nn.Module,
    float_model: onnx.ModelProto,
    layers: list[Layer],
    arrays: list[np.ndarray],
    ends: list[np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampling, "ROWS", 1 << 20)  # all of them, so that sums can be compared
    monkeypatch.setattr(sampling, "ITEMS", 1 << 20)
    found = sample(tiny_sam, encoder, layers, arrays[:1], ends[:1])
    assert list(found) == [layer.name for layer in layers]
    session = session_with_outputs(float_model, [layer.output for layer in layers], 1)
    biases = {
        node.name: node.input[2] for node in float_model.graph.node if node.op_type == "Conv" and len(node.input) > 2
    }
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in float_model.graph.initializer}
    for layer, output in zip(layers, run_outputs(session, [x.output for x in layers], arrays[0]), strict=True):
        operands = found[layer.name]
        product = (operands.left @ operands.right).numpy()
        assert product.size == output.size == operands.gradient.numel(), layer.name
        if layer.name in biases:
            output = output - constants[biases[layer.name]][None, :, None, None]
        expected = np.sort(output, axis=None)
        np.testing.assert_allclose(np.sort(product, axis=None), expected, atol=2e-3 * np.abs(expected).max())


def test_gradients_are_those_of_the_task_loss(
    tiny_sam: Sam, encoder: nn.Module, layers: list[Layer], arrays: list[np.ndarray], ends: list[np.ndarray]
) -> None:
    last = next(layer for layer in reversed(layers) if layer.name == "neck.0")
    gradient = sample(tiny_sam, encoder, [last], arrays[:1], ends[:1])[last.name].gradient
    assert isinstance(encoder.neck, nn.Sequential)
    with torch.no_grad():
        before = encoder.neck[0](encoder.backbone.forward_features(torch.from_numpy(arrays[0])))  # type: ignore[operator]
    before.requires_grad_()
    embedding = encoder.neck[1:](before)
    shift = torch.from_numpy(ends[0]) - embedding.detach()
    (expected,) = torch.autograd.grad(task_loss(tiny_sam, embedding + shift, embedding.detach(), SIZE), before)
    torch.testing.assert_close(gradient, expected.flatten(2).transpose(1, 2), rtol=1e-3, atol=1e-9)
    assert gradient.abs().max() > 0


def test_equal_embeddings_have_no_loss_and_others_do(tiny_sam: Sam, ends: list[np.ndarray]) -> None:
    reference = torch.from_numpy(ends[0])
    with torch.no_grad():
        assert float(task_loss(tiny_sam, reference, reference, SIZE)) == pytest.approx(0.0, abs=1e-6)
        assert float(task_loss(tiny_sam, -reference, reference, SIZE)) > 1e-4


def test_fewer_bytes_make_more_passes_and_the_same_samples(
    tiny_sam: Sam,
    encoder: nn.Module,
    layers: list[Layer],
    arrays: list[np.ndarray],
    ends: list[np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    some = layers[:6]
    whole = sample(tiny_sam, encoder, some, arrays, ends)
    monkeypatch.setattr(sampling, "SAMPLE_BYTES", 1)
    passes: list[int] = []
    parts = sample_operands(tiny_sam, encoder, some, arrays, [SIZE] * 2, ends, on_image=lambda: passes.append(1))
    for layer, operands in parts:
        assert operands.left.shape == whole[layer.name].left.shape
        assert operands.gradient.shape == whole[layer.name].gradient.shape
    assert len(passes) == len(some) * len(arrays)
