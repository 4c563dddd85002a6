"""The encoder as an ONNX graph, and the layers in it that have integer kernels."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import onnx
import onnxscript.optimizer
import torch
from torch import nn

from tinysam.quant.engine_form import engine_form
from tinysam.runtime.graphs import quiet_export

INPUT, OUTPUT = "image", "embedding"
"""Names of the graph's input and output."""

ATTENTION_PRODUCTS = QUERY_KEY, WEIGHTS_VALUE = ".query_key", ".weights_value"
"""What the two products of an attention are called, after its module's name."""

LayerKind = Literal["conv", "linear", "matmul"]
_KINDS = ("Conv", "Gemm", "MatMul")
_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A convolution, a linear layer, or a product of two activations."""

    name: str
    """Path of its module in the encoder, such as ``backbone.stages.1.blocks.0.mlp.fc1``; the products of an attention
    end in ``.query_key`` and ``.weights_value``. Also the name of its ONNX node."""
    kind: LayerKind
    inputs: tuple[str, ...]
    """Names of its activations in the graph: one, or two for ``matmul``."""
    weight: str | None
    """Name of its weight in the graph; None for ``matmul``."""
    output: str
    """Name of its result in the graph, before a linear layer's bias is added."""


def export_graph(encoder: nn.Module, image_size: int) -> onnx.ModelProto:
    """Exports an image encoder in float32, for one image at a time.

    Nodes are named after the modules that they came from (:attr:`Layer.name`).

    Args:
        encoder: ``(1, 3, image_size, image_size)`` to the embedding, in eval mode, on the CPU.
    """
    image = torch.zeros(1, 3, image_size, image_size)
    encoder = engine_form(encoder)
    with quiet_export(), torch.no_grad():
        program = torch.onnx.export(
            encoder,
            (image,),
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            external_data=False,
            verbose=False,
            optimize=False,
        )
    assert program is not None
    # Lookups of constants, which are the attention biases, stay what they are: expanded ones would fill the file.
    onnxscript.optimizer.optimize_ir(
        program.model, should_fold=lambda node: False if node.op_type == "Gather" else None
    )
    model = onnx.shape_inference.infer_shapes(program.model_proto)
    _name_layers(model.graph)
    _drop_traces(model.graph)
    return model


def find_layers(model: onnx.ModelProto) -> list[Layer]:
    """The layers of a float graph of :func:`export_graph` that can be quantized, in the order of execution."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [_layer(node, weights) for node in model.graph.node if node.op_type in _KINDS]


def initializers(model: onnx.ModelProto, names: Sequence[str]) -> dict[str, onnx.TensorProto]:
    """The constants of these names."""
    wanted = set(names)
    return {tensor.name: tensor for tensor in model.graph.initializer if tensor.name in wanted}


def _layer(node: onnx.NodeProto, weights: set[str]) -> Layer:
    weight = node.input[1] if node.input[1] in weights else None
    inputs = tuple(node.input[:2]) if weight is None else (node.input[0],)
    kind: LayerKind = "matmul" if weight is None else "conv" if node.op_type == "Conv" else "linear"
    return Layer(name=node.name, kind=kind, inputs=inputs, weight=weight, output=node.output[0])


def _name_layers(graph: onnx.GraphProto) -> None:
    weights = {tensor.name for tensor in graph.initializer}
    from_softmax = {name for node in graph.node if node.op_type == "Softmax" for name in node.output}
    taken: set[str] = set()
    for number, node in enumerate(graph.node):
        scope = _scope(node)
        if node.op_type not in _KINDS:
            name = f"{scope}/{node.op_type}_{number}"
        elif node.input[1] in weights:
            name = scope
        else:
            name = scope + (WEIGHTS_VALUE if node.input[0] in from_softmax else QUERY_KEY)
        node.name = name if name not in taken else f"{name}#{number}"
        taken.add(node.name)


def _scope(node: onnx.NodeProto) -> str:
    """Path of the module that the node came from: the last scope but one, which is the operation itself."""
    for property_ in node.metadata_props:
        if property_.key == _SCOPES:
            return str(ast.literal_eval(property_.value)[-2])
    return ""


def _drop_traces(graph: onnx.GraphProto) -> None:
    """Removes the exporter's notes, which hold stack traces with the paths of this machine."""
    del graph.metadata_props[:]
    for item in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""
