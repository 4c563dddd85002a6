"""What integers gain and cost: speed of the encoder, and accuracy by the method that chooses the scales.

    python -m benchmarks.quantization --calibration images/train --scoring images/val \
        --annotations images/val/instances.json

Times are medians of one image through the encoder of an architecture with random weights, on one thread; the variants
take turns. Accuracy is that of a checkpoint, over several draws of calibration images: agreement of masks with the
float model's over a grid of clicks, and the mean IoU of masks that the ground truth's boxes prompt. Run it on an idle
machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from segment_anything.modeling import Sam

from benchmarks.results import write_results
from tinysam import load, sam_model_registry
from tinysam.eval.ground_truth import Objects, read_objects
from tinysam.eval.masks import boxes_xyxy, paired_iou
from tinysam.eval.prompts import predict_boxes
from tinysam.everything.decoding import encode
from tinysam.lake.images import decode_image
from tinysam.lake.index import IndexConfig, build_index, read_image_bytes
from tinysam.quant import QuantizationConfig, compare, quantize_encoder, with_encoder
from tinysam.quant.quantize import Method, preprocess
from tinysam.runtime import EngineConfig, EngineImageEncoder, open_engine


@dataclass(frozen=True, kw_only=True)
class QuantizationBenchmark:
    """Speed and accuracy of integer encoders."""

    architecture: str | None = "vit_t"
    """Whose encoder is timed, with random weights, which cost what trained ones do; None: nothing is timed."""
    repetitions: int = 15
    """Measurements of each variant."""
    threads: int = 1
    """CPU threads of every variant."""

    calibration: str | None = None
    """Folder or URL that calibration images are drawn from; None: no accuracy is measured."""
    scoring: str | None = None
    """Folder or URL of the images that accuracy is measured on."""
    annotations: str | None = None
    """COCO file of their masks; None: they have SA-1B's JSON files beside them."""
    checkpoint: str = "demo_student"
    """What is quantized."""
    methods: tuple[Method, ...] = get_args(Method)
    """What is compared."""
    draws: int = 5
    """Sets of calibration images."""
    calibration_images: int = 8
    """Of each draw."""
    images: int = 8
    """Measured on: the first with objects, by image_id."""

    output: Path | None = None
    """JSON file for the results."""

    def __post_init__(self) -> None:
        if (self.calibration is None) != (self.scoring is None):
            raise ValueError("give both --calibration and --scoring, or neither")
        for name in ("repetitions", "threads", "draws", "calibration_images", "images"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Scored:
    """An image to measure on."""

    pixels: np.ndarray
    """(H, W, 3) uint8."""
    objects: Objects


def median_seconds(calls: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """The median wall time of each call; they take turns, and each is called once before."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure_speed(config: QuantizationBenchmark, architecture: str) -> dict[str, Any]:
    """Times the encoder, and counts the bytes of its files."""
    torch.manual_seed(0)
    sam = sam_model_registry[architecture]().eval()
    size = sam.image_encoder.img_size
    images = list(np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8))
    encoder = quantize_encoder(sam, images[:1], images[1:], QuantizationConfig(method="minmax"), num_threads=1)
    graphs = {"OpenVINO float32": (encoder.float_model, "fp32"), "OpenVINO int8": (encoder.model, "auto")}
    engines = {
        name: open_engine(
            model.SerializeToString(),
            EngineConfig(engine="openvino", num_threads=config.threads, precision=precision),
        )
        for name, (model, precision) in graphs.items()
    }
    array = preprocess(sam, images[0])
    tensor = torch.from_numpy(array)

    @torch.inference_mode()
    def eager() -> None:
        sam.image_encoder(tensor)

    calls: dict[str, Callable[[], object]] = {"torch float32": eager}
    calls |= {name: lambda engine=engine: engine.run(array) for name, engine in engines.items()}
    return {
        "architecture": architecture,
        "seconds": median_seconds(calls, config.repetitions),
        "precision": {name: engine.precision for name, engine in engines.items()},
        "bytes": {name: model.ByteSize() for name, (model, _) in graphs.items()}
        | {"float32 checkpoint": sum(4 * value.numel() for value in sam.state_dict().values())},
    }


def calibration_draw(config: QuantizationBenchmark, draw: int) -> list[np.ndarray]:
    """The calibration images of a draw, (H, W, 3) uint8."""
    assert config.calibration is not None
    index = build_index(IndexConfig(lake=config.calibration))
    rows = np.random.default_rng(draw).permutation(index.num_rows)[: config.calibration_images]
    return [decode_image(read_image_bytes(row)) for row in index.take(rows).to_pylist()]


def scored_images(config: QuantizationBenchmark) -> list[Scored]:
    """The images that accuracy is measured on."""
    assert config.scoring is not None
    found: list[Scored] = []
    for row in build_index(IndexConfig(lake=config.scoring, annotations=config.annotations)).to_pylist():
        pixels = decode_image(read_image_bytes(row))
        objects = read_objects(row, *pixels.shape[:2])
        if objects is not None and objects.rles:
            found.append(Scored(pixels=pixels, objects=objects))
        if len(found) == config.images:
            return found
    raise SystemExit(f"{config.scoring} has {len(found)} images with objects, but --images {config.images} are wanted")


def box_ious(sam: Sam, images: Sequence[Scored]) -> np.ndarray:
    """(objects,): IoU of the mask that a model predicts for the box of each object, by the best of three."""
    return np.concatenate(
        [
            paired_iou(
                predict_boxes(sam, encode(sam, [image.pixels])[0], boxes_xyxy(image.objects.rles)).multimask,
                image.objects.rles,
            )
            for image in images
        ]
    )


def measure_accuracy(config: QuantizationBenchmark, console: Console) -> list[dict[str, Any]]:
    """Scores every method on every draw; the float model comes first."""
    sam, images = load(config.checkpoint), scored_images(config)
    rows: list[dict[str, Any]] = [{"method": "float32", "box_miou": float(box_ious(sam, images).mean())}]
    for draw in range(config.draws):
        pixels = calibration_draw(config, draw)
        for method in config.methods:
            start = time.perf_counter()
            quantization = QuantizationConfig(method=method)
            encoder = quantize_encoder(sam, pixels, [images[0].pixels], quantization, num_threads=config.threads)
            seconds = time.perf_counter() - start
            engine = EngineConfig(num_threads=config.threads, precision="fp32")
            quantized = with_encoder(sam, EngineImageEncoder(encoder.model.SerializeToString(), engine))
            agreements = [compare(sam, quantized, image.pixels) for image in images]
            rows.append(
                {
                    "method": method,
                    "draw": draw,
                    "seconds": seconds,
                    "embedding_error": float(np.mean([a.embedding.relative_error for a in agreements])),
                    "mask_agreement": float(np.mean([iou for a in agreements for iou in a.mask_iou])),
                    "box_miou": float(box_ious(quantized, images).mean()),
                }
            )
            console.print(rows[-1])
    return rows


def accuracy_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Means over draws, and the worst draw's box mIoU."""
    table = Table("scales", "embedding's error", "mask agreement", "box mIoU", "worst draw", "seconds")
    reference, *measured = rows
    table.add_row("float32", "", "", f"{reference['box_miou']:.4f}", "", "")
    for method in dict.fromkeys(row["method"] for row in measured):
        own = [row for row in measured if row["method"] == method]
        means = [statistics.mean(row[key] for row in own) for key in ("embedding_error", "mask_agreement", "box_miou")]
        worst, seconds = min(row["box_miou"] for row in own), statistics.mean(row["seconds"] for row in own)
        table.add_row(method, *(f"{mean:.4f}" for mean in means), f"{worst:.4f}", f"{seconds:.0f}")
    return table


def main() -> None:
    """Measures, prints tables, and writes the results."""
    config = tyro.cli(QuantizationBenchmark, description=__doc__)
    torch.set_num_threads(config.threads)
    console = Console()
    results: list[dict[str, Any]] = []
    if config.architecture is not None:
        speed = measure_speed(config, config.architecture)
        results.append(speed)
        table = Table("encoder", "ms", "times torch", title=f"{config.architecture}, {config.threads} thread(s)")
        for name, seconds in speed["seconds"].items():
            table.add_row(name, f"{1000 * seconds:.0f}", f"{speed['seconds']['torch float32'] / seconds:.2f}")
        console.print(table, speed["bytes"], speed["precision"])
    if config.calibration is not None:
        rows = measure_accuracy(config, console)
        results.extend(rows)
        console.print(accuracy_table(rows))
    if config.output is not None:
        write_results(config.output, config, results)


if __name__ == "__main__":
    main()
