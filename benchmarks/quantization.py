"""Quantization: how fast the integer encoder is, and what each way to find scales costs in quality.

    python -m benchmarks.quantization --measure speed --checkpoint vit_t
    python -m benchmarks.quantization --measure accuracy --checkpoint demo_student --calibration images --lake val

Speed: the image encoder in eager float32 torch, and on OpenVINO in float32 and in int8, in turns; medians. Accuracy:
each method at W8A8 and W6A6 over several draws of calibration images, simulated in torch, in the paper's form or in
that of the integer graphs: box mIoU with ground truth, and IoU with the float model's masks for the same boxes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from benchmarks.inputs import images_with_objects, load_or_random
from benchmarks.results import write_results
from tinysam import load
from tinysam.eval.image import EvalConfig, ImageScores, evaluate_image
from tinysam.eval.masks import Rle, paired_iou
from tinysam.lake.images import decode_image
from tinysam.lake.index import IndexConfig, build_index, read_image_bytes
from tinysam.modeling.checkpoint import checkpoint_bytes
from tinysam.quant import QuantizationConfig, quantize_encoder, with_encoder
from tinysam.quant.calibrate import CalibrationConfig, calibrate
from tinysam.quant.engine_form import engine_form
from tinysam.quant.folder import stored_weights
from tinysam.quant.layers import ENCODER
from tinysam.quant.quantize import preprocess
from tinysam.quant.scheme import METHODS, Method, Scheme
from tinysam.quant.search import SearchConfig, choose_grids
from tinysam.quant.simulate import simulated
from tinysam.runtime import EngineConfig, open_engine

BOXES = EvalConfig(tasks=("box",))
SEARCHED: tuple[Method, ...] = ("hessian", "mse")
"""Methods that search on the same samples, which are taken once a draw."""


@dataclass(frozen=True, kw_only=True)
class QuantizationBenchmark:
    """Speed and accuracy of quantized models."""

    measure: tuple[Literal["speed", "accuracy"], ...] = ("speed",)
    """What to measure."""
    checkpoint: str = "vit_t"
    """What tinysam.load takes, or the name of an architecture, which gets random weights (for speed only)."""
    calibration: str | None = None
    """Images that calibration draws from; for accuracy."""
    lake: str | None = None
    """Images with ground truth; for accuracy."""
    annotations: str | None = None
    """COCO file of the ground truth; None: SA-1B's JSON files beside the images."""
    images: int = 20
    """Images of ``lake`` to score, from the first."""
    objects: int = 16
    """Objects of each image that are scored, so that one with hundreds takes no longer than others."""
    calibration_images: int = 8
    """In each draw."""
    draws: int = 5
    """Sets of calibration images."""
    methods: tuple[Method, ...] = METHODS
    """Ways to find scales."""
    bits: tuple[int, ...] = (8, 6)
    """Of weights and activations."""
    form: Literal["paper", "integer"] = "paper"
    """What is rounded, and how finely. paper: every product of encoder and decoder, with scales for each head and two
    ranges. integer: what pipelines/quantize.py makes of the encoder, one scale for each activation."""
    rows: int = 512
    """Output positions that a search evaluates."""
    repeats: int = 9
    """Measurements of each encoder."""
    threads: int = 1
    """Threads of torch and of the engines."""
    output: Path | None = None
    """JSON file for the results."""

    def __post_init__(self) -> None:
        if "accuracy" in self.measure and (self.calibration is None or self.lake is None):
            raise ValueError("accuracy needs --calibration and --lake")


def speed(config: QuantizationBenchmark) -> list[dict[str, Any]]:
    """A row an encoder: median milliseconds of an image, speed-up against torch, bytes of all that is deployed."""
    torch.manual_seed(0)
    sam = load_or_random(config.checkpoint)
    rng = np.random.default_rng(0)
    side = sam.image_encoder.img_size
    images = [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(2)]
    quantized = quantize_encoder(
        sam, images[:1], images[1:], QuantizationConfig(method="minmax"), num_threads=config.threads
    )
    rest = with_encoder(sam, nn.Identity())
    float_rest, stored_rest = len(checkpoint_bytes(rest)), len(safetensors.torch.save(stored_weights(rest)))
    array = preprocess(sam, images[0])
    tensor = torch.from_numpy(array)
    calls: dict[str, Any] = {"torch float32": lambda: sam.image_encoder(tensor)}
    sizes = {"torch float32": len(checkpoint_bytes(sam))}
    for name, model, precision in (
        ("openvino float32", quantized.float_model, "fp32"),
        ("openvino bf16", quantized.float_model, "auto"),
        ("openvino int8 + float32", quantized.model, "fp32"),
        ("openvino int8 + bf16", quantized.model, "auto"),
    ):
        engine = open_engine(
            model.SerializeToString(),
            EngineConfig(engine="openvino", num_threads=config.threads, precision=precision),  # type: ignore[arg-type]
        )
        calls[name] = lambda engine=engine: engine.run(array)
        sizes[name] = model.ByteSize() + (float_rest if model is quantized.float_model else stored_rest)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for number in range(config.repeats + 1):  # the first time warms up
            for name, call in calls.items():
                start = time.process_time()
                call()
                if number:
                    seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        {
            "variant": name,
            "cpu_ms": 1000 * median,
            "speedup": medians["torch float32"] / median,
            "bytes": sizes[name],
            "share_of_bytes": sizes[name] / sizes["torch float32"],
        }
        for name, median in medians.items()
    ]


def accuracy(config: QuantizationBenchmark, console: Console) -> list[dict[str, Any]]:
    """A row for each bits, method and draw; the float model's first."""
    sam = engine_form(load(config.checkpoint)).requires_grad_(False)
    assert config.calibration is not None
    assert config.lake is not None
    truths = [
        (pixels, spread(objects, config.objects))
        for pixels, objects in islice(images_with_objects(config.lake, config.annotations), config.images)
    ]
    expected = [evaluate_image(sam, pixels, objects, config=BOXES) for pixels, objects in truths]
    rows = [{"bits": 32, "method": "float", "draw": 0, "seconds": 0.0, **scores(expected, expected)}]
    index = build_index(IndexConfig(lake=config.calibration))
    search = search_config(config)
    for draw in track(range(config.draws), "Draws", console=console):
        chosen = np.random.default_rng(draw).permutation(index.num_rows)[: config.calibration_images]
        images = [decode_image(read_image_bytes(row)) for row in index.take(chosen).to_pylist()]
        for methods in (SEARCHED, *((method,) for method in config.methods if method not in SEARCHED)):
            schemes = [
                scheme_of(config, method, bits)
                for bits in config.bits
                for method in methods
                if method in config.methods
            ]
            if not schemes:
                continue
            start = time.process_time()
            seen = calibrate(sam, images, schemes[0], search.calibration)
            calibration_seconds = time.process_time() - start
            for scheme in schemes:
                start = time.process_time()
                grids = choose_grids(seen, scheme, search)
                seconds = calibration_seconds + time.process_time() - start
                with simulated(sam, grids):
                    found = [evaluate_image(sam, pixels, objects, config=BOXES) for pixels, objects in truths]
                row = {"bits": scheme.weight_bits, "method": scheme.method, "draw": draw, "seconds": seconds}
                rows.append({**row, **scores(found, expected)})
                if config.output is not None:
                    write_results(config.output, config, summaries(rows))
    return summaries(rows)


def summaries(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each bits and method: means over the draws, standard deviations, and each draw's figures."""
    found = []
    for bits, method in dict.fromkeys((row["bits"], row["method"]) for row in rows):
        group = [row for row in rows if (row["bits"], row["method"]) == (bits, method)]
        summary: dict[str, Any] = {"bits": bits, "method": method, "draws": len(group)}
        for name in ("box_miou", "agreement", "seconds"):
            values = [row[name] for row in group]
            summary[name] = statistics.mean(values)
            summary[f"{name}_deviation"] = statistics.stdev(values) if len(values) > 1 else None
            summary[f"{name}_of_draws"] = values
        found.append(summary)
    return found


def spread(objects: Sequence[Rle], most: int) -> list[Rle]:
    """At most so many of an image's objects, from all over the list."""
    return [objects[i] for i in np.unique(np.linspace(0, len(objects) - 1, min(most, len(objects))).astype(int))]


def scheme_of(config: QuantizationBenchmark, method: Method, bits: int) -> Scheme:
    """How a row's model is rounded."""
    if config.form == "paper":
        return Scheme(method=method, weight_bits=bits, activation_bits=bits)
    integer = QuantizationConfig(method=method).scheme()
    return replace(integer, only=f"{ENCODER}*", weight_bits=bits, activation_bits=bits)


def search_config(config: QuantizationBenchmark) -> SearchConfig:
    """The paper's search on as many positions as asked for."""
    return SearchConfig(calibration=CalibrationConfig(rows=config.rows))


def scores(found: list[ImageScores], expected: list[ImageScores]) -> dict[str, float]:
    """Mean over objects of IoU with the ground truth and with the float model's masks."""
    agreement = [
        paired_iou(one.box_predictions.multimask, other.box_predictions.multimask)
        for one, other in zip(found, expected, strict=True)
        if one.box_predictions is not None and other.box_predictions is not None
    ]
    ious = [score.box_multimask_iou for score in found if score.box_multimask_iou is not None]
    return {"box_miou": float(np.concatenate(ious).mean()), "agreement": float(np.concatenate(agreement).mean())}


def main() -> None:
    """Measures, prints tables, and writes the results."""
    config = tyro.cli(QuantizationBenchmark, description=__doc__)
    torch.set_num_threads(config.threads)
    console = Console(width=max(Console().width, 110))
    rows: list[dict[str, Any]] = []
    if "speed" in config.measure:
        found = speed(config)
        console.print(speed_table(config, found))
        rows += found
    if "accuracy" in config.measure:
        found = accuracy(config, console)
        console.print(accuracy_table(config, found))
        rows += found
    if config.output is not None:
        write_results(config.output, config, rows)


def speed_table(config: QuantizationBenchmark, rows: list[dict[str, Any]]) -> Table:
    """Speed for people."""
    table = Table(title=f"{config.checkpoint}: image encoder, {config.threads} thread(s), CPU time")
    for label in ("variant", "ms", "speed-up", "MB", "of the float bytes"):
        table.add_column(label, justify="left" if label == "variant" else "right")
    for row in rows:
        table.add_row(
            row["variant"],
            f"{row['cpu_ms']:.0f}",
            f"{row['speedup']:.2f}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['share_of_bytes']:.0%}",
        )
    return table


def accuracy_table(config: QuantizationBenchmark, rows: list[dict[str, Any]]) -> Table:
    """Means and standard deviations over the draws, for people."""
    title = f"{config.checkpoint}, {config.form} form: {config.draws} draws of {config.calibration_images} images"
    table = Table(title=title)
    for label in ("bits", "method", "box mIoU", "IoU with float", "CPU s"):
        table.add_column(label, justify="left" if label == "method" else "right")
    for row in rows:
        spread = {name: row[f"{name}_deviation"] for name in ("box_miou", "agreement")}
        table.add_row(
            str(row["bits"]),
            row["method"],
            *(f"{row[name]:.4f}" + (f" ± {value:.4f}" if value is not None else "") for name, value in spread.items()),
            f"{row['seconds']:.0f}",
        )
    return table


if __name__ == "__main__":
    main()
