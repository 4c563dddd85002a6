"""What no module may do: run what a file says. The tests of single dangers lie beside their code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted([*(ROOT / "tinysam").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")])
UNPICKLERS = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}


def name_of(node: ast.expr) -> str:
    """``torch.load`` for the expression that says so."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def findings(source: str) -> Iterator[str]:
    """What a module does that could run a stranger's code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported = {(node.module or "").split(".")[0], *(alias.name for alias in node.names)}
        else:
            imported = set()
        yield from (f"imports {name}" for name in imported & UNPICKLERS)
        if not isinstance(node, ast.Call):
            continue
        called = name_of(node.func)
        options = {option.arg: option.value for option in node.keywords}
        if called in ("eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load"):
            yield f"calls {called}"
        if called == "torch.load" and not is_true(options.get("weights_only")):
            yield "calls torch.load without weights_only=True"
        if "allow_pickle" in options or "shell" in options:
            yield f"calls {called} with allow_pickle or shell"
        if called.endswith((".extractall", ".extract")):
            yield f"unpacks an archive with {called}"


def is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_unpickles_or_runs_what_a_file_says(path: Path) -> None:
    assert list(findings(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "from ray import cloudpickle",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import yaml\nyaml.load('x')",
        "import subprocess\nsubprocess.run('x', shell=True)",
        "import tarfile\ntarfile.open('x').extractall()",
        "eval('1')",
    ],
)
def test_the_test_sees_what_it_is_for(source: str) -> None:
    assert list(findings(source))


def test_the_test_lets_ordinary_code_pass() -> None:
    source = "import torch, yaml, json\ntorch.load('x', weights_only=True)\nyaml.safe_load('x')\njson.loads('1')"
    assert list(findings(source)) == []
