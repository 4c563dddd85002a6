"""The demo's lake, its commands, and how it ends when one of them fails. The demo itself is `make demo`."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from pipelines import demo
from pipelines.cache_teacher import CacheTeacherConfig
from pipelines.common import demo_lake
from pipelines.common.cli import JobError, parse_config
from pipelines.common.demo_lake import BROKEN, DemoLake, DemoLakeError, build_demo_lake
from pipelines.distill import DistillConfig
from pipelines.evaluate import EvaluateConfig
from pipelines.label_images import LabelImagesConfig
from pipelines.quantize import QuantizeConfig
from tinysam.cli import build_parser
from tinysam.lake.images import ImageError, decode_image
from tinysam.lake.index import IndexConfig, build_index, read_image_bytes


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> DemoLake:
    folder = tmp_path_factory.mktemp("demo")
    return build_demo_lake(str(folder), scenes=2, held_out=1, seed=3)


def test_every_image_of_the_lake_decodes_but_the_two_broken_ones(lake: DemoLake) -> None:
    failed: dict[str, str] = {}
    rows = build_index(IndexConfig(lake=lake.images)).to_pylist()
    for row in rows:
        try:
            decode_image(read_image_bytes(row))
        except ImageError as error:
            failed[row["image_id"]] = error.status
    assert failed == dict(zip(BROKEN, ("truncated", "not_an_image"), strict=True))
    assert len(rows) >= 18 + 2
    annotated = [row["image_id"] for row in rows if row["annotations_uri"]]
    assert annotated == ["synthetic/scene-00000.jpg", "synthetic/scene-00001.jpg"]


def test_held_out_scenes_have_coco_ground_truth_and_are_others(lake: DemoLake) -> None:
    instances = json.loads(Path(lake.instances).read_bytes())
    assert [image["file_name"] for image in instances["images"]] == ["scene-00000.jpg"]
    assert len(instances["annotations"]) > 0
    held_out = (Path(lake.held_out) / "scene-00000.jpg").read_bytes()
    assert held_out != (Path(lake.images) / "synthetic" / "scene-00000.jpg").read_bytes()


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo_lake, "PHOTOGRAPHS", {"no_such_package": ("x.jpg",)})
    with pytest.raises(DemoLakeError, match="no_such_package"):
        build_demo_lake(str(tmp_path), scenes=1, held_out=1, seed=0)


def test_each_command_is_one_that_its_job_accepts(lake: DemoLake, tmp_path: Path) -> None:
    stages = demo.plan(demo.DemoConfig(), lake, "s3://bucket", tmp_path / "report.html")
    configs: dict[str, type[Any]] = {
        "pipelines/cache_teacher.py": CacheTeacherConfig,
        "pipelines/distill.py": DistillConfig,
        "pipelines/quantize.py": QuantizeConfig,
        "pipelines/label_images.py": LabelImagesConfig,
        "pipelines/evaluate.py": EvaluateConfig,
    }
    for stage in stages:
        script, *flags = stage.command
        if script in configs:
            assert parse_config(configs.pop(script), flags).output.startswith("s3://bucket/")
    assert not configs
    report = build_parser().parse_args(stages[-1].command[2:])
    assert report.labels == parse_config(LabelImagesConfig, stages[3].command[1:]).output
    assert Path(report.output) == tmp_path / "report.html"


def test_failing_stage_ends_the_demo_with_its_output_and_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    at = "import os; print('storage', os.environ['AWS_ENDPOINT_URL'], 'Ray', os.environ['RAY_ADDRESS'], flush=True)"
    stages = [
        demo.Stage(title="first", command=("-c", at)),
        demo.Stage(title="second", command=("-c", "import sys; print('too bad', file=sys.stderr); sys.exit(7)")),
        demo.Stage(title="third", command=("-c", "print('never')")),
    ]
    monkeypatch.setattr(demo, "plan", lambda *_args, **_options: stages)
    monkeypatch.setenv("AWS_PROFILE", "mine")
    monkeypatch.setenv("RAY_ADDRESS", "cluster.example:6379")
    before = dict(os.environ)
    assert demo.main(["--output", str(tmp_path / "out"), "--scenes", "1", "--held-out", "1"]) == 7
    shown = capfd.readouterr()
    assert re.search(r"^storage http://127\.0\.0\.1:\d+ Ray [\d.]+:\d+$", shown.out, re.MULTILINE)
    assert "too bad" in shown.err
    assert "never" not in shown.out
    assert os.environ == before
    assert (tmp_path / "out" / "s3" / demo.BUCKET / "lake" / BROKEN[0]).is_file()


def test_stage_killed_by_a_signal_has_the_shells_exit_code() -> None:
    killed = demo.Stage(title="killed", command=("-c", "import os; os.kill(os.getpid(), 9)"))
    code, seconds = demo.run_stages([killed], os.environ)
    assert code == 128 + 9
    assert len(seconds) == 1


def test_only_an_earlier_demos_folder_is_emptied(tmp_path: Path) -> None:
    demo.prepare(tmp_path / "new")
    (tmp_path / "new" / "old result").touch()
    demo.prepare(tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == [demo.MARKER]

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(JobError, match="another --output"):
        demo.prepare(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()
