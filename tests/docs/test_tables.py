"""The pages' tables are what the committed results come to."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import tyro

from benchmarks import distillation
from benchmarks.__main__ import Benchmarks, Name, commands
from benchmarks.results import write_results
from benchmarks.tables import BLOCK, PAGES, RESULTS, TABLES, refresh, render
from tests.cluster.test_manifests import commands as commands_of

NAMES = get_args(Name)


def blocks() -> list[str]:
    return [found[1] for page in PAGES for found in BLOCK.findall(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_what_the_committed_results_come_to(page: Path) -> None:
    written = page.read_text(encoding="utf-8")
    assert written == refresh(written), "run `python -m benchmarks.tables`"


def test_every_benchmark_has_a_table_and_every_table_a_place() -> None:
    assert set(NAMES) == set(TABLES) == set(blocks())
    assert len(blocks()) == len(set(blocks()))
    assert {path.stem for path in RESULTS.glob("*.json")} <= set(TABLES)
    begun = sum(page.read_text(encoding="utf-8").count("<!-- table:") for page in PAGES)
    assert begun == len(blocks()), "a block does not end"


@dataclass(frozen=True)
class Options:
    """Of a benchmark that does not exist."""

    output: Path
    images: int = 3


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the result of one benchmark, as run by ``python -m``."""
    path = tmp_path / "results" / "planning.json"
    argv = ["/somewhere/benchmarks/pipelines.py", "planning", "--output", str(path), "--images", "3"]
    monkeypatch.setattr(sys, "argv", argv)
    rows = [{"step": "plan of 1 shards", "seconds": 0.26, "peak MiB": 100.4}]
    write_results(path, Options(output=path), rows)
    return path


def test_a_table_says_what_was_measured_by_which_command_and_where(results: Path) -> None:
    page = (
        "before\n<!-- table:planning -->\nold\n<!-- /table -->\nbetween\n<!-- table:rounds -->\nkept\n<!-- /table -->\n"
    )
    made = refresh(page, results.parent)
    assert made == refresh(made, results.parent)
    lines = made.splitlines()
    assert lines[:2] == ["before", "<!-- table:planning -->"]
    assert lines[2:5] == [
        "| step | seconds | peak MiB of the process |",
        "| --- | ---: | ---: |",
        "| plan of 1 shards | 0.3 | 100 |",
    ]
    assert lines[6].startswith("`python -m benchmarks.pipelines planning --images 3`, on ")
    assert "torch" in lines[6]
    assert made.endswith("<!-- /table -->\nbetween\n<!-- table:rounds -->\nkept\n<!-- /table -->\n")


def test_a_figure_that_is_changed_by_hand_is_noticed(results: Path) -> None:
    made = refresh("<!-- table:planning -->\n<!-- /table -->\n", results.parent)
    assert refresh(made.replace("0.3", "0.2"), results.parent) == made


def rendered(name: str, rows: list[Mapping[str, Any]]) -> list[str]:
    described = {
        "command": "python -m benchmarks.x",
        "machine": {"processor": "P", "cpus": 1},
        "versions": {"torch": "2", "ray": "3"},
        "results": rows,
    }
    return render(name, json.loads(json.dumps(described))).splitlines()[2:-2]


def test_the_ablations_table_has_its_gains_and_the_teacher() -> None:
    scores = {
        "ground truth only": [dict.fromkeys(distillation.SCORES, value) for value in (0.50, 0.52)],
        "+ output": [dict.fromkeys(distillation.SCORES, value) for value in (0.54, 0.58)],
    }
    teacher = dict.fromkeys(distillation.SCORES, 0.61)
    rows = [{"recipe": name, **row} for name, row in distillation.summarise(scores, teacher).items()]
    found = rendered("distillation", [*rows, {"recipe": "teacher", **distillation.as_row(teacher)}])
    times = len(distillation.SCORES)
    assert found == [
        "| ground truth only" + " | 51.00 |  | " * times + " |",
        "| + output" + " | 56.00 | +5.00 ± 12.71 | 50%" * times + " |",
        "| teacher" + " | 61.00 |  | " * times + " |",
    ]


def test_sizes_of_sa1b_are_bytes_a_value_times_its_values() -> None:
    keys = ("relative_error", "box_iou_with_exact", "box_iou", "click_iou_with_exact", "click_iou")
    [line] = rendered("codecs", [{"codec": "fp16", "bytes_per_value": 2.0, **dict.fromkeys(keys, 0.5)}])
    assert line == "| fp16 | 2.00 | 23.5 | 50.00% | 0.5000 | 0.5000 | 0.5000 | 0.5000 |"


class ParsedError(Exception):
    """A benchmark has understood its flags and would begin."""


@pytest.mark.parametrize("name", NAMES)
def test_the_command_of_each_benchmark_is_one_that_it_accepts(name: Name, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = tyro.cli

    def stop(*args: Any, **options: Any) -> None:
        raise ParsedError(parse(*args, **options))

    monkeypatch.setattr(tyro, "cli", stop)
    module, *flags = commands(Benchmarks(calibration="images"), "lake", ("cache",))[name]
    monkeypatch.setattr(sys, "argv", [f"{module}.py", *flags, "--output", f"results/{name}.json"])
    with pytest.raises(ParsedError):
        importlib.import_module(f"benchmarks.{module}").main()


def test_what_takes_longest_waits_for_its_data_and_benchmarks_keep_their_order() -> None:
    gpu = () if torch.cuda.is_available() else ("gpu_vit_h", "gpu_vit_t")
    long = ("scales", "integer_scales", "distillation")
    assert Benchmarks().chosen == tuple(name for name in NAMES if name not in (*long, *gpu))
    everything = Benchmarks(lake="a", calibration="b", cache=("c",), validation_cache=("d",))
    assert everything.chosen == tuple(name for name in NAMES if name not in gpu)
    assert Benchmarks(only=("driving", "planning")).chosen == ("planning", "driving")
    with pytest.raises(ValueError, match="--validation-cache"):
        Benchmarks(only=("distillation",))
    with pytest.raises(ValueError, match="--calibration"):
        Benchmarks(only=("scales",), lake="a")


def test_commands_of_the_page_are_benchmarks() -> None:
    shown = [command for command in commands_of("docs/BENCHMARKS.md") if command[:2] == ["python", "-m"]]
    assert shown
    for _, _, module, *_ in shown:
        assert module.split(".")[0] == "benchmarks"
