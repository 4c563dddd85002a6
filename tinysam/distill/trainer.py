"""The training loop: epochs over groups of shards, checkpoints between groups. Knows torch, but no Ray."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from segment_anything.modeling import Sam
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from tinysam.distill.cache import Cache
from tinysam.distill.difficulty import MiningConfig
from tinysam.distill.groups import Group, epoch_order, make_groups
from tinysam.distill.loading import Reading, load_batches
from tinysam.distill.losses import LossConfig
from tinysam.distill.memory import recompute_blocks
from tinysam.distill.optimizer import OptimizerConfig, learning_rate, moving_average, parameter_groups
from tinysam.distill.progress import TrainingState, load_progress, save_best, save_progress
from tinysam.distill.prompts import PromptConfig, draw_refinements
from tinysam.distill.samples import Sample, SampleConfig
from tinysam.distill.step import DistillationLoss
from tinysam.distill.teacher_masks import TeacherMaskConfig
from tinysam.distill.validation import validate
from tinysam.runtime.processor import prefers_bfloat16


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long, how much at once, how exact."""

    epochs: int = 8
    """Passes over the cache (paper)."""
    batch_size: int = 8
    """Images that a worker sees at once."""
    accumulate_batches: int = 1
    """Batches whose gradients a worker adds up before a step of the optimizer."""
    group_shards: int = 8
    """Shards that a worker mixes at once: samples are drawn across them, checkpoints lie between groups."""
    seed: int = 0
    """Of initial weights, order, crops and prompts."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the networks; losses and optimizer are float32 in any case. auto: bf16 where a worker's device
    computes faster in it, which most CPUs do not."""
    freeze_norm: float = 0.0
    """Last share of the steps in which BatchNorm normalises with the statistics that it has, as it will when the
    student is used, instead of the batch's: those of a few images of one kind are not those of all (our choice)."""
    freeze_encoder: bool = False
    """Train the prompt encoder and the mask decoder alone, on a cache of the student's own embeddings: its image
    encoder is never run, so that even SAM ViT-H learns a new kind of object on a small machine."""
    recompute: Literal["nothing", "decoder", "all"] = "nothing"
    """Activations that are computed again in the backward pass instead of kept: those of each round of prompts, which
    grow with rounds and prompts, or those of each block of the image encoder as well."""
    loader_processes: int = 1
    """Processes a worker that decode samples ahead of training; 0 decodes between the steps."""
    log_every_s: float = 10.0
    """Seconds between lines of history."""
    checkpoint_every_s: float = 300.0
    """Seconds between checkpoints at least; one more at the end."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate_batches", "group_shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("loader_processes", "log_every_s", "checkpoint_every_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.freeze_norm <= 1:
            raise ValueError(f"freeze_norm must lie in [0, 1], got {self.freeze_norm}")

    def decisive(self) -> dict[str, Any]:
        """The options that decide about the student: all but those that change memory and reports alone."""
        options = asdict(self)
        for name in ("recompute", "log_every_s", "checkpoint_every_s"):
            del options[name]
        return options


class NonFiniteLossError(FloatingPointError):
    """A loss or its gradient is NaN or infinite; the message names the step, the shards and the images."""


class Trainer:
    """Trains a student on a cache, as one of ``world_size`` equal workers.

    Args:
        student: initial weights; trained in place.
        teacher: None for ground truth alone.
        cache: the training set.
        validation: whole-image batches to watch, or none.
        checkpoints_url: folder of resumable checkpoints; the newest is picked up. Where there is a validation, the
            averaged weights that did best in it are kept there as ``best.safetensors``.
        on_log: called on rank 0 with each line of history.
        on_checkpoint: called on every rank after each checkpoint, with the validation's scores on rank 0.
        rank: of this worker; with several workers, torch's process group has to be up.
    """

    def __init__(
        self,
        student: Sam,
        teacher: Sam | None,
        cache: Cache,
        *,
        trainer: TrainerConfig,
        optimizer: OptimizerConfig,
        losses: LossConfig,
        prompts: PromptConfig,
        samples: SampleConfig,
        validation: Sequence[Sample],
        checkpoints_url: str,
        on_log: Callable[[dict[str, float]], None],
        on_checkpoint: Callable[[dict[str, float]], None],
        teacher_masks: TeacherMaskConfig | None = None,
        mining: MiningConfig | None = None,
        rank: int = 0,
        world_size: int = 1,
        device: str = "cpu",
    ) -> None:
        self.student, self.cache, self.config = student, cache, trainer
        self._optimizer_config, self._prompts, self._samples = optimizer, prompts, samples
        self._mining = mining or MiningConfig()
        self._validation = validation
        self._checkpoints_url, self._on_log, self._on_checkpoint = checkpoints_url, on_log, on_checkpoint
        self._rank, self._world_size, self._device = rank, world_size, device

        if trainer.freeze_encoder:
            student.image_encoder.requires_grad_(False)
        loss = DistillationLoss(
            student,
            teacher,
            losses,
            prompts,
            teacher_masks,
            recompute_rounds=trainer.recompute != "nothing",
            encode=not trainer.freeze_encoder,
        ).to(device)
        self._local_loss = loss
        student.image_encoder.to(memory_format=torch.channels_last)
        self._ema = AveragedModel(student, multi_avg_fn=moving_average(optimizer.ema_decay), use_buffers=True)
        if trainer.recompute == "all":
            recompute_blocks(student.image_encoder)
        # A round without a mask prompt leaves the prompt encoder's mask branch out of the graph.
        self._loss: nn.Module = DistributedDataParallel(loss, find_unused_parameters=True) if world_size > 1 else loss
        trained = nn.ModuleList([student] if loss.dense_head is None else [student, loss.dense_head])
        self._trained = [parameter for parameter in trained.parameters() if parameter.requires_grad]
        self._norms = [module for module in student.modules() if isinstance(module, _BatchNorm)]
        groups = parameter_groups(trained, optimizer.weight_decay)
        self._optimizer = torch.optim.AdamW(groups, lr=optimizer.learning_rate, fused=True)
        if trainer.precision == "auto":
            self.precision = "bf16" if prefers_bfloat16(device) else "fp32"
        else:
            self.precision = trainer.precision
        self._autocast = torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16")
        self._state = TrainingState(
            student=student, averaged=self.averaged_student, optimizer=self._optimizer, dense_head=loss.dense_head
        )
        self._progress, self._difficulty, self._weights = load_progress(checkpoints_url, self._state)
        self._ema.n_averaged.fill_(self._progress.step)
        self._total = sum(self._steps_in(epoch) for epoch in range(trainer.epochs))
        begun, done = self._progress.epoch, self._progress.shards_done
        self._left = sum(self._steps_in(epoch, done if epoch == begun else 0) for epoch in range(begun, trainer.epochs))

    @property
    def averaged_student(self) -> Sam:
        """The exponential moving average of the student's weights."""
        return self._ema.module

    @property
    def _finished(self) -> bool:
        return self._progress.epoch >= self.config.epochs

    def run(self) -> None:
        """Trains to the end, from the newest checkpoint on if there is one.

        Raises:
            NonFiniteLossError: before the weights take in a loss or a gradient that is no number.
            LakeError: if a shard cannot be read; the message names it.
        """
        self.student.train()
        saved_at = time.monotonic()
        while not self._finished:
            groups = self._groups(self._progress.epoch, self._progress.shards_done)
            log = _Log(self.config.log_every_s)
            for group, batches in self._read(groups):
                for _ in range(group.steps):
                    self._step(batches, log)
                    if self._rank == 0 and log.due:
                        self._write_log(log)
                self._progress.shards_done += len(group.shards)
                # One clock decides for all: a checkpoint is a meeting of the workers.
                if self._agreed(time.monotonic() - saved_at > self.config.checkpoint_every_s):
                    self._checkpoint()
                    saved_at = time.monotonic()
            if self._rank == 0 and log.steps:
                self._write_log(log)
            self._progress.epoch += 1
            self._progress.shards_done = 0
            self._share_difficulty()
            self._weights = self._difficulty.weights(self._mining.strength)
        self._checkpoint()

    def _groups(self, epoch: int, done: int) -> list[Group]:
        config, workers = self.config, self._world_size
        return make_groups(
            epoch_order(len(self.cache.shards), config.seed, epoch),
            [shard.images for shard in self.cache.shards],
            done=done,
            group_shards=config.group_shards * workers,
            images_per_step=config.batch_size * config.accumulate_batches * workers,
        )

    def _steps_in(self, epoch: int, done: int = 0) -> int:
        return sum(group.steps for group in self._groups(epoch, done))

    def _read(self, groups: list[Group]) -> Iterator[tuple[Group, _Batches]]:
        config, epoch = self.config, self._progress.epoch
        reading = Reading(
            groups=groups,
            samples=self._samples,
            prompts=self._prompts.per_image,
            dense=self._local_loss.dense_head is not None,
            batch_size=config.batch_size,
            batches_per_step=config.accumulate_batches,
            seed=(config.seed, epoch),
            worker=self._rank,
            workers=self._world_size,
            weights=self._weights,
        )
        pin = self._device == "cuda"
        batches = load_batches(self.cache, reading, processes=config.loader_processes, pin_memory=pin)
        for group in groups:
            seed = (config.seed, epoch, group.offset)
            # How often prompts are refined is drawn alike on all workers, as the slowest of them sets the pace.
            common = seeded_generator(seed, "cpu")
            yield group, _Batches(batches, common, seeded_generator((*seed, self._rank), self._device))

    def _step(self, batches: _Batches, log: _Log) -> None:
        done = self._total - self._left
        if done >= (1 - self.config.freeze_norm) * self._total:
            for layer in self._norms:
                layer.eval()
        rate = learning_rate(done, self._total, self._optimizer_config)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        share = 1 / self.config.accumulate_batches
        seen: list[tuple[Sample, list[bool]]] = []
        for number in range(self.config.accumulate_batches):
            start = time.monotonic()
            batch = next(batches.loaded)
            log.waited += time.monotonic() - start
            refinements = draw_refinements(self._prompts, batches.common)
            seen.append((batch, refinements))
            batch = batch.to(self._device)
            is_last = number == self.config.accumulate_batches - 1
            with nullcontext() if is_last else self._unsynchronised():
                loss, terms, difficulty = self._loss(batch, refinements, batches.own, self._autocast)
                # One transfer for all numbers: each would make the CPU wait for the GPU.
                values = torch.stack([loss.detach(), *terms.values()]).tolist()
                if not math.isfinite(values[0]):
                    raise NonFiniteLossError(self._explain(f"the loss is {values[0]}", seen[-1:]))
                (loss * share).backward()
            log.add(dict(zip(("loss", *terms), values, strict=True)), share)
            if self._mining.strength > 0:
                self._difficulty.update(batch.key, difficulty.tolist(), self._progress.step)
        norm = nn.utils.clip_grad_norm_(self._trained, self._optimizer_config.clip_norm).item()
        if not math.isfinite(norm):
            raise NonFiniteLossError(self._explain(f"the gradient's norm is {norm}", seen))
        self._optimizer.step()
        self._ema.update_parameters(self.student)
        self._progress.step += 1
        self._left -= 1
        log.add({"learning_rate": rate}, 1.0)
        log.steps += 1

    def _unsynchronised(self) -> AbstractContextManager[None]:
        """Within it gradients stay on their worker."""
        return self._loss.no_sync() if isinstance(self._loss, DistributedDataParallel) else nullcontext()

    def _explain(self, what: str, seen: Sequence[tuple[Sample, list[bool]]]) -> str:
        """Names the images of some batches of which the loss or its gradient is no number."""
        keys = [key for batch, _ in seen for key in batch.key]
        guilty = []
        for batch, refinements in seen:
            for index, key in enumerate(batch.key):
                image = batch.image_at(index).to(self._device)
                generator = seeded_generator((0,), self._device)
                alone = self._local_loss(image, refinements, generator, self._autocast)[0]
                # Not backward(), at which other workers would take these gradients for their step's.
                gradients = torch.autograd.grad(alone, self._trained, allow_unused=True)
                norm = nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
                if not math.isfinite(alone.item() + norm.item()):
                    guilty.append(key)
        where = ", ".join(guilty or keys)
        if len(guilty) in (0, len(keys)):
            cause = "Not one image alone is at fault"
            remedy = "lower --optimizer.learning-rate, or train with --trainer.precision fp32"
        else:
            cause = f"{len(guilty)} of {len(keys)} images are at fault"
            remedy = "look at these rows, and delete their shards to have pipelines/cache_teacher.py make them anew"
        return (
            f"{what} at step {self._progress.step}, on {where}. {cause}: {remedy}. "
            "No weights were changed, and no checkpoint was written since the last good one."
        )

    def _write_log(self, log: _Log) -> None:
        progress = {
            "step": self._progress.step,
            "total_steps": self._progress.step + self._left,
            "epoch": self._progress.epoch,
        }
        images_per_step = self.config.batch_size * self.config.accumulate_batches * self._world_size
        self._on_log({**progress, **log.take(images_per_step)})

    def _checkpoint(self) -> None:
        self._share_difficulty()
        scores: dict[str, float] = {}
        if self._rank == 0:
            if self._validation:
                averaged = copy.deepcopy(self.averaged_student).eval()
                found = validate(averaged, (batch.to(self._device) for batch in self._validation), self._autocast)
                scores = {f"val_{name}": value for name, value in found.items()}
                self._on_log({"step": self._progress.step, "epoch": self._progress.epoch, **scores})
                score = (found["box"] + found["click"]) / 2
                if math.isfinite(score) and score > (self._progress.best_score or -math.inf):
                    self._progress.best_score = score
                    save_best(self._checkpoints_url, averaged, scores)
            save_progress(self._checkpoints_url, self._progress, self._state, self._difficulty, self._weights)
        self._on_checkpoint({"step": self._progress.step, **scores})

    def _share_difficulty(self) -> None:
        """Makes all workers know what each of them has found out about its images."""
        if self._mining.strength > 0 and self._world_size > 1:
            tables: list[dict[str, tuple[float, int]]] = [{} for _ in range(self._world_size)]
            dist.all_gather_object(tables, self._difficulty.values)
            self._difficulty.merge(tables)

    def _agreed(self, opinion: bool) -> bool:
        """What rank 0 thinks."""
        if self._world_size == 1:
            return opinion
        flag = torch.tensor([opinion], dtype=torch.uint8, device=self._device)
        dist.broadcast(flag, src=0)
        return bool(flag.item())


@dataclass(frozen=True)
class _Batches:
    loaded: Iterator[Sample]
    common: torch.Generator
    """On the CPU, in the same state on all workers."""
    own: torch.Generator
    """On the device, of this worker alone."""


@dataclass
class _Log:
    """Sums over the steps since the last line of history."""

    every_s: float
    started: float = field(default_factory=time.monotonic)
    steps: int = 0
    waited: float = 0.0
    totals: dict[str, float] = field(default_factory=dict)

    @property
    def due(self) -> bool:
        return time.monotonic() - self.started > self.every_s

    def add(self, values: dict[str, float], share: float) -> None:
        for name, value in values.items():
            self.totals[name] = self.totals.get(name, 0.0) + value * share

    def take(self, images_per_step: int) -> dict[str, float]:
        """Means a step, speed and waiting; starts anew."""
        now = time.monotonic()
        elapsed = max(now - self.started, 1e-9)
        line = {name: total / self.steps for name, total in self.totals.items()}
        line["images_per_second"] = self.steps * images_per_step / elapsed
        line["waiting_share"] = self.waited / elapsed
        self.started, self.steps, self.waited, self.totals = now, 0, 0.0, {}
        return line


def seeded_generator(seed: Sequence[int], device: str) -> torch.Generator:
    """A generator whose state depends on all of some numbers."""
    state = int(np.random.SeedSequence(list(seed)).generate_state(1)[0])
    return torch.Generator(device).manual_seed(state)
