"""Every job on a small lake, as a user would run them: what ``make demo`` does.

    python pipelines/demo.py

Builds a lake of about 60 images on an S3-compatible server of its own on this machine, then runs the jobs one after
the other on one Ray, each as a command of its own: cache the teacher's embeddings, distil the student a little further,
quantize it, label the lake with it, measure it, and write the report. All that it writes lies under ``demo/``.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found without an installation, and first of all

from rich.progress import Progress

from pipelines.common.cli import (
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    EXIT_OK,
    JobError,
    console,
    error_console,
    parse_config,
    run_main,
)
from pipelines.common.demo_lake import BROKEN, DemoLake, DemoLakeError, build_demo_lake, photographs
from pipelines.common.local_s3 import LocalS3, LocalS3Error, local_s3
from pipelines.common.ray_setup import shared_ray
from tinysam.lake.filesystem import join

ROOT = Path(__file__).resolve().parents[1]
BUCKET = "tinysam-demo"
EVERYTHING = (
    *("--everything.points-per-side", "16", "--everything.pred-iou-thresh", "0.5"),
    *("--everything.stability-score-thresh", "0.7"),
)
"""SAM's thresholds presume a model as sure of itself as SAM; the demo's models were trained for a few hours."""
MARKER = ".tinysam-demo"
"""Lies in a folder that the demo made, and so may empty."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Runs every job on a small lake."""

    output: str = "demo"
    """Folder for all that the demo writes; what an earlier demo left in it is deleted."""
    teacher: str = "demo_teacher"
    """Whose embeddings are cached: a model's name or a checkpoint."""
    student: str = "demo_student"
    """What is distilled further: a model's name or a checkpoint, as wide as the teacher."""
    scenes: int = 40
    """Synthetic scenes in the lake, beside the photographs."""
    held_out: int = 6
    """Synthetic scenes to measure on."""
    seed: int = 1000
    """Of the scenes and of training. The shipped models were trained on the scenes of seed 0."""

    def __post_init__(self) -> None:
        if self.scenes < 1 or self.held_out < 1:
            raise ValueError("--scenes and --held-out must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command of the demo."""

    title: str
    """What it does, for a reader who sees it for the first time."""
    command: tuple[str, ...]
    """The command after the interpreter: what a user would type."""


def plan(config: DemoConfig, lake: DemoLake, url: str, page: Path) -> list[Stage]:
    """The demo's commands in order; each works on what the ones before left below ``url``."""
    cache, student, quantized = join(url, "cache"), join(url, "student"), join(url, "quantized")
    masks, scores = join(url, "masks"), join(url, "scores")
    trained = join(student, "student.safetensors")
    return [
        Stage(
            title="the teacher's embeddings of every image, computed once",
            command=(
                *("pipelines/cache_teacher.py", "--lake", lake.images),
                *("--output", cache, "--teacher", config.teacher, "--images-per-shard", "8"),
            ),
        ),
        Stage(
            title="the shipped student, distilled a little further on this lake",
            command=(
                *("pipelines/distill.py", "--cache", cache, "--output", student, "--student", config.student),
                *("--trainer.epochs", "1", "--trainer.batch-size", "2", "--trainer.seed", str(config.seed)),
                *("--limit", "40", "--trainer.freeze-norm", "1", "--losses.focal", "0"),
                *("--prompts.per-image", "4", "--prompts.max-rounds", "1"),
                *("--optimizer.learning-rate", "1e-4", "--optimizer.warmup-steps", "5", "--optimizer.ema-decay", "0.9"),
            ),
        ),
        Stage(
            title="its image encoder in 8-bit integers",
            command=(
                *("pipelines/quantize.py", "--student", trained, "--lake", join(lake.images, "synthetic")),
                *("--output", quantized, "--calibration-images", "8"),
            ),
        ),
        Stage(
            title="masks of everything in every image",
            command=(
                *("pipelines/label_images.py", "--lake", lake.images),
                *("--output", masks, "--quantized", quantized, "--images-per-shard", "8", *EVERYTHING),
            ),
        ),
        Stage(
            title="teacher, student and 8-bit student, measured on scenes that none of them has seen",
            command=(
                *("pipelines/evaluate.py", "--checkpoints", config.teacher, trained, quantized),
                *("--lake", lake.held_out, "--annotations", lake.instances, "--output", scores, *EVERYTHING),
                *("--images-per-shard", "1", "--clicks.clicks", "1", "--engine", "torch"),
            ),
        ),
        Stage(
            title="one page about all of it",
            command=(
                *("-m", "tinysam.cli", "report", masks, "--output", str(page)),
                *("--stages", cache, student, quantized, scores),
            ),
        ),
    ]


def run_stages(stages: Sequence[Stage], environment: Mapping[str, str]) -> tuple[int, list[float]]:
    """Runs the commands until one fails; returns the last exit code, and the seconds of each.

    The commands share this terminal, so that their progress and their errors are seen as they are.
    """
    seconds: list[float] = []
    for number, stage in enumerate(stages, start=1):
        console.rule(f"[bold]{number}/{len(stages)}[/] {stage.title}", align="left")
        typed = f"$ python {shlex.join(stage.command)}"
        console.print(typed, style="dim", markup=False, highlight=False, soft_wrap=True)
        started = time.monotonic()
        code = subprocess.run([sys.executable, *stage.command], cwd=ROOT, env=dict(environment), check=False).returncode
        seconds.append(time.monotonic() - started)
        if code:
            error_console.print(f"[bold red]the demo stops here:[/] step {number} ended with code {code}")
            return (code if code > 0 else 128 - code), seconds
    return EXIT_OK, seconds


def prepare(folder: Path) -> None:
    """Makes an empty folder for the demo; what an earlier demo left is deleted, anything else is not touched.

    Raises:
        JobError: If the folder holds something that no demo wrote.
    """
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            raise JobError(f"{folder} holds something else than an earlier demo; give another --output")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Ends the demo in an orderly way, its server stopped, on SIGTERM as well as on Ctrl-C."""

    def stop(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _storage(server: LocalS3) -> Iterator[None]:
    """Points this process, which writes the lake, and so the jobs at ``server``."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(server.over(before))
    # A cluster that the user's shell points to could not reach a server on this machine's loopback.
    os.environ.pop("RAY_ADDRESS", None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _build_lake(config: DemoConfig) -> DemoLake:
    total = len(photographs()) + len(BROKEN) + config.scenes + config.held_out
    with Progress(console=console) as progress:
        task = progress.add_task("images", total=total)
        return build_demo_lake(
            f"s3://{BUCKET}",
            scenes=config.scenes,
            held_out=config.held_out,
            seed=config.seed,
            on_image=lambda: progress.advance(task),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit code of its first failing step."""
    config = parse_config(DemoConfig, argv, description=__doc__)
    folder, started = Path(config.output).resolve(), time.monotonic()
    prepare(folder)
    page = folder / "report.html"
    try:
        with (
            local_s3(folder / "s3", [BUCKET]) as server,
            _storage(server),
            shared_ray() as ray_address,
            _terminated_as_interrupted(),  # last, as Ray has a handler of its own
        ):
            console.rule(f"[bold]the lake[/]: s3://{BUCKET} at {server.endpoint}", align="left")
            lake = _build_lake(config)
            stages = plan(config, lake, f"s3://{BUCKET}", page)
            code, seconds = run_stages(stages, os.environ | {"RAY_ADDRESS": ray_address})
    except KeyboardInterrupt:
        error_console.print("interrupted; the storage server has been stopped")
        return EXIT_INTERRUPTED
    except (DemoLakeError, LocalS3Error) as error:
        error_console.print(f"[bold red]error:[/] {error}", highlight=False)
        return EXIT_ERROR
    if code == EXIT_OK:
        for stage, took in zip(stages, seconds, strict=True):
            console.print(f"{took:6.0f} s  {stage.title}", highlight=False)
        console.print(f"{time.monotonic() - started:6.0f} s  in all; everything lies under {folder}", highlight=False)
        console.print(f"[bold]report:[/] {page.as_uri()}", highlight=False, soft_wrap=True)
    return code


if __name__ == "__main__":
    run_main(main)
