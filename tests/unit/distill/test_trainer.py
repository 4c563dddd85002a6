from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from segment_anything.modeling import Sam

from tinysam.distill.cache import Cache, open_cache
from tinysam.distill.losses import LossConfig
from tinysam.distill.optimizer import OptimizerConfig, learning_rate, moving_average
from tinysam.distill.prompts import PromptConfig
from tinysam.distill.samples import SampleConfig
from tinysam.distill.trainer import Trainer, TrainerConfig

CONFIG = TrainerConfig(
    epochs=2, batch_size=2, group_shards=1, precision="fp32", loader_processes=0, log_every_s=0, checkpoint_every_s=0
)


def make_trainer(
    student: Sam, cache: Cache, folder: Path, *, teacher: Sam | None = None, config: TrainerConfig = CONFIG, **more: Any
) -> Trainer:
    options: dict[str, Any] = {
        "optimizer": OptimizerConfig(warmup_steps=2, learning_rate=1e-3),
        "losses": LossConfig(),
        "prompts": PromptConfig(per_image=3, max_rounds=1),
        "samples": SampleConfig(crop_size=64),
        "validation": [],
        "on_log": lambda line: None,
        "on_checkpoint": lambda line: None,
    }
    return Trainer(student, teacher, cache, trainer=config, checkpoints_url=str(folder), **{**options, **more})


def weights(sam: Sam) -> torch.Tensor:
    return torch.cat([value.flatten().float() for value in sam.state_dict().values()])


def test_training_brings_the_student_to_the_teacher(
    make_cache: Callable[..., str], tiny_sam: Sam, tmp_path: Path
) -> None:
    lines: list[dict[str, float]] = []
    config = replace(CONFIG, epochs=6)
    cache = open_cache([make_cache("c")])
    make_trainer(
        copy.deepcopy(tiny_sam), cache, tmp_path, teacher=copy.deepcopy(tiny_sam), config=config, on_log=lines.append
    ).run()
    for term in ("loss", "embedding"):  # a random teacher has no good masks to show
        assert lines[-1][term] < lines[0][term], term
    assert {"token", "output", "focal", "iou"} <= lines[0].keys()
    assert lines[-1]["step"] == lines[-1]["total_steps"]


def test_a_killed_run_ends_where_an_undisturbed_one_does(
    make_cache: Callable[..., str], tiny_sam: Sam, tmp_path: Path
) -> None:
    cache = open_cache([make_cache("c", embeddings=False)])
    undisturbed = make_trainer(copy.deepcopy(tiny_sam), cache, tmp_path / "a")
    undisturbed.run()

    class KilledError(Exception):
        pass

    def kill(line: dict[str, float]) -> None:
        if line["step"] >= 6:
            raise KilledError

    with pytest.raises(KilledError):
        make_trainer(copy.deepcopy(tiny_sam), cache, tmp_path / "b", on_checkpoint=kill).run()
    resumed = make_trainer(copy.deepcopy(tiny_sam), cache, tmp_path / "b")
    resumed.run()
    torch.testing.assert_close(weights(resumed.student), weights(undisturbed.student))
    torch.testing.assert_close(weights(resumed.averaged_student), weights(undisturbed.averaged_student))


def test_a_nan_stops_training_before_a_checkpoint_is_overwritten(
    make_cache: Callable[..., str], tiny_sam: Sam, tmp_path: Path
) -> None:
    broken = copy.deepcopy(tiny_sam)
    with torch.no_grad():
        next(broken.mask_decoder.parameters()).fill_(float("nan"))
    trainer = make_trainer(broken, open_cache([make_cache("c", embeddings=False)]), tmp_path / "checkpoints")
    with pytest.raises(FloatingPointError, match="step 0"):
        trainer.run()
    assert not (tmp_path / "checkpoints").exists()


def test_only_the_last_checkpoints_are_kept(make_cache: Callable[..., str], tiny_sam: Sam, tmp_path: Path) -> None:
    cache = open_cache([make_cache("c", embeddings=False)])
    make_trainer(copy.deepcopy(tiny_sam), cache, tmp_path / "k").run()
    assert len(list((tmp_path / "k").glob("step-*"))) == 2


def test_learning_rate_rises_then_falls() -> None:
    config = OptimizerConfig(learning_rate=1.0, final_learning_rate=0.1, warmup_steps=10)
    rates = [learning_rate(step, 100, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.1)
    assert all(b <= a for a, b in itertools.pairwise(rates[10:]))


def test_the_average_forgets_the_first_weights() -> None:
    average = [torch.zeros(1)]
    update = moving_average(0.999)
    for step in range(100):
        update(average, [torch.ones(1)], step + 1)
    assert average[0].item() > 0.99
