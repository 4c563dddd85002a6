"""The README's commands and code, as a newcomer would run them; tests/cluster parses those that need a cloud."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cluster.test_manifests import PAGES, commands
from tests.unit.report.conftest import make_labels  # noqa: F401
from tinysam.cli import main
from tinysam.synthetic import scene

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tinysam_commands() -> list[list[str]]:
    return [command for page in PAGES for command in commands(page) if command[0] == "tinysam"]


@pytest.fixture
def desk(tmp_path: Path, make_labels: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """A working folder with ``photo.jpg`` and the output of a label job in ``masks``."""
    make_labels({"a.png": [0.9, 0.8], "b.png": [0.7]}).rename(tmp_path / "masks")
    Image.fromarray(scene(7, size=(480, 640), style="photo").pixels).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", tinysam_commands(), ids=shlex.join)
def test_tinysam_commands_do_what_they_say(command: list[str], desk: Path) -> None:
    local = [word.replace("s3://bucket/", "") for word in command[1:]]
    before = set(desk.iterdir())
    assert main(local) == 0
    named = {local[place + 1] for place, word in enumerate(local) if word in ("--out", "--output", "--to")}
    assert named <= {path.name for path in set(desk.iterdir()) - before}


def test_python_of_the_readme_runs() -> None:
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    image = scene(7, size=(240, 320), style="photo").pixels
    names: dict[str, object] = {"image": image, "box": np.array([40, 60, 120, 150])}
    exec(compile(code, "README.md", "exec"), names)
    assert np.asarray(names["masks"]).shape[1:] == image.shape[:2]
    assert isinstance(names["records"], list)


def test_make_targets_of_the_readme_exist() -> None:
    targets = {command[1] for command in commands("README.md") if command[0] == "make"}
    assert {"demo", "test", "bench"} <= targets
    for target in targets:
        assert shutil.which("make")
        shown = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert shown.returncode == 0, shown.stderr


@pytest.mark.parametrize("page", [*PAGES, "ARCHITECTURE.md", "examples/README.md", "cluster/SIZING.md"])
def test_links_within_the_repository_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    for link in links:
        assert ((ROOT / page).parent / link).exists(), link


def test_the_readmes_picture_is_a_picture_and_small() -> None:
    path = ROOT / "docs" / "overlay.jpg"
    with Image.open(path) as picture:
        assert picture.width > 2 * picture.height > 400
        assert np.asarray(picture).std() > 20
    assert path.stat().st_size < 200_000
