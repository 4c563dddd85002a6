"""What can be checked of the manifests without a cluster: versions agree, and entry points exist and parse."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from pipelines.cache_teacher import CacheTeacherConfig
from pipelines.common.cli import parse_config
from pipelines.label_images import LabelImagesConfig

ROOT = Path(__file__).resolve().parents[2]
JOBS = sorted((ROOT / "cluster").glob("*.yaml"))
CONFIGS = {"pipelines/label_images.py": LabelImagesConfig, "pipelines/cache_teacher.py": CacheTeacherConfig}


def ray_version() -> str:
    found = re.search(r"^ray==(\S+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert found
    return found[1]


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_manifests_name_the_locked_ray_and_one_image(path: Path) -> None:
    job = yaml.safe_load(path.read_text())
    assert job["kind"] == "RayJob"
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == ray_version()
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    containers = [container for group in groups for container in group["template"]["spec"]["containers"]]
    assert len({container["image"] for container in containers}) == 1
    for container in containers:
        assert container["resources"]["requests"] == container["resources"]["limits"]


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_entry_points_exist_and_take_their_flags(path: Path) -> None:
    python, script, *flags = shlex.split(yaml.safe_load(path.read_text())["spec"]["entrypoint"])
    assert python == "python"
    assert (ROOT / script).is_file()
    parse_config(CONFIGS[script], flags)


def test_the_image_is_built_on_the_locked_ray() -> None:
    assert f"FROM rayproject/ray:{ray_version()}-py311" in (ROOT / "cluster" / "Dockerfile").read_text()
