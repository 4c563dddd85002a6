"""Single prompts: segment-anything's predictor against this project's, with the encoder on each engine.

    python -m benchmarks.predictor --checkpoint vit_t

``set_image`` and ``predict`` with one point and with one box are timed in turns; medians of CPU time are reported,
which other work on the machine disturbs least, and their ratios to segment-anything's predictor with the same weights.
IoU is that of the mask with segment-anything's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import segment_anything
import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.inputs import load_or_random
from benchmarks.results import write_results
from tinysam import SamPredictor
from tinysam.runtime.choice import with_engine

REFERENCE = "segment-anything"


@dataclass(frozen=True, kw_only=True)
class PredictorBenchmark:
    """Time of single prompts."""

    checkpoint: str = "vit_t"
    """What tinysam.load takes, or the name of an architecture, which gets random weights."""
    height: int = 1080
    """Of the image, pixels."""
    width: int = 1620
    """Of the image, pixels."""
    repeats: int = 7
    """Measurements of each step and variant."""
    threads: int = 1
    """Threads of torch and of the engines."""
    output: Path | None = None
    """JSON file for the results."""


def predictors(config: PredictorBenchmark) -> dict[str, Any]:
    """segment-anything's predictor first, then ours on each engine."""
    torch.manual_seed(0)
    sam = load_or_random(config.checkpoint)
    return {
        REFERENCE: segment_anything.SamPredictor(sam),
        "torch": SamPredictor(sam),
        "openvino float32": SamPredictor(with_engine(sam, "openvino")),
        "openvino bfloat16": SamPredictor(with_engine(sam, "openvino", bf16=True)),
        "onnxruntime float32": SamPredictor(with_engine(sam, "onnxruntime")),
    }


def main() -> None:
    """Measures, prints a table, and writes the results."""
    config = tyro.cli(PredictorBenchmark, description=__doc__)
    torch.set_num_threads(config.threads)
    console = Console(width=max(Console().width, 130))  # rows stay whole in a log, too
    image = np.random.default_rng(0).integers(0, 256, (config.height, config.width, 3), dtype=np.uint8)
    point = np.array([[config.width / 3, config.height / 2]])
    box = np.array([config.width / 4, config.height / 4, config.width / 2, config.height * 0.8])
    steps: dict[str, Callable[[Any], Any]] = {
        "set_image": lambda predictor: predictor.set_image(image),
        "point": lambda predictor: predictor.predict(point, np.array([1])),
        "box": lambda predictor: predictor.predict(box=box, multimask_output=False),
    }
    variants = predictors(config)
    seconds: dict[tuple[str, str], list[float]] = {}
    masks: dict[tuple[str, str], np.ndarray] = {}
    for _ in track(range(config.repeats + 1), "Measuring", console=console):  # the first time warms up
        for step, run in steps.items():
            for name, predictor in variants.items():
                start = time.process_time()
                found = run(predictor)
                seconds.setdefault((name, step), []).append(time.process_time() - start)
                if found is not None:
                    masks[name, step] = found[0]
    rows: list[dict[str, Any]] = []
    for name in variants:
        row: dict[str, Any] = {"variant": name}
        for step in steps:
            row[f"{step}_cpu_seconds"] = statistics.median(seconds[name, step][1:])
            row[f"{step}_speedup"] = statistics.median(seconds[REFERENCE, step][1:]) / row[f"{step}_cpu_seconds"]
        row["iou"] = min(iou(masks[name, step], masks[REFERENCE, step]) for step in ("point", "box"))
        rows.append(row)
    console.print(as_table(config, rows, list(steps)))
    if config.output is not None:
        write_results(config.output, config, rows)


def iou(one: np.ndarray, other: np.ndarray) -> float:
    """Of two sets of masks as a whole; 1 for two empty ones."""
    union = np.count_nonzero(one | other)
    return np.count_nonzero(one & other) / union if union else 1.0


def as_table(config: PredictorBenchmark, rows: list[dict[str, Any]], steps: list[str]) -> Table:
    """The results for people."""
    table = Table(title=f"{config.checkpoint}, {config.height} x {config.width} pixels, {config.threads} thread(s)")
    table.add_column("variant")
    for step in steps:
        table.add_column(f"{step}, CPU ms", justify="right")
        table.add_column("speed-up", justify="right")
    table.add_column("IoU", justify="right")
    for row in rows:
        cells = []
        for step in steps:
            cells += [f"{1000 * row[f'{step}_cpu_seconds']:.0f}", f"{row[f'{step}_speedup']:.2f}"]
        table.add_row(row["variant"], *cells, f"{row['iou']:.4f}")
    return table


if __name__ == "__main__":
    main()
