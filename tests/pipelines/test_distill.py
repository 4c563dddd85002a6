"""Distillation as a job: from a cache to a student, across workers, resumable, with errors that say what to do."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from segment_anything.modeling import Sam

from pipelines import distill
from pipelines.common.cli import JobError, parse_config
from pipelines.common.models import weights_sha256
from tests.distill_cache import spoil_embedding, write_cache
from tests.distill_workers import train_until
from tests.processes import ray_processes
from tinysam import build_sam, load, save_checkpoint
from tinysam.distill.difficulty import load_difficulty
from tinysam.distill.groups import epoch_order
from tinysam.distill.history import Line, read_history
from tinysam.lake.filesystem import LakeError, exists, join, read_bytes
from tinysam.lake.shards import ShardError
from tinysam.modeling.checkpoint import CheckpointError
from tinysam.modeling.registry import SamConfig, TinyViTConfig

ROOT = Path(__file__).resolve().parents[2]
QUICK = (
    *("--trainer.epochs", "2", "--trainer.batch-size", "2", "--trainer.group-shards", "1"),
    *("--trainer.precision", "fp32", "--trainer.loader-processes", "0", "--trainer.log-every-s", "0"),
    *("--prompts.per-image", "3", "--prompts.max-rounds", "1", "--samples.crop-size", "64", "--cpus-per-worker", "1"),
)
SHARDS, STEPS = 4, 2 * 4 * 2
"""Of the cache, and of a run with one worker: epochs x shards x five rows (one of them bad) in batches of two."""


@pytest.fixture(scope="module")
def cache(tiny_checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """With embeddings of ``tiny_checkpoint``, as their metadata say (their values are random numbers)."""
    metadata = {"teacher": tiny_checkpoint, "teacher_sha256": weights_sha256(tiny_checkpoint)}
    return write_cache(tmp_path_factory.mktemp("cache"), shards=SHARDS, metadata=metadata)


@pytest.fixture(scope="module")
def ground_truth(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_cache(tmp_path_factory.mktemp("ground-truth"), shards=SHARDS, embeddings=False)


@pytest.fixture(scope="module")
def fresh_student(tiny_sam: Sam, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A student of the teacher's shape with other weights."""
    torch.manual_seed(1)
    path = str(tmp_path_factory.mktemp("student") / "fresh.safetensors")
    save_checkpoint(build_sam(tiny_sam.config), path)
    return path


@pytest.fixture
def job(ground_truth: str, fresh_student: str, tmp_path: Path) -> Callable[..., list[str]]:
    """``job(*flags, cache=..., output=...)``: a quick job's command line."""

    def arguments(*flags: str, cache: str = ground_truth, output: str = str(tmp_path / "student")) -> list[str]:
        return ["--cache", cache, "--output", output, "--student", fresh_student, *QUICK, *flags]

    return arguments


def history(output: str) -> list[Line]:
    return read_history(join(output, "history.csv"))


def record(output: str) -> dict[str, Any]:
    return json.loads(read_bytes(join(output, "run.json")))


def assert_same_weights(a: str, b: str) -> None:
    first, second = (load(join(folder, "student.safetensors")).state_dict() for folder in (a, b))
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], msg=key)


def test_a_student_learns_from_the_cache(
    cache: str, job: Callable[..., list[str]], fresh_student: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "student")
    arguments = job("--validation-cache", cache, "--validation-images", "2", cache=cache)
    assert distill.main(arguments) == 0
    assert load(join(output, "student.safetensors")).config == load(fresh_student).config
    assert load(join(output, "checkpoints", "best.safetensors")).config == load(fresh_student).config
    trained = [line for line in history(output) if "loss" in line]
    assert trained[-1]["step"] == trained[-1]["total_steps"] == STEPS
    assert all(term in line for line in trained for term in ("embedding", "token", "output", "focal", "dice", "iou"))
    assert any("val_box" in line for line in history(output))
    assert record(output)["extra"]["finished"] is True
    assert record(output)["images_per_second"] > 0
    assert "val_click" in read_bytes(join(output, "curves.html")).decode()
    shown = capfd.readouterr().err
    assert f"step {STEPS}/{STEPS}" in shown
    assert re.search(r"step \d+/\d+, epoch 2, .* images/s, \d+% waiting for data, \d+:\d\d left", shown)
    before = read_bytes(join(output, "student.safetensors"))
    assert distill.main(arguments) == 0
    assert read_bytes(join(output, "student.safetensors")) == before


def test_ground_truth_alone_needs_no_teacher(job: Callable[..., list[str]], s3: object) -> None:
    output = "s3://tests/ground truth student"
    assert distill.main(job("--samples.flip", "--samples.max-zoom", "1.5", output=output)) == 0
    assert exists(join(output, "student.safetensors"))
    assert not any("embedding" in line for line in history(output))


def test_a_decoder_alone_learns_from_its_own_models_cache_and_later_from_it_again(
    cache: str, job: Callable[..., list[str]], tiny_checkpoint: str, tmp_path: Path
) -> None:
    """A second run's student is another file with the same encoder."""
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    frozen = ("--trainer.freeze-encoder", "--trainer.epochs", "1")
    assert distill.main(job(*frozen, "--student", tiny_checkpoint, cache=cache, output=first)) == 0
    tuned = join(first, "student.safetensors")
    assert distill.main(job(*frozen, "--student", tuned, cache=cache, output=second)) == 0
    before, after = load(tiny_checkpoint), load(join(second, "student.safetensors"))
    for key, value in before.image_encoder.state_dict().items():
        assert torch.equal(value, after.image_encoder.state_dict()[key]), key
    assert not torch.equal(before.mask_decoder.iou_token.weight, after.mask_decoder.iou_token.weight)
    # The model does not teach itself.
    assert all(("output" in line, "dice" in line) == (False, True) for line in history(second) if "loss" in line)


def test_a_decoder_learns_from_its_cache_wherever_the_models_file_has_gone(
    job: Callable[..., list[str]], tiny_checkpoint: str, tmp_path: Path
) -> None:
    metadata = {"teacher": str(tmp_path / "gone.safetensors"), "teacher_sha256": weights_sha256(tiny_checkpoint)}
    cache = write_cache(tmp_path / "own", shards=1, metadata=metadata)
    assert distill.main(job("--trainer.freeze-encoder", "--student", tiny_checkpoint, cache=cache)) == 0


@pytest.mark.parametrize("embeddings", [False, True], ids=["no embeddings", "a model that has changed since"])
def test_a_frozen_encoder_without_embeddings_that_are_surely_its_own_names_the_missing_job(
    job: Callable[..., list[str]], tiny_checkpoint: str, tmp_path: Path, embeddings: bool
) -> None:
    metadata = {"teacher": tiny_checkpoint, "teacher_sha256": "of other weights"} if embeddings else {}
    cache = write_cache(tmp_path / "cache", shards=1, embeddings=embeddings, metadata=metadata)
    with pytest.raises((CheckpointError, JobError), match=r"cache_teacher\.py --teacher .*fresh"):
        distill.main(job("--trainer.freeze-encoder", cache=cache))


def test_a_frozen_encoder_with_anothers_embeddings_is_refused_before_anything_is_written(
    cache: str, job: Callable[..., list[str]], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="the student's own encoder"):
        distill.main(job("--trainer.freeze-encoder", cache=cache))
    assert not (tmp_path / "student").exists()


def test_images_without_masks_are_taught_by_the_teachers(
    tiny_checkpoint: str, job: Callable[..., list[str]], tmp_path: Path
) -> None:
    metadata = {"teacher": tiny_checkpoint, "teacher_sha256": weights_sha256(tiny_checkpoint)}
    unlabelled = write_cache(tmp_path / "unlabelled", shards=2, masks=False, metadata=metadata)
    accept_all = ("--teacher-masks.pred-iou-thresh", "0", "--teacher-masks.stability-score-thresh", "0")
    assert distill.main(job(*accept_all, cache=unlabelled, output=str(tmp_path / "a"))) == 0
    assert distill.main(job("--teacher-masks.no-enabled", cache=unlabelled, output=str(tmp_path / "b"))) == 0
    assert any(line["dice"] > 0 for line in history(str(tmp_path / "a")) if "dice" in line)
    assert not any(line["dice"] > 0 for line in history(str(tmp_path / "b")) if "dice" in line)
    assert all(line["embedding"] > 0 for line in history(str(tmp_path / "b")) if "embedding" in line)


def test_a_dry_run_writes_nothing(cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "student"
    assert distill.main(["--cache", cache, "--output", str(output), "--student", "vit_t", "--dry-run"]) == 0
    assert not output.exists()
    assert "4 shards" in capsys.readouterr().out


def test_a_limit_keeps_whole_shards(cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--cache", cache, "--output", str(tmp_path / "o"), "--student", "vit_t", "--dry-run"]
    assert distill.main([*arguments, "--limit", "6"]) == 0
    assert "10 in 2 shards" in capsys.readouterr().out


def test_the_papers_recipe_is_a_preset(cache: str) -> None:
    recipe = str(ROOT / "pipelines" / "recipes" / "tinysam.yaml")
    config = parse_config(distill.DistillConfig, ["--config", recipe, "--cache", cache, "--output", "unused"])
    assert (config.prompts.max_rounds, config.trainer.epochs) == (9, 8)
    assert config.prompts.per_image * config.trainer.batch_size == 64  # in an iteration
    assert config.losses.hard_mask_weight


def test_an_output_of_other_settings_is_not_continued(job: Callable[..., list[str]]) -> None:
    arguments = job("--trainer.epochs", "1")
    assert distill.main(arguments) == 0
    with pytest.raises(LakeError, match="overwrite"):
        distill.main([*arguments, "--losses.dice", "2"])
    assert distill.main([*arguments, "--losses.dice", "2", "--overwrite"]) == 0


def test_a_run_without_a_teacher_is_not_continued_with_one(cache: str, job: Callable[..., list[str]]) -> None:
    assert distill.main(job("--trainer.epochs", "1", "--teacher", "none", cache=cache)) == 0
    with pytest.raises(LakeError, match="overwrite"):
        distill.main(job("--trainer.epochs", "1", cache=cache))


def test_another_teacher_than_the_caches_is_refused(cache: str, fresh_student: str, tmp_path: Path) -> None:
    arguments = ["--cache", cache, "--output", str(tmp_path / "o"), "--student", "vit_t"]
    with pytest.raises(JobError, match="not the teacher that made"):
        distill.main([*arguments, "--teacher", fresh_student])


def test_a_teacher_without_embeddings_names_the_missing_job(ground_truth: str, tiny_checkpoint: str) -> None:
    arguments = ["--cache", ground_truth, "--output", "unused", "--student", "vit_t"]
    with pytest.raises(JobError, match=r"cache_teacher\.py"):
        distill.main([*arguments, "--teacher", tiny_checkpoint])


def test_a_student_of_another_shape_is_refused_before_anything_is_written(cache: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="channels"):
        distill.main(["--cache", cache, "--output", str(tmp_path / "o"), "--student", "vit_t", *QUICK])
    assert not (tmp_path / "o").exists()


def test_checkpoints_of_another_architecture_are_refused_by_name(
    job: Callable[..., list[str]], tiny_sam: Sam, tmp_path: Path
) -> None:
    assert distill.main(job("--trainer.epochs", "1")) == 0
    output = tmp_path / "student"
    (output / "student.safetensors").unlink()
    encoder = TinyViTConfig(embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
    other = build_sam(SamConfig(image_size=128, prompt_embed_dim=32, decoder_mlp_dim=64, encoder=encoder))
    newest = json.loads((output / "checkpoints" / "latest.json").read_bytes())["checkpoint"]
    save_checkpoint(other, str(output / "checkpoints" / newest / "student.safetensors"))
    with pytest.raises(CheckpointError, match=rf"{newest}/student\.safetensors: the weights do not fit"):
        distill.main(job("--trainer.epochs", "1"))


def test_altered_pixels_are_refused_where_embeddings_are_cached(cache: str, job: Callable[..., list[str]]) -> None:
    with pytest.raises(JobError, match="flip"):
        distill.main(job("--samples.flip", cache=cache))


def test_an_empty_cache_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="cache_teacher"):
        distill.main(["--cache", str(tmp_path), "--output", str(tmp_path / "o")])


def test_a_truncated_shard_stops_the_run_by_name_and_leaves_what_was_there(
    job: Callable[..., list[str]], tmp_path: Path
) -> None:
    broken = write_cache(tmp_path / "broken", embeddings=False)
    path = Path(broken, "shards", "shard-1.parquet")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(LakeError, match=r"shard-1\.parquet"):
        distill.main(job(cache=broken))
    assert not exists(str(tmp_path / "student" / "student.safetensors"))


def test_how_often_a_run_reports_and_what_it_recomputes_may_change_when_it_goes_on() -> None:
    config = distill.DistillConfig(cache=("cache",), output="out", student="vit_t")
    reports = replace(config.trainer, log_every_s=1.0, checkpoint_every_s=5.0, recompute="all")
    assert replace(config, trainer=reports).identity() == config.identity()
    assert replace(config, trainer=replace(config.trainer, seed=1)).identity() != config.identity()


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (("--num-workers", "2", "--min-workers", "3"), "min-workers"),
        (("--trainer.batch-size", "0"), "batch_size"),
        (("--optimizer.clip-norm", "0"), "clip_norm"),
        (("--mining.strength", "-1"), "strength"),
        (("--trainer.freeze-encoder", "--losses.dense", "0.1"), "freeze-encoder"),
    ],
)
def test_values_out_of_range_are_refused(
    job: Callable[..., list[str]], flags: tuple[str, ...], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        distill.main(job(*flags))
    assert stopped.value.code == 2
    assert match in capsys.readouterr().err


def wait_for(condition: Callable[[], bool], seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert condition()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_driver_goes_on_as_if_nothing_had_happened(job: Callable[..., list[str]], tmp_path: Path) -> None:
    """Equal weights at the end mean that no shard of an epoch was left out or trained twice."""
    long = ("--trainer.epochs", "6", "--trainer.checkpoint-every-s", "0")
    output, undisturbed = str(tmp_path / "killed"), str(tmp_path / "undisturbed")
    first = subprocess.Popen([sys.executable, "pipelines/distill.py", *job(*long, output=output)], cwd=ROOT)
    try:
        wait_for(lambda: exists(join(output, "checkpoints", "latest.json")) or first.poll() is not None)
    finally:
        first.kill()
        first.wait()
    assert not exists(join(output, "student.safetensors"))
    assert distill.main(job(*long, output=output)) == 0
    assert distill.main(job(*long, output=undisturbed)) == 0
    assert_same_weights(output, undisturbed)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_workers_and_sees_every_image_of_an_epoch_once(
    ground_truth: str, job: Callable[..., list[str]], tmp_path: Path
) -> None:
    flags = ("--trainer.epochs", "1", "--trainer.checkpoint-every-s", "0", "--mining.strength", "1")
    config = parse_config(distill.DistillConfig, job(*flags))
    # Two workers take two shards at once, and four of their eight good images in each step.
    train_until(2, config, workers=2, meeting=tmp_path / "meeting")
    assert distill.main(job(*flags)) == 0
    checkpoints = join(config.output, "checkpoints")
    newest = json.loads(read_bytes(join(checkpoints, "latest.json")))["checkpoint"]
    difficulty, _ = load_difficulty(join(checkpoints, newest, "difficulty.parquet"))
    first, second = (
        sorted(difficulty.values[f"{url}#{number}-{image}"][1] for image in range(4))
        for number, url in ((n, f"{ground_truth}/shards/shard-{n}.parquet") for n in epoch_order(SHARDS, 0, 0)[1:3])
    )
    assert len(difficulty.values) == SHARDS * 4
    assert set(first) == {0, 1}  # of the first life, and never seen again
    assert second == [2, 2, 3, 3]  # one worker takes a shard at once, and two of its images in each step


@pytest.mark.timeout(900)
def test_two_workers_train_one_student_and_survive_the_death_of_one(
    cache: str, job: Callable[..., list[str]], tmp_path: Path, ray_address: str, capfd: pytest.CaptureFixture[str]
) -> None:
    output, undisturbed = str(tmp_path / "killed"), str(tmp_path / "undisturbed")
    flags = ("--num-workers", "2", "--trainer.epochs", "6", "--trainer.checkpoint-every-s", "0")

    def kill_one() -> None:
        wait_for(lambda: exists(join(output, "checkpoints", "latest.json")))
        os.kill(ray_processes("RayTrainWorker")[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    assert distill.main(job(*flags, cache=cache, output=output)) == 0
    killer.join()
    shown = capfd.readouterr().err
    assert "workers died (1 of 3 failures)" in shown
    assert "images/s" in shown  # the driver shows what workers log
    assert distill.main(job(*flags, cache=cache, output=undisturbed)) == 0
    assert_same_weights(output, undisturbed)
    steps = [line["step"] for line in history(undisturbed) if "loss" in line]
    assert steps == list(range(1, 6 * 2 * 2 + 1))  # epochs x groups of two shards x ten rows in twice two images


def test_a_worker_that_meets_a_bad_shard_ends_the_run_at_once(
    job: Callable[..., list[str]], ray_address: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = write_cache(tmp_path / "broken", embeddings=False)
    path = Path(broken, "shards", "shard-1.parquet")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(JobError, match=r"shard-1\.parquet"):
        distill.main(job("--num-workers", "1", cache=broken))
    assert "workers died" not in capfd.readouterr().err


def test_a_nan_that_one_of_two_workers_meets_names_shard_and_image_and_overwrites_nothing(
    tiny_checkpoint: str, job: Callable[..., list[str]], ray_address: str, tmp_path: Path
) -> None:
    metadata = {"teacher": tiny_checkpoint, "teacher_sha256": weights_sha256(tiny_checkpoint)}
    spoilt = write_cache(tmp_path / "spoilt", shards=SHARDS, metadata=metadata)
    number = epoch_order(SHARDS, 0, 0)[2]  # so that a checkpoint is there already
    image = spoil_embedding(f"{spoilt}/shards/shard-{number}.parquet", 1)
    with pytest.raises(JobError, match=rf"the loss is nan at step 2, on .*/shard-{number}\.parquet#{image}\. 1 of 2"):
        distill.main(job("--num-workers", "2", "--trainer.checkpoint-every-s", "0", cache=spoilt))
    latest = json.loads(read_bytes(str(tmp_path / "student" / "checkpoints" / "latest.json")))
    assert latest["shards_done"] == 2
