"""The file that a benchmark leaves: what README's tables are made of (benchmarks/tables.py)."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinysam.lake.run_record import describe_machine, package_versions

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def write_results(path: Path, config: DataclassInstance, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes JSON: this process's command, machine, versions, its configuration without ``output``, and the rows."""
    values = {name: value for name, value in asdict(config).items() if name != "output"}
    described = {
        "command": command(sys.argv),
        "machine": describe_machine(),
        "versions": package_versions(),
        "config": json.loads(json.dumps(values, default=str)),
        "results": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def command(argv: Sequence[str]) -> str:
    """What to type for the same figures: ``python -m benchmarks.NAME …``, but for where they go."""
    script, *rest = argv
    shown = [f"benchmarks.{Path(script).stem}"]
    for place, word in enumerate(rest):
        if word != "--output" and rest[max(place - 1, 0)] != "--output" and not word.startswith("--output="):
            shown.append(word)
    return shlex.join(["python", "-m", *shown])
