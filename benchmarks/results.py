"""The file that a benchmark leaves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def write_results(path: Path, config: DataclassInstance, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes ``{"config": …, "results": […]}`` as JSON, with the paths of the configuration as strings."""
    described = json.loads(json.dumps(asdict(config), default=str))
    path.write_text(json.dumps({"config": described, "results": rows}, indent=2) + "\n")
