"""Every example runs as a user would run it, at the smallest size, on the models that ship with the project."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinysam.synthetic import scene

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def run(script: str, *flags: str) -> str:
    """What an example prints."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["RAY_AUTH_MODE"] = "disabled"
    command = [sys.executable, str(EXAMPLES / script), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_page_names_every_example() -> None:
    named = re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text())
    assert sorted(named) == sorted(path.name for path in EXAMPLES.glob("*.py"))


def test_segment_one_image(tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    pixels = scene(7, size=(240, 320), style="photo").pixels
    Image.fromarray(pixels).save(photo)
    flags = ("--photo", str(photo), "--point", "140", "120", "--points-per-side", "8", "--output", str(tmp_path))
    shown = run("segment_one_image.py", *flags)
    found = re.search(r"mask at \(140, 120\): (\d+) pixels.*\neverything: (\d+) masks", shown)
    assert found
    assert 0 < int(found[1]) < 240 * 320
    drawn = {name: np.asarray(Image.open(tmp_path / name)) for name in ("point.png", "everything.png")}
    assert {picture.shape for picture in drawn.values()} == {pixels.shape}
    assert (drawn["point.png"] != pixels).any()
    assert (drawn["everything.png"] != pixels).any() == (int(found[2]) > 0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_label_a_bucket(tmp_path: Path) -> None:
    shown = run("label_a_bucket.py", "--output", str(tmp_path / "out"), "--scenes", "2", "--points-per-side", "4")
    assert len(re.findall(r"^scene-0000\d\.jpg: \d+ masks over \d+% of the image$", shown, re.MULTILINE)) == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_distil_on_your_images(tmp_path: Path) -> None:
    shown = run("distil_on_your_images.py", "--output", str(tmp_path / "out"), "--scenes", "4", "--epochs", "1")
    assert "million parameters" in shown
    assert (tmp_path / "out" / "student" / "student.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fine_tune(tmp_path: Path) -> None:
    run("fine_tune.py", "--output", str(tmp_path / "out"), "--scenes", "4", "--epochs", "1")
    results = json.loads((tmp_path / "out" / "scores" / "results.json").read_text())
    [dataset] = results["datasets"].values()
    before, after = dataset["checkpoints"].values()
    assert before["metrics"].keys() == after["metrics"].keys()
    assert before["metrics"] != after["metrics"]
