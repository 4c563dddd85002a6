import numpy as np
import onnx
import torch
from segment_anything.modeling import Sam
from torch import nn

from tinysam.quant.engine_form import engine_form
from tinysam.quant.graph import Layer
from tinysam.runtime import EngineConfig, open_engine


def test_the_graph_computes_what_the_encoder_does(tiny_sam: Sam, float_model: onnx.ModelProto) -> None:
    image = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = tiny_sam.image_encoder(image).numpy()
    engine = open_engine(float_model.SerializeToString(), EngineConfig(engine="onnxruntime", num_threads=1))
    np.testing.assert_allclose(engine.run(image.numpy()), expected, rtol=1e-4, atol=1e-4)


def test_layers_are_called_like_the_modules_they_came_from(tiny_sam: Sam, layers: list[Layer]) -> None:
    modules = dict(engine_form(tiny_sam.image_encoder).named_modules())
    convolutions = {name for name, module in modules.items() if isinstance(module, nn.Conv2d)}
    linears = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    attentions = {name for name in modules if name.endswith(".attn")}
    products = {f"{name}.{part}" for name in attentions for part in ("query_key", "weights_value")}
    for kind, names in (("conv", convolutions), ("linear", linears), ("matmul", products)):
        assert {layer.name for layer in layers if layer.kind == kind} == names, kind


def test_layers_know_their_weight_unless_they_multiply_activations(
    float_model: onnx.ModelProto, layers: list[Layer]
) -> None:
    constants = {tensor.name for tensor in float_model.graph.initializer}
    for layer in layers:
        assert (layer.weight in constants) == (layer.kind != "matmul")
        assert len(layer.inputs) == (2 if layer.kind == "matmul" else 1)
        assert constants.isdisjoint(layer.inputs)


def test_the_graph_says_nothing_about_the_machine_it_was_made_on(float_model: onnx.ModelProto) -> None:
    data = float_model.SerializeToString()
    assert b".py" not in data
    assert b"/site-packages/" not in data
