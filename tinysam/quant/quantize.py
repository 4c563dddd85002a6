"""Static W8A8 of a Sam's image encoder, as a graph of integers."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
import torch
from segment_anything.modeling import Sam

from tinysam.predictor import ResizeLongestSide, check_image
from tinysam.quant.budget import layers_over_budget
from tinysam.quant.engine_form import engine_form
from tinysam.quant.errors import layer_errors
from tinysam.quant.graph import ATTENTION_PRODUCTS, Layer, export_graph, find_layers
from tinysam.quant.layers import DECODER, ENCODER, IS_CONSTANT, LayerReport, decoder_layers
from tinysam.quant.observe import Range, observe
from tinysam.quant.qdq import ActivationType, activation_steps, insert_qdq, weight_scales
from tinysam.quant.scheme import Method, Scheme
from tinysam.quant.search import ProductGrids, SearchConfig, find_grids
from tinysam.runtime import EngineImageEncoder

BUDGET_IMAGES = 2
"""Calibration images on which ``QuantizationConfig.max_error`` is measured."""


class QuantizationError(Exception):
    """A model that cannot be quantized as asked; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """How the encoder is quantized: 8-bit weights and activations, one scale for each activation tensor and one for
    each output channel of a weight."""

    method: Method = "percentile"
    """How scales are found: hessian, mse, percentile or minmax; see ``tinysam.quant.scheme.Scheme.method``."""
    search: SearchConfig = field(default_factory=SearchConfig)
    """Of the methods hessian and mse."""
    activations: ActivationType = "uint8"
    """uint8: with a zero point, so that what follows a GELU, which is hardly ever negative, gets steps half as wide:
    on a demo student it took a third off the embedding's error. OpenVINO and ONNX Runtime run that, TensorRT does not.
    int8: symmetric around 0, which every engine runs."""
    percentile: float = 99.99
    """Of the method percentile: a range covers this percentage of the values seen in calibration, and what is beyond
    is clipped. On the shipped student, 99.99 takes a sixth to a third off the embedding's error."""
    attention_products: bool = False
    """Quantize the two products of each attention as well. Engines fuse an attention that is bf16 throughout into one
    kernel: on a processor with AMX, a vit_t whose query-key products are integers takes 9 % more time in all. And
    softmax spreads its weights over a window's 49 to 256 tokens, so that most get smaller than a step: of the shipped
    student's error in all, half would come from the products of weights and values."""
    float_layers: tuple[str, ...] = ()
    """Shell patterns of layers that stay in float, such as "neck.*"; calibration.json lists the layers' names."""
    max_error: float | None = None
    """Largest relative error that the embedding may have on calibration images. Where it is larger, the layers that
    hurt most stay in float, as few as suffice. None: no layer stays in float for its error."""

    def __post_init__(self) -> None:
        if not 0 < self.percentile <= 100:
            raise ValueError(f"percentile must be above 0 and at most 100, got {self.percentile}")
        if self.max_error is not None and self.max_error <= 0:
            raise ValueError(f"max_error must be positive, got {self.max_error}")

    def scheme(self) -> Scheme:
        """The same for the search and the simulation: what integer kernels can do, and no more.

        Covers the mask decoder as well, for the report.
        """
        return Scheme(
            method=self.method,
            affine=self.activations == "uint8",
            two_ranges=False,
            per_head=False,
            per_channel_linear=True,
            percentile=self.percentile,
            floats=() if self.attention_products else tuple(f"{ENCODER}*{end}" for end in ATTENTION_PRODUCTS),
        )


@dataclass(frozen=True, kw_only=True)
class QuantizedEncoder:
    """An image encoder as graphs that engines run."""

    model: onnx.ModelProto
    """The QDQ graph."""
    float_model: onnx.ModelProto
    """The float32 graph that it was made from."""
    layers: tuple[LayerReport, ...]
    """Every convolution, linear layer and product of activations, in the order of execution."""
    decoder_layers: tuple[LayerReport, ...]
    """Those of the mask decoder, which stay in float, with the errors that integers would make."""

    @property
    def num_int8(self) -> int:
        """Quantized layers."""
        return sum(layer.precision == "int8" for layer in self.layers)


@torch.no_grad()
def preprocess(sam: Sam, image: np.ndarray) -> np.ndarray:
    """What ``sam``'s image encoder sees of an image: (H, W, 3) uint8 RGB to (1, 3, S, S) float32, normalised."""
    resized = ResizeLongestSide(sam.image_encoder.img_size).apply_image(check_image(image))
    return sam.preprocess(torch.from_numpy(resized).permute(2, 0, 1)[None].to(sam.device)).cpu().numpy()


def quantize_encoder(
    sam: Sam,
    images: Sequence[np.ndarray],
    held_out: Sequence[np.ndarray],
    config: QuantizationConfig,
    *,
    num_threads: int | None = None,
    on_image: Callable[[], None] = lambda: None,
    on_layer: Callable[[], None] = lambda: None,
    on_product: Callable[[str, int], None] = lambda name, count: None,
) -> QuantizedEncoder:
    """Quantizes the image encoder of ``sam``: its convolutions, linear layers and products of activations.

    BatchNorm is folded first; LayerNorm, softmax, GELU, biases and residual connections stay float. The result depends
    on the arguments alone. Memory is bounded by ``observe.GROUP_BYTES`` beside the encoder's own.

    Args:
        sam: on the CPU, in eval mode; not changed.
        images: the calibration images, (H, W, 3) uint8 RGB.
        held_out: other images, on which the layers' errors are measured.
        config: how to quantize.
        num_threads: CPU threads; None: as many as torch uses.
        on_image: called after each calibration image.
        on_layer: called for each layer whose sensitivity was measured; see ``config.max_error``.
        on_product: called for each layer whose scales were searched, with its name and the number of them.

    Raises:
        QuantizationError: if the encoder is quantized already, there is no image, or no layer is left to quantize.
        FloatingPointError: if the encoder's activations are not finite.
    """
    if isinstance(sam.image_encoder, EngineImageEncoder):
        raise QuantizationError("this model is quantized already; start from the float checkpoint that it was made of")
    if not images or not held_out:
        raise QuantizationError("quantization needs at least one calibration image and one held-out image")
    threads = num_threads or torch.get_num_threads()
    formed = engine_form(sam).requires_grad_(False)
    float_model = export_graph(formed.image_encoder, sam.image_encoder.img_size)
    layers = find_layers(float_model)
    inputs = [preprocess(sam, image) for image in images]
    bounds: dict[str, np.ndarray] = {}
    scheme = config.scheme()
    if scheme.searches:
        grids = find_grids(formed, images, scheme, config.search, on_image=on_image, on_product=on_product)
        ranges, bounds = graph_ranges(layers, grids)
    else:
        tensors = list(dict.fromkeys(name for layer in layers for name in layer.inputs))
        ranges = observe(float_model, tensors, inputs, scheme.make_observer, num_threads=threads, on_image=on_image)
        grids = find_grids(formed, images, replace(scheme, only=f"{DECODER}*"), config.search)

    reasons = _reasons_for_float(layers, ranges, config)
    chosen = [layer for layer in layers if layer.name not in reasons]
    sensitivity: dict[str, float] = {}
    if config.max_error is not None and chosen:
        sensitivity = layers_over_budget(
            float_model,
            chosen,
            ranges,
            inputs[:BUDGET_IMAGES],
            config.max_error,
            activations=config.activations,
            weight_bounds=bounds,
            num_threads=threads,
            on_layer=on_layer,
        )
        reasons |= dict.fromkeys(sensitivity, f"the embedding's error would exceed {config.max_error:g}")
        chosen = [layer for layer in chosen if layer.name not in sensitivity]
    if not chosen:
        raise QuantizationError("no layer is left to quantize; take fewer float_layers, or a larger max_error")

    model = insert_qdq(float_model, chosen, ranges, config.activations, bounds)
    onnx.checker.check_model(model)
    errors = layer_errors(
        float_model, model, chosen, (preprocess(sam, image) for image in held_out), num_threads=threads
    )
    steps, weights = activation_steps(model), weight_scales(model)
    return QuantizedEncoder(
        model=model,
        float_model=float_model,
        layers=tuple(
            LayerReport(
                name=layer.name,
                kind=layer.kind,
                precision="float32",
                reason=reasons[layer.name],
                sensitivity=sensitivity.get(layer.name),
            )
            if layer.name in reasons
            else LayerReport(
                name=layer.name,
                kind=layer.kind,
                precision="int8",
                activation_scales=tuple(steps[name][0] for name in layer.inputs),
                activation_zero_points=tuple(steps[name][1] for name in layer.inputs),
                weight_scales=tuple(weights[layer.name].tolist()) if layer.weight else (),
                relative_error=errors[layer.name].relative_error,
            )
            for layer in layers
        ),
        decoder_layers=decoder_layers(formed, grids, held_out),
    )


def graph_ranges(
    layers: Sequence[Layer], grids: Mapping[str, ProductGrids]
) -> tuple[dict[str, Range], dict[str, np.ndarray]]:
    """Searched grids as :func:`insert_qdq` takes them: ranges of activations, and bounds of weights.

    Args:
        layers: of the encoder's graph. One without grids, whose activations are 0 or which stays float, gets an empty
            range.
        grids: by product's name in the Sam, of ``QuantizationConfig.scheme``.
    """
    ranges: dict[str, Range] = {}
    bounds: dict[str, np.ndarray] = {}
    for layer in layers:
        found = grids.get(ENCODER + layer.name)
        for side, name in enumerate(layer.inputs):
            ranges[name] = Range(low=0.0, high=0.0) if found is None else found.covered(side)
        if found is not None and layer.weight is not None:
            bounds[layer.weight] = found.weight_bounds()
    return ranges, bounds


def _reasons_for_float(
    layers: Sequence[Layer], ranges: Mapping[str, Range], config: QuantizationConfig
) -> dict[str, str]:
    names = [layer.name for layer in layers]
    unknown = [pattern for pattern in config.float_layers if not fnmatch.filter(names, pattern)]
    if unknown:
        raise QuantizationError(f"float_layers: no layer is called {', '.join(unknown)}")
    reasons = {}
    for layer in layers:
        if any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in config.float_layers):
            reasons[layer.name] = "float_layers names it"
        elif layer.kind == "matmul" and not config.attention_products:
            reasons[layer.name] = "attention_products is off"
        elif any(ranges[name].bound == 0.0 for name in layer.inputs):
            reasons[layer.name] = IS_CONSTANT
    return reasons
