"""Every benchmark, one after the other: what ``make bench`` runs.

    python -m benchmarks --photographs a.jpg b.jpg --only everything rounds

Each leaves a JSON file in ``benchmarks/results``, with its command, the machine and the versions, of which
``python -m benchmarks.tables`` makes the tables of the pages. Without photographs and a lake, a photograph of
scikit-image and synthetic scenes in ``benchmarks/data`` are used. What takes longest has no such default: the ways to
find scales are compared where ``--calibration`` and ``--lake`` are given, and the recipe's parts where ``--cache`` and
``--validation-cache`` are. Encoders are timed on a GPU where there is one. Run all of it on an idle machine.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import tyro
from rich.console import Console

from pipelines.common.demo_lake import photographs
from tinysam.commands import SHIPPED_THRESHOLDS
from tinysam.synthetic.write import SceneSet, iter_write

ROOT = Path(__file__).resolve().parents[1]
Name = Literal[
    "predictor",
    "everything",
    "rounds",
    "quantization",
    "scales",
    "integer_scales",
    "codecs",
    "planning",
    "driving",
    "cache_teacher",
    "label_images",
    "training",
    "gpu_vit_h",
    "gpu_vit_t",
    "distillation",
]
SCENES = 10


@dataclass(frozen=True, kw_only=True)
class Benchmarks:
    """Runs the benchmarks."""

    photographs: tuple[Path, ...] = ()
    """What everything mode is timed on. Large ones show more: work at the original resolution grows with them."""
    lake: str | None = None
    """Images with ground truth in SA-1B's layout, on which quality is measured."""
    annotations: str | None = None
    """COCO file of that ground truth; None: SA-1B's JSON files."""
    calibration: str | None = None
    """Images that scales are found on."""
    cache: tuple[str, ...] = ()
    """Outputs of pipelines/cache_teacher.py, for the codecs and the ablation."""
    validation_cache: tuple[str, ...] = ()
    """The same of other images, for the ablation."""
    only: tuple[Name, ...] = ()
    """Which benchmarks to run; all if left out."""
    output: Path = ROOT / "benchmarks" / "results"
    """Folder of the results."""

    def __post_init__(self) -> None:
        for name in self.only:
            if lacking := self._lacks(name):
                raise ValueError(f"{name} needs {lacking}")

    @property
    def chosen(self) -> tuple[Name, ...]:
        """In the order of ``Name``."""
        wanted = self.only or get_args(Name)
        return tuple(name for name in get_args(Name) if name in wanted and not self._lacks(name))

    def _lacks(self, name: Name) -> str:
        """What a benchmark needs and has not got."""
        if name == "distillation" and not (self.cache and self.validation_cache):
            return "--cache and --validation-cache"
        if name in ("gpu_vit_h", "gpu_vit_t") and not torch.cuda.is_available():
            return "a GPU"
        if name in ("scales", "integer_scales") and not (self.calibration and self.lake):
            return "--calibration and --lake"
        return ""


def commands(config: Benchmarks, lake: str, cache: tuple[str, ...]) -> dict[Name, list[str]]:
    """The module of each benchmark and its arguments, as the tables show them."""
    chosen = config.photographs or tuple(path for path in photographs() if path.name == "astronaut.png")
    min_iou, min_stability = SHIPPED_THRESHOLDS  # at SAM's own, the shipped student's masks are all dropped
    truth = ["--lake", lake, *(["--annotations", config.annotations] if config.annotations else [])]
    scales = [
        *("quantization", "--measure", "accuracy", "--checkpoint", "demo_student"),
        *("--calibration", str(config.calibration), *truth),
    ]
    return {
        "predictor": ["predictor", "--checkpoint", "vit_t"],
        # Random weights of TinySAM's own shape cost what trained ones do, once their masks look like masks.
        "everything": [
            *("everything", "--photographs", *map(shown, chosen), "--checkpoint", "vit_t"),
            *("--points-per-side", "24", "--repeats", "1"),
        ],
        "rounds": [
            *("rounds", *truth, "--images", str(SCENES), "--pred-iou-thresh", str(min_iou)),
            *("--stability-score-thresh", str(min_stability), "--precisions", "float32", "bfloat16"),
        ],
        "quantization": ["quantization", "--checkpoint", "vit_t"],
        "scales": scales,
        "integer_scales": [*scales, "--form", "integer"],
        "codecs": ["codecs", "--cache", *cache, "--images", str(SCENES)],
        "planning": ["pipelines", "planning"],
        "driving": ["pipelines", "driving"],
        "cache_teacher": ["pipelines", "loop", "--job", "cache_teacher"],
        "label_images": ["pipelines", "loop", "--job", "label_images"],
        "training": ["training", "--repeats", "1"],
        "gpu_vit_h": ["gpu", "--checkpoint", "vit_h", "--batch-size", "8"],
        "gpu_vit_t": ["gpu", "--checkpoint", "vit_t", "--batch-size", "32"],
        "distillation": [
            *("distillation", "--cache", *config.cache, "--validation-cache", *config.validation_cache),
            *("--runs", "benchmarks/data/ablation"),
        ],
    }


def shown(path: Path) -> str:
    """A path as a reader of the tables can use it."""
    path = path.absolute()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def scenes() -> str:
    """Synthetic scenes to measure on, made once; returns their folder."""
    folder = ROOT / "benchmarks" / "data" / "scenes"
    for _ in iter_write(SceneSet(output=str(folder), count=SCENES, seed=1)):
        pass
    return shown(folder)


def cache_of(lake: str) -> str:
    """The shipped teacher's embeddings of a lake, made once; returns their folder."""
    folder = shown(ROOT / "benchmarks" / "data" / "cache")
    flags = ["--lake", lake, "--output", folder, "--teacher", "demo_teacher", "--num-workers", "1"]
    subprocess.run([sys.executable, "pipelines/cache_teacher.py", *flags], cwd=ROOT, check=True)
    return folder


def main() -> int:
    """Runs the benchmarks; returns the first exit code that is not 0."""
    config = tyro.cli(Benchmarks, description=__doc__)
    console = Console()
    lake = config.lake or scenes()
    cache = config.cache or ((cache_of(scenes()),) if "codecs" in config.chosen else ())
    arguments = commands(config, lake, cache)
    for name in config.chosen:
        console.rule(f"[bold]{name}[/]", align="left")
        module, *rest = arguments[name]
        output = ["--output", str(config.output.absolute() / f"{name}.json")]
        command = [sys.executable, "-m", f"benchmarks.{module}", *rest, *output]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
