from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from segment_anything.modeling import Sam

from tests.distill_cache import spoil_embedding
from tinysam.distill.cache import Cache, open_cache
from tinysam.distill.difficulty import MiningConfig
from tinysam.distill.groups import epoch_order
from tinysam.distill.losses import LossConfig
from tinysam.distill.optimizer import OptimizerConfig, learning_rate, moving_average
from tinysam.distill.prompts import PromptConfig
from tinysam.distill.samples import SampleConfig
from tinysam.distill.trainer import NonFiniteLossError, Trainer, TrainerConfig
from tinysam.distill.validation import validation_batches
from tinysam.modeling.checkpoint import load, read_metadata

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


def weights(sam: torch.nn.Module) -> torch.Tensor:
    return torch.cat([value.flatten().float() for value in sam.state_dict().values()])


@pytest.mark.parametrize(
    ("asked", "prefers", "used"), [("auto", True, "bf16"), ("auto", False, "fp32"), ("bf16", False, "bf16")]
)
def test_bfloat16_is_used_where_it_is_faster_or_asked_for(
    asked: str,
    prefers: bool,
    used: str,
    make_cache: Callable[..., str],
    tiny_sam: Sam,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tinysam.distill.trainer.prefers_bfloat16", lambda device: prefers)
    config = replace(CONFIG, precision=asked)
    trainer = make_trainer(copy.deepcopy(tiny_sam), open_cache([make_cache("c")]), tmp_path, config=config)
    assert trainer.precision == used
    types = []
    trainer.student.mask_decoder.iou_prediction_head.register_forward_hook(lambda *call: types.append(call[2].dtype))
    trainer.run()
    assert set(types) == {torch.bfloat16 if used == "bf16" else torch.float32}


def test_training_brings_the_student_to_the_teacher(
    make_cache: Callable[..., str], tiny_sam: Sam, tmp_path: Path
) -> None:
    lines: list[dict[str, float]] = []
    config = replace(CONFIG, epochs=6, log_every_s=1000)  # a line an epoch, as single steps differ by their images
    cache = open_cache([make_cache("c")])
    make_trainer(
        copy.deepcopy(tiny_sam), cache, tmp_path, teacher=copy.deepcopy(tiny_sam), config=config, on_log=lines.append
    ).run()
    for term in ("loss", "embedding"):  # a random teacher has no good masks to show
        assert lines[-1][term] < lines[0][term], term
    assert {"token", "output", "focal", "iou"} <= lines[0].keys()
    assert lines[-1]["step"] == lines[-1]["total_steps"]


@pytest.mark.parametrize(("strength", "dense"), [(0.0, 0.0), (3.0, 0.0), (0.0, 1.0)])
def test_a_killed_run_ends_where_an_undisturbed_one_does(
    make_cache: Callable[..., str], tiny_sam: Sam, tmp_path: Path, strength: float, dense: float
) -> None:
    cache = open_cache([make_cache("c", embeddings=False)])
    options: dict[str, Any] = {"mining": MiningConfig(strength=strength), "losses": LossConfig(dense=dense)}

    def trainer(folder: str, **more: Any) -> Trainer:
        torch.manual_seed(0)  # as the job does; the auxiliary task's head begins at random
        return make_trainer(copy.deepcopy(tiny_sam), cache, tmp_path / folder, **options, **more)

    undisturbed = trainer("a")
    undisturbed.run()

    class KilledError(Exception):
        pass

    def kill(line: dict[str, float]) -> None:
        if line["step"] >= 6:
            raise KilledError

    with pytest.raises(KilledError):
        trainer("b", on_checkpoint=kill).run()
    resumed = trainer("b")
    resumed.run()
    torch.testing.assert_close(weights(resumed.student), weights(undisturbed.student))
    torch.testing.assert_close(weights(resumed.averaged_student), weights(undisturbed.averaged_student))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_batchnorm_keeps_its_statistics_in_the_last_share_of_steps(
    make_cache: Callable[..., str], tiny_sam: Sam, tmp_path: Path, share: float
) -> None:
    cache = open_cache([make_cache("c", embeddings=False)])
    student = copy.deepcopy(tiny_sam)

    def statistics() -> torch.Tensor:
        return torch.cat([value.flatten() for name, value in student.named_buffers() if name.endswith("running_mean")])

    seen, steps = [statistics()], []

    def look(line: dict[str, float]) -> None:
        seen.append(statistics())
        steps.append(line["step"] / line["total_steps"])

    config = replace(CONFIG, freeze_norm=share)
    make_trainer(student, cache, tmp_path, config=config, on_log=look).run()
    assert len(steps) > 4
    for (before, after), done in zip(itertools.pairwise(seen), steps, strict=True):
        assert torch.equal(before, after) == (done > 1 - share)


def test_a_frozen_encoder_is_kept_to_the_last_statistic_while_the_decoder_learns(
    make_cache: Callable[..., str], tiny_sam: Sam, tmp_path: Path
) -> None:
    student, config = copy.deepcopy(tiny_sam), replace(CONFIG, freeze_encoder=True)
    cache = open_cache([make_cache("c")])
    trainer = make_trainer(student, cache, tmp_path, config=config, optimizer=OptimizerConfig(ema_decay=0.5))
    trainer.run()
    for trained in (student, trainer.averaged_student):
        for name, value in trained.image_encoder.state_dict().items():
            assert torch.equal(value, tiny_sam.image_encoder.state_dict()[name]), name
        assert not torch.equal(weights(trained.mask_decoder), weights(tiny_sam.mask_decoder))


def test_a_nan_everywhere_blames_the_training_and_not_an_image(
    make_cache: Callable[..., str], tiny_sam: Sam, tmp_path: Path
) -> None:
    broken = copy.deepcopy(tiny_sam)
    with torch.no_grad():
        next(broken.mask_decoder.parameters()).fill_(float("nan"))
    trainer = make_trainer(broken, open_cache([make_cache("c", embeddings=False)]), tmp_path / "checkpoints")
    with pytest.raises(NonFiniteLossError, match=r"step 0, on .*learning-rate"):
        trainer.run()
    assert not (tmp_path / "checkpoints").exists()


def test_a_nan_in_the_cache_names_shard_and_image_and_overwrites_nothing(
    make_cache: Callable[..., str], tiny_sam: Sam, tmp_path: Path
) -> None:
    folder = make_cache("c")
    cache = open_cache([folder])
    broken = cache.shards[epoch_order(3, CONFIG.seed, 0)[1]].url  # so that a checkpoint is there already
    image = spoil_embedding(broken, 2)
    teacher, checkpoints = copy.deepcopy(tiny_sam), tmp_path / "checkpoints"
    trainer = make_trainer(copy.deepcopy(tiny_sam), cache, checkpoints, teacher=teacher)
    with pytest.raises(NonFiniteLossError) as stopped:
        trainer.run()
    assert f"on {broken}#{image}. 1 of 2 images" in str(stopped.value)
    assert all(value.isfinite().all() for value in trainer.student.state_dict().values())
    assert json.loads((checkpoints / "latest.json").read_bytes())["shards_done"] == 1


@pytest.mark.parametrize("batches", [1, 2])
def test_a_gradient_that_is_no_number_is_caught_before_it_reaches_a_checkpoint(
    make_cache: Callable[..., str], tiny_sam: Sam, tmp_path: Path, batches: int
) -> None:
    """A loss may be finite while its gradient overflows."""
    cache = open_cache([make_cache("c", shards=2, embeddings=False)])
    config = replace(CONFIG, epochs=1, accumulate_batches=batches)
    trainer = make_trainer(copy.deepcopy(tiny_sam), cache, tmp_path / "k", config=config)
    student, seen = trainer.student, 0

    def overflow(grad: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += 1
        return grad * math.inf if seen > batches else grad

    student.mask_decoder.mask_tokens.weight.register_hook(overflow)
    before = {}

    def remember(_: dict[str, float]) -> None:
        before.update(copy.deepcopy(student.state_dict()))

    trainer._on_log = remember
    with pytest.raises(NonFiniteLossError, match=r"the gradient's norm is (nan|inf) at step 1, on .*shard-\d.parquet#"):
        trainer.run()
    parameters = dict(student.named_parameters())
    assert parameters
    for name, value in parameters.items():
        assert torch.equal(value, before[name]), name


def test_gradients_of_several_batches_are_averaged_into_a_step(
    make_cache: Callable[..., str], tiny_sam: Sam, tmp_path: Path
) -> None:
    cache = open_cache([make_cache("c", shards=1, images=7, embeddings=False)])
    seen: dict[int, list[torch.Tensor]] = {}
    for batches in (1, 2):
        student = copy.deepcopy(tiny_sam)
        trainer = make_trainer(
            student,
            cache,
            tmp_path / str(batches),
            config=replace(CONFIG, epochs=1, accumulate_batches=batches),
            optimizer=OptimizerConfig(learning_rate=1e-12, final_learning_rate=0.0, clip_norm=1e9),
        )
        weight, grads = student.mask_decoder.mask_tokens.weight, seen.setdefault(batches, [])
        trainer._optimizer.register_step_pre_hook(lambda *_, w=weight, g=grads: g.append(w.grad.clone()))
        trainer.run()
    assert [len(seen[batches]) for batches in (1, 2)] == [4, 2]
    for number, grad in enumerate(seen[2]):
        torch.testing.assert_close(grad, (seen[1][2 * number] + seen[1][2 * number + 1]) / 2, rtol=1e-3, atol=1e-5)


def test_the_weights_that_did_best_in_validation_are_kept(
    make_cache: Callable[..., str], tiny_sam: Sam, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.2, 0.5, 0.4, 0.3, 0.1, 0.1, 0.1])
    monkeypatch.setattr("tinysam.distill.trainer.validate", lambda *_: {"box": (score := next(scores)), "click": score})
    cache = open_cache([make_cache("c", embeddings=False)])
    batch = validation_batches([make_cache("v", shards=1)], images=1, image_size=128)
    make_trainer(copy.deepcopy(tiny_sam), cache, tmp_path / "k", validation=batch).run()
    best = str(tmp_path / "k" / "best.safetensors")
    assert read_metadata(best)["val_box"] == "0.5"
    assert load(best).config == tiny_sam.config
    assert json.loads((tmp_path / "k" / "latest.json").read_bytes())["best_score"] == 0.5


def test_the_rate_goes_on_from_the_same_place_with_another_number_of_workers(
    make_cache: Callable[..., str], tiny_sam: Sam, tmp_path: Path
) -> None:
    cache = open_cache([make_cache("c", shards=4, embeddings=False)])

    class KilledError(Exception):
        pass

    def kill(line: dict[str, float]) -> None:
        if line["step"] >= 8:  # of 16 with batches of two: four shards of five rows, twice
            raise KilledError

    with pytest.raises(KilledError):
        make_trainer(copy.deepcopy(tiny_sam), cache, tmp_path / "k", on_checkpoint=kill).run()
    lines: list[dict[str, float]] = []
    config = replace(CONFIG, batch_size=4)  # one worker with twice the batch makes the steps of two workers
    make_trainer(copy.deepcopy(tiny_sam), cache, tmp_path / "k", config=config, on_log=lines.append).run()
    rates = OptimizerConfig(warmup_steps=2, learning_rate=1e-3)
    assert lines[0]["step"] == 9
    assert lines[-1]["step"] == lines[-1]["total_steps"] == 8 + 4
    assert lines[0]["learning_rate"] == pytest.approx(learning_rate(4, 8, rates))


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
