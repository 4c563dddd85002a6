"""The paper's ablation at a small scale: what each part of the recipe is worth.

    python -m benchmarks.distillation --cache cache/train --validation-cache cache/val --runs ablation

Each row adds one part to the row above. Rows and seeds are runs of pipelines/distill.py; one that is finished is not
run again, so that an interrupted ablation goes on. Seeds are paired: a gain is the mean over seeds of the difference
to the row above, with a 95 % interval of Student's t over seeds. Scores are mean IoUs of low-resolution masks over
images of the validation caches, for boxes, one click, and three clicks of which the later ones correct the earlier.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from scipy import stats

from benchmarks.results import write_results
from pipelines import distill
from tinysam import load
from tinysam.distill.cache import open_cache
from tinysam.distill.samples import Sample
from tinysam.distill.validation import validate, validation_batches
from tinysam.lake.filesystem import join

SCORES = {"box": "box", "click": "1 click", "click_3": "3 clicks"}


@dataclass(frozen=True, kw_only=True)
class DistillationBenchmark:
    """An ablation of the recipe."""

    cache: tuple[str, ...]
    """Caches of the teacher's embeddings to train on."""
    validation_cache: tuple[str, ...]
    """Caches to measure on."""
    runs: str
    """Folder of the runs."""
    repeat: tuple[int, ...] = ()
    """How often an epoch goes through each cache; empty: once."""
    student: str = "demo_student"
    """Architecture of every run, or with ``start`` the checkpoint from which every run goes on."""
    start: bool = False
    """Go on from the student's weights instead of random ones. A student that was trained on ground truth alone shows
    what the recipe adds within fewer steps than random weights do."""
    seeds: int = 3
    """Runs of each row; at least 3 for an interval worth the name."""
    epochs: int = 4
    """Of each run."""
    batch_size: int = 8
    """Images a step."""
    crop_size: int | None = 256
    """Side of the crops to train and to measure on; None takes whole images. What has seen small crops alone finds
    things far from the prompt in large ones, which would hide what the recipe does."""
    prompts: int = 10
    """Masks prompted in an image."""
    rounds: int = 3
    """Most refinements of hard prompts; 9 in the paper."""
    mining: float = 1.0
    """Strength of hard-example mining in the last row."""
    learning_rate: float = 1.5e-3
    """At the end of the warm-up."""
    images: int = 48
    """Measured of each validation cache."""
    limit: int | None = None
    """Only as many shards as hold this many training images."""
    output: Path | None = None
    """JSON file for the results."""

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise ValueError("an interval needs at least 2 seeds")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    half_width: float
    """Of the 95 % interval."""


def rows(config: DistillationBenchmark) -> dict[str, tuple[str, ...]]:
    """The flags of each row, by its name; each row keeps those of the rows above unless it sets them itself."""
    parts = {
        "ground truth only": {
            **{f"losses.{term}": "0" for term in ("output", "embedding", "token")},
            "prompts.max-rounds": "0",
            "prompts.policy": "tinysam",
            "losses.hard-mask-weight": "False",
        },
        "+ output": {"losses.output": "1"},
        "+ embedding": {"losses.embedding": "1"},
        "+ token": {"losses.token": "1"},
        "+ hard prompts": {"prompts.max-rounds": str(config.rounds)},
        "+ hard mask weight": {"losses.hard-mask-weight": "True"},
        "+ mining": {"mining.strength": str(config.mining)},
    }
    found: dict[str, tuple[str, ...]] = {}
    flags: dict[str, str] = {}
    for name, changes in parts.items():
        flags |= changes
        found[name] = tuple(text for key, value in flags.items() for text in _flag(key, value))
    return found


def _flag(key: str, value: str) -> tuple[str, ...]:
    group, _, name = key.rpartition(".")
    if value in ("True", "False"):
        return (f"--{group}.{name}" if value == "True" else f"--{group}.no-{name}",)
    return f"--{key}", value


def run(config: DistillationBenchmark, row: int, flags: Sequence[str], seed: int) -> str:
    """Trains one student, unless it is there already; returns its file."""
    output = join(config.runs, f"row-{row}", f"seed-{seed}")
    arguments = {
        "student": config.student,
        "output": output,
        "trainer.seed": seed,
        "trainer.epochs": config.epochs,
        "trainer.batch-size": config.batch_size,
        "prompts.per-image": config.prompts,
        "optimizer.learning-rate": config.learning_rate,
        "optimizer.warmup-steps": 60,
        "optimizer.ema-decay": 0.99,
        **({"samples.crop-size": config.crop_size} if config.crop_size is not None else {}),
        **({"limit": config.limit} if config.limit is not None else {}),
    }
    common = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    if not config.start:
        common.append("--fresh")
    if config.repeat:
        common += ["--repeat", *map(str, config.repeat)]
    code = distill.main([*common, "--cache", *config.cache, *flags])
    if code:
        raise SystemExit(code)
    return join(output, distill.STUDENT_FILE)


def score(checkpoint: str, batches: Sequence[Sample]) -> dict[str, float]:
    """Mean IoUs of a model, in float32."""
    return validate(load(checkpoint), batches, torch.autocast("cpu", enabled=False))


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of one value a seed, with Student's t."""
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Estimate(mean=float(np.mean(values)), half_width=float(stats.t.ppf(0.975, len(values) - 1)) * spread)


def main() -> None:
    """Trains, measures, prints the table, and writes it."""
    config = tyro.cli(DistillationBenchmark, description=__doc__)
    cache = open_cache(config.cache)
    batches = validation_batches(
        config.validation_cache, images=config.images, image_size=cache.image_size, crop_size=config.crop_size
    )
    # The teacher decodes as it does in training, so its score is what a student could reach.
    teacher = score(cache.teacher, batches)
    scores: dict[str, list[dict[str, float]]] = {}
    for number, (name, flags) in enumerate(rows(config).items()):
        # Row by row and not seed by seed: an interrupted ablation has whole rows.
        scores[name] = [score(run(config, number, flags, seed), batches) for seed in range(config.seeds)]
    results = summarise(scores, teacher)
    Console(width=150).print(as_table(results, teacher))
    if config.output is not None:
        described = [{"recipe": name, "seeds": scores[name], **row} for name, row in results.items()]
        write_results(config.output, config, [*described, {"recipe": "teacher", **as_row(teacher)}])


def summarise(scores: dict[str, list[dict[str, float]]], teacher: dict[str, float]) -> dict[str, dict[str, object]]:
    """For each row and score: its mean, its gain over the row above, and the share of the gap to the teacher that it
    closes, counted from the first row; all over paired seeds."""
    found: dict[str, dict[str, object]] = {}
    names = list(scores)
    for place, name in enumerate(names):
        found[name] = {}
        for key in SCORES:
            values = np.array([seed[key] for seed in scores[name]])
            above = np.array([seed[key] for seed in scores[names[max(place - 1, 0)]]])
            first = np.array([seed[key] for seed in scores[names[0]]])
            found[name][key] = {
                "score": asdict(estimate(values)),
                "gain": asdict(estimate(values - above)) if place else None,
                "gap_closed": float((values - first).mean() / (teacher[key] - first.mean())) if place else None,
            }
    return found


def as_row(scores: dict[str, float]) -> dict[str, dict[str, object]]:
    """Scores of one model in the form of ``summarise``."""
    exactly = {key: asdict(Estimate(mean=scores[key], half_width=0.0)) for key in SCORES}
    return {key: {"score": score, "gain": None, "gap_closed": None} for key, score in exactly.items()}


def as_table(results: dict[str, dict[str, object]], teacher: dict[str, float]) -> Table:
    """The results for people."""
    table = Table(title="ablation: mean ± 95 % over seeds, in points of mIoU")
    table.add_column("recipe")
    for title in SCORES.values():
        for column in (title, "gain", "gap closed"):
            table.add_column(column, justify="right")
    for name, row in results.items():
        cells = []
        for key in SCORES:
            entry = row[key]
            assert isinstance(entry, dict)
            cells += [_points(entry["score"]), _points(entry["gain"], sign="+"), _share(entry["gap_closed"])]
        table.add_row(name, *cells)
    table.add_row("teacher", *(text for key in SCORES for text in (f"{100 * teacher[key]:.2f}", "", "")))
    return table


def _points(value: dict[str, float] | None, sign: str = "") -> str:
    return "" if value is None else f"{100 * value['mean']:{sign}.2f} ± {100 * value['half_width']:.2f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


if __name__ == "__main__":
    main()
