"""Distillation as a job: from a lake with masks to a student, resumable, with errors that say what to do."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from segment_anything.modeling import Sam

from pipelines import cache_teacher, distill
from pipelines.common.cli import JobError
from tinysam import load, save_checkpoint
from tinysam.lake.filesystem import LakeError, exists, join, read_bytes
from tinysam.lake.shards import ShardError
from tinysam.synthetic.write import SceneSet, iter_write

ROOT = Path(__file__).resolve().parents[2]
QUICK = (
    *("--trainer.epochs", "2", "--trainer.batch-size", "2", "--trainer.group-shards", "1"),
    *("--trainer.precision", "fp32", "--trainer.loader-processes", "0", "--trainer.log-every-s", "0"),
    *("--prompts.per-image", "3", "--prompts.max-rounds", "1", "--samples.crop-size", "64", "--cpus-per-worker", "1"),
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("scenes"))
    assert sum(iter_write(SceneSet(output=folder, count=8, height=96, width=128))) > 8
    return folder


@pytest.fixture(scope="module")
def cache(scenes: str, tiny_checkpoint: str, ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    output = str(tmp_path_factory.mktemp("cache"))
    arguments = ["--lake", scenes, "--output", output, "--teacher", tiny_checkpoint, "--images-per-shard", "2"]
    assert cache_teacher.main([*arguments, "--num-workers", "1"]) == 0
    return output


@pytest.fixture(scope="module")
def ground_truth(scenes: str, ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    output = str(tmp_path_factory.mktemp("ground-truth"))
    arguments = ["--lake", scenes, "--output", output, "--teacher", "none", "--image-size", "128"]
    assert cache_teacher.main([*arguments, "--images-per-shard", "2", "--num-workers", "1"]) == 0
    return output


@pytest.fixture(scope="module")
def fresh_student(tiny_sam: Sam, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A student of the teacher's shape with other weights."""
    torch.manual_seed(1)
    from tinysam import build_sam

    path = str(tmp_path_factory.mktemp("student") / "fresh.safetensors")
    save_checkpoint(build_sam(tiny_sam.config), path)
    return path


def history(output: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(read_bytes(join(output, "history.csv")).decode())))


def record(output: str) -> dict[str, object]:
    return json.loads(read_bytes(join(output, "run.json")))


def test_a_student_learns_from_the_cache(cache: str, fresh_student: str, tmp_path: Path) -> None:
    output = str(tmp_path / "student")
    arguments = ["--cache", cache, "--output", output, "--student", fresh_student, *QUICK]
    assert distill.main([*arguments, "--validation-cache", cache, "--validation-images", "2"]) == 0
    student = load(join(output, "student.safetensors"))
    assert student.config == load(fresh_student).config
    lines = history(output)
    trained = [line for line in lines if line["loss"]]
    assert int(float(trained[-1]["step"])) == int(float(trained[-1]["total_steps"])) == 8
    assert all(line[term] for line in trained for term in ("embedding", "token", "output", "focal", "dice", "iou"))
    assert any(line["val_box"] for line in lines)
    assert record(output)["extra"]["finished"] is True  # type: ignore[index]
    before = read_bytes(join(output, "student.safetensors"))
    assert distill.main([*arguments, "--validation-cache", cache, "--validation-images", "2"]) == 0
    assert read_bytes(join(output, "student.safetensors")) == before


def test_ground_truth_alone_needs_no_teacher(ground_truth: str, fresh_student: str, s3: object, tmp_path: Path) -> None:
    output = "s3://tests/ground truth student"
    arguments = ["--cache", ground_truth, "--output", output, "--student", fresh_student, *QUICK]
    assert distill.main([*arguments, "--samples.flip", "--samples.max-zoom", "1.5"]) == 0
    assert exists(join(output, "student.safetensors"))
    assert not any(line["embedding"] for line in history(output))


def test_a_dry_run_writes_nothing(cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "student"
    assert distill.main(["--cache", cache, "--output", str(output), "--student", "vit_t", "--dry-run"]) == 0
    assert not output.exists()
    assert "4 shards" in capsys.readouterr().out


def test_a_limit_keeps_whole_shards(cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--cache", cache, "--output", str(tmp_path / "o"), "--student", "vit_t", "--dry-run"]
    assert distill.main([*arguments, "--limit", "3"]) == 0
    assert "4 in 2 shards" in capsys.readouterr().out


def test_an_output_of_other_settings_is_not_continued(cache: str, fresh_student: str, tmp_path: Path) -> None:
    output = str(tmp_path / "student")
    arguments = ["--cache", cache, "--output", output, "--student", fresh_student, *QUICK]
    assert distill.main(arguments) == 0
    with pytest.raises(LakeError, match="overwrite"):
        distill.main([*arguments, "--losses.dice", "2"])
    assert distill.main([*arguments, "--losses.dice", "2", "--overwrite"]) == 0


def test_another_teacher_than_the_caches_is_refused(cache: str, fresh_student: str, tmp_path: Path) -> None:
    arguments = ["--cache", cache, "--output", str(tmp_path / "o"), "--student", "vit_t"]
    with pytest.raises(JobError, match="not the teacher that made"):
        distill.main([*arguments, "--teacher", fresh_student])


def test_a_teacher_without_embeddings_names_the_missing_job(ground_truth: str, tiny_checkpoint: str) -> None:
    arguments = ["--cache", ground_truth, "--output", "unused", "--student", "vit_t"]
    with pytest.raises(JobError, match=r"cache_teacher\.py"):
        distill.main([*arguments, "--teacher", tiny_checkpoint])


def test_a_student_of_another_shape_is_refused_with_a_remedy(cache: str, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="channels"):
        distill.main(["--cache", cache, "--output", str(tmp_path / "o"), "--student", "vit_t", *QUICK])


def test_altered_pixels_are_refused_where_embeddings_are_cached(cache: str, fresh_student: str, tmp_path: Path) -> None:
    arguments = ["--cache", cache, "--output", str(tmp_path / "o"), "--student", fresh_student]
    with pytest.raises(JobError, match="flip"):
        distill.main([*arguments, *QUICK, "--samples.flip"])


def test_an_empty_cache_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="cache_teacher"):
        distill.main(["--cache", str(tmp_path), "--output", str(tmp_path / "o")])


def run_job(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "pipelines/distill.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.slow
def test_a_killed_driver_goes_on_from_its_checkpoint(ground_truth: str, fresh_student: str, tmp_path: Path) -> None:
    output = str(tmp_path / "student")
    quick = [*QUICK, "--trainer.epochs", "12", "--trainer.checkpoint-every-s", "0"]
    arguments = ["--cache", ground_truth, "--output", output, "--student", fresh_student, *quick]
    first = run_job(arguments)
    deadline = time.monotonic() + 240
    while not exists(join(output, "checkpoints", "latest.json")) and time.monotonic() < deadline:
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert exists(join(output, "checkpoints", "latest.json"))
    assert not exists(join(output, "student.safetensors"))
    assert run_job(arguments).wait() == 0
    undisturbed = str(tmp_path / "undisturbed")
    assert run_job([*arguments[:3], undisturbed, *arguments[4:]]).wait() == 0
    a, b = (load(join(folder, "student.safetensors")).state_dict() for folder in (output, undisturbed))
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], msg=key)


@pytest.mark.slow
def test_two_workers_train_one_student(cache: str, fresh_student: str, tmp_path: Path, ray_address: str) -> None:
    output = str(tmp_path / "student")
    arguments = ["--cache", cache, "--output", output, "--student", fresh_student, *QUICK]
    assert distill.main([*arguments, "--num-workers", "2"]) == 0
    lines = [line for line in history(output) if line["loss"]]
    assert int(float(lines[-1]["step"])) == 4  # twice the images a step, half the steps
    assert exists(join(output, "student.safetensors"))
