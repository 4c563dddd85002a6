import copy
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tests.integer_cpus import needs_vnni
from tinysam.runtime import (
    EngineConfig,
    EngineError,
    EngineImageEncoder,
    ExecutedLayer,
    count_precisions,
    open_engine,
    processor,
)
from tinysam.runtime import openvino_engine as openvino_module

SIZE, CHANNELS = 32, 8


@pytest.fixture
def weight(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(CHANNELS, 3, 16, 16)).astype(np.float32) / 16


@pytest.fixture
def conv_graph(weight: np.ndarray) -> bytes:
    """A convolution with stride 16: shaped like an image encoder."""
    node = helper.make_node("Conv", ["image", "w"], ["embedding"], name="conv", strides=[16, 16])
    return _graph([node], {"w": weight})


@pytest.fixture
def quantized_conv_graph(weight: np.ndarray) -> bytes:
    """The same with int8 weights and an int8 input of step 1/32."""
    scale = np.abs(weight).max((1, 2, 3)) / 127
    integers = np.round(weight / scale[:, None, None, None]).astype(np.int8)
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["dq"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["dw"], axis=0),
        helper.make_node("Conv", ["dq", "dw"], ["embedding"], name="conv", strides=[16, 16]),
    ]
    constants = {
        "s": np.float32(1 / 32),
        "z": np.int8(0),
        "w": integers,
        "ws": scale.astype(np.float32),
        "wz": np.zeros(CHANNELS, dtype=np.int8),
    }
    return _graph(nodes, constants)


def _graph(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray]) -> bytes:
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [1, CHANNELS, SIZE // 16, SIZE // 16])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


@pytest.fixture
def images(rng: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(rng.normal(size=(3, 3, SIZE, SIZE)).astype(np.float32))


def config(engine: str, **options: object) -> EngineConfig:
    return EngineConfig(engine=engine, num_threads=1, precision=options.pop("precision", "fp32"), **options)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_a_batch_gives_what_torch_gives(
    engine: str, conv_graph: bytes, weight: np.ndarray, images: torch.Tensor
) -> None:
    encoder = EngineImageEncoder(conv_graph, config(engine))
    expected = torch.conv2d(images, torch.from_numpy(weight), stride=16)
    actual = encoder(images)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert encoder(images[:0]).shape == (0, *expected.shape[1:])
    assert (encoder.img_size, encoder.engine.name, encoder.engine.num_threads) == (SIZE, engine, 1)


def test_results_stay_when_the_engine_runs_again(conv_graph: bytes, images: torch.Tensor) -> None:
    engine = open_engine(conv_graph, config("openvino"))
    first = engine.run(images[:1].numpy())
    kept = first.copy()
    engine.run(images[1:2].numpy())
    np.testing.assert_array_equal(first, kept)


def test_an_image_of_another_size_is_refused(conv_graph: bytes) -> None:
    encoder = EngineImageEncoder(conv_graph, config("openvino"))
    with pytest.raises(ValueError, match=r"\(B, 3, 32, 32\), got \(1, 3, 64, 64\)"):
        encoder(torch.zeros(1, 3, 64, 64))


def test_the_encoder_has_no_gradient_and_no_weights(conv_graph: bytes, images: torch.Tensor) -> None:
    encoder = EngineImageEncoder(conv_graph, config("openvino"))
    assert not encoder(images.requires_grad_()).requires_grad
    assert encoder.state_dict() == {}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda encoder: pickle.loads(pickle.dumps(encoder))])
def test_copies_and_pickles_compute_the_same(duplicate, conv_graph: bytes, images: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    encoder = EngineImageEncoder(conv_graph, config("openvino")).eval()
    other = duplicate(encoder)
    assert torch.equal(other(images), encoder(images))
    assert other.engine is not encoder.engine
    assert not other.training


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_a_quantized_convolution_rounds_as_the_formula_says(
    engine: str, quantized_conv_graph: bytes, weight: np.ndarray, images: torch.Tensor
) -> None:
    scale = np.abs(weight).max((1, 2, 3), keepdims=True) / 127
    rounded_weight = torch.from_numpy((np.round(weight / scale) * scale).astype(np.float32))
    rounded = (images * 32).round().clamp(-128, 127) / 32
    expected = torch.conv2d(rounded, rounded_weight, stride=16)
    actual = EngineImageEncoder(quantized_conv_graph, config(engine))(images)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@needs_vnni
def test_openvino_says_that_a_quantized_convolution_ran_on_integers(
    conv_graph: bytes, quantized_conv_graph: bytes
) -> None:
    quantized = open_engine(quantized_conv_graph, config("openvino")).executed_layers()
    assert [layer.is_integer for layer in quantized if layer.kind == "Convolution"] == [True]
    plain = open_engine(conv_graph, config("openvino")).executed_layers()
    assert [layer.precision for layer in plain if layer.kind == "Convolution"] == ["f32"]


def test_openvino_multiplies_rounded_values_in_float_where_integers_would_overflow(
    quantized_conv_graph: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text("flags\t: fpu avx2\n")
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    layers = open_engine(quantized_conv_graph, config("openvino")).executed_layers()
    assert [layer.is_integer for layer in layers if layer.kind == "Convolution"] == [False]


def test_onnxruntime_says_what_it_executes(conv_graph: bytes) -> None:
    layers = open_engine(conv_graph, config("onnxruntime")).executed_layers()
    assert [(layer.kind, layer.is_integer) for layer in layers if "Conv" in layer.kind] == [("Conv", False)]


def test_executed_layers_are_counted_by_kind_and_precision() -> None:
    layers = [ExecutedLayer(name=str(i), kind="Convolution", precision=p) for i, p in enumerate(["u8", "f32", "u8"])]
    assert count_precisions(layers) == {"Convolution": {"f32": 1, "u8": 2}}


def test_a_signal_after_engines_ended_in_the_order_of_their_beginning_is_handled(
    conv_graph: bytes, tmp_path: Path
) -> None:
    (tmp_path / "graph.onnx").write_bytes(conv_graph)
    code = """
import gc, os, signal, sys
from pathlib import Path
from tinysam.runtime import EngineConfig, open_engine

graph, config = Path(sys.argv[1]).read_bytes(), EngineConfig(engine="openvino", num_threads=1)
first, second = open_engine(graph, config), open_engine(graph, config)
signal.signal(signal.SIGUSR1, lambda number, frame: print("handled"))
del first
gc.collect()
del second
gc.collect()
os.kill(os.getpid(), signal.SIGUSR1)
"""
    # In a process of its own, which crashed when each engine had an OpenVINO core to itself.
    command = [sys.executable, "-c", code, str(tmp_path / "graph.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_auto_falls_back_and_says_so(
    conv_graph: bytes, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class NoKernel(openvino_module.OpenVinoEngine):
        def __init__(self, model: bytes, config: EngineConfig) -> None:
            raise EngineError("OpenVINO has no kernel for it")

    monkeypatch.setattr(openvino_module, "OpenVinoEngine", NoKernel)
    engine = open_engine(conv_graph, EngineConfig(num_threads=1))
    assert (engine.name, engine.precision) == ("onnxruntime", "fp32")
    assert "ONNX Runtime" in caplog.text
    assert "OpenVINO has no kernel for it" in caplog.text
    with pytest.raises(EngineError, match="no kernel"):
        open_engine(conv_graph, config("openvino"))
    with pytest.raises(EngineError, match="no kernel"):  # the fall-back could not do what was asked
        open_engine(conv_graph, config("auto", precision="bf16"))


def test_auto_takes_openvino_where_it_can(conv_graph: bytes) -> None:
    assert open_engine(conv_graph).name == "openvino"


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "auto"])
def test_bytes_that_are_no_graph_are_an_engine_error(engine: str) -> None:
    with pytest.raises(EngineError, match="cannot run this graph"):
        open_engine(b"no graph at all", config(engine))


def test_a_graph_that_is_no_encoder_is_refused(weight: np.ndarray) -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "other",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with pytest.raises(ValueError, match=r"takes \(1, 3, S, S\), this graph takes \(1, 5\)"):
        EngineImageEncoder(model.SerializeToString(), config("onnxruntime"))


def test_threads_default_to_torch(conv_graph: bytes) -> None:
    assert open_engine(conv_graph, EngineConfig()).num_threads == torch.get_num_threads()


@pytest.mark.parametrize(
    "options", [{"num_threads": 0}, {"engine": "onnxruntime", "precision": "bf16"}], ids=["threads", "bf16"]
)
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"num_threads|bf16"):
        EngineConfig(**options)
