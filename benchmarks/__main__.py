"""Every benchmark, one after the other: what ``make bench`` runs.

    python -m benchmarks --photographs a.jpg b.jpg --lake images --only everything rounds

Results are JSON files in ``benchmarks/results``, with the machine and the versions beside them in ``machine.json``.
Without photographs and a lake, a photograph of scikit-image and synthetic scenes are used. Run it on an idle machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import tyro
from rich.console import Console

from pipelines.common.demo_lake import photographs
from tinysam.lake.run_record import describe_machine, package_versions
from tinysam.synthetic.write import SceneSet, iter_write

ROOT = Path(__file__).resolve().parents[1]
Name = Literal[
    "everything", "rounds", "predictor", "quantization", "planning", "driving", "cache_teacher", "label_images"
]
SCENES = 20


@dataclass(frozen=True, kw_only=True)
class Benchmarks:
    """Runs the benchmarks."""

    photographs: tuple[Path, ...] = ()
    """What everything mode is timed on. Large ones show more: work at the original resolution grows with them."""
    lake: str | None = None
    """Images with ground truth in SA-1B's layout, on which quality is measured."""
    only: tuple[Name, ...] = get_args(Name)
    """Which benchmarks to run."""
    output: Path = ROOT / "benchmarks" / "results"
    """Folder of the results."""


def commands(config: Benchmarks, lake: str) -> dict[Name, list[str]]:
    """The module of each benchmark and its arguments, as the README's tables have them."""
    chosen = config.photographs or tuple(path for path in photographs() if path.name == "astronaut.png")
    on_photographs = ["--photographs", *map(str, chosen)]
    return {
        # Random weights of TinySAM's own shape cost what trained ones do, once their masks look like masks.
        "everything": ["everything", *on_photographs, "--checkpoint", "vit_t"],
        "rounds": ["rounds", "--lake", lake, "--images", str(SCENES)],
        "predictor": ["predictor", "--checkpoint", "vit_t"],
        "quantization": ["quantization", "--checkpoint", "vit_t"],
        "planning": ["pipelines", "planning"],
        "driving": ["pipelines", "driving"],
        "cache_teacher": ["pipelines", "loop", "--job", "cache_teacher"],
        "label_images": ["pipelines", "loop", "--job", "label_images"],
    }


def main() -> int:
    """Runs the benchmarks; returns the first exit code that is not 0."""
    config = tyro.cli(Benchmarks, description=__doc__)
    console = Console()
    config.output.mkdir(parents=True, exist_ok=True)
    machine = {"machine": describe_machine(), "versions": package_versions()}
    (config.output / "machine.json").write_text(json.dumps(machine, indent=2) + "\n")
    with tempfile.TemporaryDirectory() as scenes:
        if config.lake is None:
            for _ in iter_write(SceneSet(output=scenes, count=SCENES, seed=1)):
                pass
        arguments = commands(config, config.lake or scenes)
        for name in config.only:
            console.rule(f"[bold]{name}[/]", align="left")
            output = ["--output", str(config.output / f"{name}.json")]
            module, *rest = arguments[name]
            command = [sys.executable, "-m", f"benchmarks.{module}", *rest, *output]
            code = subprocess.run(command, cwd=ROOT, check=False).returncode
            if code:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
