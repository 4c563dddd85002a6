"""Hierarchical everything mode: what its rounds cost and find, against the flat grid of the same model.

    python -m benchmarks.rounds --lake images --checkpoint demo_student

For each preset and setting: best-match IoU and recall over the objects of a lake with ground truth, and CPU time, whole
and without the encoder's, as shares of the flat grid's. Settings take turns on each image. The paper has 98.8 % of the
IoU at 52 % of the time (section 4.3).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import islice, product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.inputs import images_with_objects
from benchmarks.results import write_results
from tinysam import SamAutomaticMaskGenerator, SamHierarchicalMaskGenerator, load
from tinysam.eval.everything import EverythingScores, score_everything
from tinysam.eval.masks import Rle
from tinysam.everything.config import Precision, Preset
from tinysam.runtime.choice import EngineChoice, with_engine


@dataclass(frozen=True, kw_only=True)
class RoundsBenchmark:
    """Quality and time of hierarchical everything mode."""

    lake: str
    """Images with ground truth."""
    annotations: str | None = None
    """COCO file of the ground truth; None: SA-1B's JSON files beside the images."""
    checkpoint: str = "demo_student"
    """What tinysam.load takes."""
    engine: EngineChoice = "auto"
    """Of the image encoder."""
    images: int = 20
    """How many, from the first."""
    every: int = 1
    """Takes each so many-th image: small ones lie side by side in many lakes."""
    points_per_side: int = 32
    """Of the flat grid and of the last round."""
    pred_iou_thresh: float = 0.88
    """As in SAM."""
    stability_score_thresh: float = 0.95
    """As in SAM."""
    presets: tuple[Preset, ...] = get_args(Preset)
    """Presets to try."""
    rounds: tuple[int, ...] = ()
    """Numbers of rounds to try, each with each of the ratios, thresholds and margins below, with nested grids."""
    coarse_ratios: tuple[float, ...] = (4,)
    """Ratios of the last grid to the first."""
    thresholds: tuple[float, ...] = (12.0,)
    """Values of high_score_thresh."""
    margins: tuple[float, ...] = (0.1,)
    """Values of iou_margin."""
    precisions: tuple[Precision, ...] = ("float32",)
    """In which all of them are tried; the first one's flat grid is what the others are compared with."""
    threads: int = 1
    """Threads of torch and of the mask pass."""
    output: Path | None = None
    """JSON file for the results."""


@dataclass
class Tally:
    """What one setting found and took so far."""

    scores: list[EverythingScores] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    after_encoder: list[float] = field(default_factory=list)
    """Of ``cpu_seconds``, in proportion to wall time."""

    def summary(self) -> dict[str, float]:
        """Over all objects, and by image."""
        recalled, objects = (sum(getattr(s, name)[0] for s in self.scores) for name in ("recalled", "objects"))
        return {
            "miou": float(np.concatenate([s.best_iou for s in self.scores]).mean()),
            "ar_1000": float(recalled[-1] / objects),
            "masks": float(np.mean([s.masks for s in self.scores])),
            "cpu_seconds": float(np.mean(self.cpu_seconds)),
            "after_encoder": float(np.mean(self.after_encoder)),
        }


def generators(config: RoundsBenchmark) -> dict[str, SamAutomaticMaskGenerator]:
    """The flat grid first, then every setting by name."""
    options: dict[str, Any] = {
        "points_per_side": config.points_per_side,
        "pred_iou_thresh": config.pred_iou_thresh,
        "stability_score_thresh": config.stability_score_thresh,
        "output_mode": "coco_rle",
    }
    found: dict[str, SamAutomaticMaskGenerator] = {}
    for precision in config.precisions:
        sam = with_engine(load(config.checkpoint), config.engine, bf16=precision == "bfloat16")
        found[f"flat {precision}"] = SamAutomaticMaskGenerator(sam, precision=precision, **options)
        for preset in config.presets:
            generator = SamHierarchicalMaskGenerator(sam, preset=preset, precision=precision, **options)
            found[f"{preset} {precision}"] = generator
        for values in product(config.rounds, config.coarse_ratios, config.thresholds, config.margins):
            setting = dict(zip(("rounds", "coarse_ratio", "high_score_thresh", "iou_margin"), values, strict=True))
            name = ", ".join([*(f"{key} {value:g}" for key, value in setting.items()), precision])
            found[name] = SamHierarchicalMaskGenerator(sam, nested=True, precision=precision, **setting, **options)
    return found


def measure(generator: SamAutomaticMaskGenerator, pixels: np.ndarray, truths: list[Rle], tally: Tally) -> None:
    """Adds one image to ``tally``."""
    encode, wall, cpu = generator.seconds["encode"], time.perf_counter(), time.process_time()
    records = generator.generate(pixels)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    tally.cpu_seconds.append(cpu)
    tally.after_encoder.append(cpu * (1 - (generator.seconds["encode"] - encode) / wall))
    tally.scores.append(score_everything(records, truths))


def main() -> None:
    """Measures, prints a table, and writes the results."""
    config = tyro.cli(RoundsBenchmark, description=__doc__)
    torch.set_num_threads(config.threads)
    console = Console(width=max(Console().width, 120))
    variants = generators(config)
    tallies = {name: Tally() for name in variants}
    images = images_with_objects(config.lake, config.annotations)
    images = islice(images, 0, config.images * config.every, config.every)
    for number, (pixels, truths) in enumerate(track(images, "Images", config.images, console=console)):
        for name, generator in variants.items():
            if not number:
                generator.generate(pixels)  # the first call opens engines
            measure(generator, pixels, truths, tallies[name])
    rows = [{"setting": name, **tally.summary()} for name, tally in tallies.items()]
    for row in rows:
        row["share_of_miou"] = row["miou"] / rows[0]["miou"] if rows[0]["miou"] else float("nan")
        row["share_of_time"] = row["cpu_seconds"] / rows[0]["cpu_seconds"]
        row["share_after_encoder"] = row["after_encoder"] / rows[0]["after_encoder"]
    console.print(as_table(f"{config.checkpoint}, {len(next(iter(tallies.values())).scores)} images", rows))
    if config.output is not None:
        write_results(config.output, config, rows)


def as_table(title: str, rows: list[dict[str, Any]]) -> Table:
    """The results for people."""
    table = Table(title=title)
    table.add_column("setting")
    formats = {
        "miou": ("mIoU", ".4f"),
        "ar_1000": ("AR@1000", ".4f"),
        "masks": ("masks", ".1f"),
        "cpu_seconds": ("CPU s an image", ".3f"),
        "share_of_miou": ("of flat's mIoU", ".1%"),
        "share_of_time": ("of flat's time", ".1%"),
        "share_after_encoder": ("after the encoder", ".1%"),
    }
    for label, _ in formats.values():
        table.add_column(label, justify="right")
    for row in rows:
        table.add_row(row["setting"], *(format(row[name], style) for name, (_, style) in formats.items()))
    return table


if __name__ == "__main__":
    main()
