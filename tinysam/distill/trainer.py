"""The training loop: epochs over groups of shards, checkpoints between groups. Knows torch, but no Ray."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from tinysam.distill.cache import Cache, GroupSamples, epoch_order
from tinysam.distill.losses import LossConfig
from tinysam.distill.progress import Progress, load_progress, save_progress
from tinysam.distill.prompts import PromptConfig
from tinysam.distill.samples import Sample, SampleConfig
from tinysam.distill.step import DistillationLoss
from tinysam.distill.validation import validate


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up and cosine decay. Our choice: the paper says Adam and 8 epochs, and no more."""

    learning_rate: float = 1e-3
    """At the end of the warm-up."""
    final_learning_rate: float = 1e-5
    """At the end of training."""
    warmup_steps: int = 200
    """Steps of linear warm-up."""
    weight_decay: float = 0.05
    """Of matrices and kernels; biases, scales and embeddings have none."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    ema_decay: float = 0.999
    """Of the averaged weights, which are what is validated and saved; it rises to this from 0.1."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long, how much at once, how exact."""

    epochs: int = 8
    """Passes over the cache (paper)."""
    batch_size: int = 8
    """Images a step and worker."""
    group_shards: int = 8
    """Shards that a worker mixes at once: samples are drawn across them, checkpoints lie between groups."""
    seed: int = 0
    """Of initial weights, order, crops and prompts."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of the networks; losses and optimizer are float32 in any case."""
    loader_processes: int = 1
    """Processes a worker that decode samples ahead of training."""
    log_every_s: float = 10.0
    """Seconds between lines of history."""
    checkpoint_every_s: float = 300.0
    """Seconds between checkpoints at least; one more at the end."""


class Trainer:
    """Trains a student on a cache, as one of ``world_size`` equal workers.

    Args:
        student: initial weights; trained in place.
        teacher: None for ground truth alone.
        cache: the training set.
        validation: whole-image batches to watch, or none.
        checkpoints_url: folder of resumable checkpoints; the newest is picked up.
        on_log: called on rank 0 with each line of history.
        on_checkpoint: called on every rank after each checkpoint, with the validation's scores on rank 0.
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
        validation: list[Sample],
        checkpoints_url: str,
        on_log: Callable[[dict[str, float]], None],
        on_checkpoint: Callable[[dict[str, float]], None],
        rank: int = 0,
        world_size: int = 1,
        device: str = "cpu",
    ) -> None:
        self.student, self.cache, self.config = student, cache, trainer
        self._optimizer_config, self._prompts, self._samples = optimizer, prompts, samples
        self._validation, self._checkpoints_url, self._on_log = validation, checkpoints_url, on_log
        self._on_checkpoint = on_checkpoint
        self._rank, self._world_size, self._device = rank, world_size, device

        loss = DistillationLoss(student, teacher, losses, prompts).to(device)
        student.image_encoder.to(memory_format=torch.channels_last)
        # A round without a mask prompt leaves the prompt encoder's mask branch out of the graph.
        self._loss: nn.Module = DistributedDataParallel(loss, find_unused_parameters=True) if world_size > 1 else loss
        self._ema = AveragedModel(student, multi_avg_fn=moving_average(optimizer.ema_decay), use_buffers=True)
        self._optimizer = torch.optim.AdamW(_parameter_groups(student, optimizer.weight_decay), fused=True)
        self._autocast = torch.autocast(device, torch.bfloat16, enabled=trainer.precision == "bf16")
        self._progress = Progress()

    @property
    def averaged_student(self) -> Sam:
        """The exponential moving average of the student's weights."""
        return self._ema.module

    def total_steps(self) -> int:
        """Steps of the whole run, the same on every worker."""
        return self.config.epochs * sum(steps for _, steps in self._groups(epoch_order(len(self.cache.shards), 0, 0)))

    def run(self) -> None:
        """Trains to the end, from the newest checkpoint on if there is one."""
        progress = load_progress(self._checkpoints_url, self.student, self.averaged_student, self._optimizer)
        if progress is not None:
            self._progress = progress
            self._ema.n_averaged.fill_(progress.step)
        total, saved_at = self.total_steps(), time.monotonic()
        while self._progress.epoch < self.config.epochs:
            order = epoch_order(len(self.cache.shards), self.config.seed, self._progress.epoch)
            remaining = order[self._progress.shards_done :]
            for group, steps in self._groups(remaining):
                self._train_group(group, steps, total)
                self._progress.shards_done += len(group)
                if time.monotonic() - saved_at > self.config.checkpoint_every_s:
                    self._checkpoint()
                    saved_at = time.monotonic()
            self._progress.epoch += 1
            self._progress.shards_done = 0
        self._checkpoint()

    def _groups(self, order: list[int]) -> Iterator[tuple[list[int], int]]:
        """Groups of shards for all workers together, and the steps that each worker makes on its part."""
        size = self.config.group_shards * self._world_size
        for start in range(0, len(order), size):
            group = order[start : start + size]
            images = sum(self.cache.shards[i].images for i in group)
            yield group, max(1, round(images / (self.config.batch_size * self._world_size)))

    def _train_group(self, group: list[int], steps: int, total: int) -> None:
        # With fewer shards than workers some share one: every worker has to make its steps.
        mine = group[self._rank :: self._world_size] or [group[self._rank % len(group)]]
        seed = [self.config.seed, self._progress.epoch, self._progress.shards_done, self._rank]
        dataset = GroupSamples(
            self.cache,
            [self.cache.shards[i].url for i in mine],
            config=self._samples,
            prompts=self._prompts.per_image,
            count=steps * self.config.batch_size,
            seed=seed,
        )
        loader = DataLoader(
            dataset,
            batch_size=self.config.batch_size,
            collate_fn=Sample.stack,
            num_workers=min(1, self.config.loader_processes),
            prefetch_factor=4 if self.config.loader_processes else None,
        )
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        self.student.train()
        started, totals, count, waited = time.monotonic(), dict[str, float](), 0, 0.0
        ready = time.monotonic()
        for batch in loader:
            waited += time.monotonic() - ready
            metrics = self._step(batch, generator, total)
            count += 1
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + value
            ready = time.monotonic()
            elapsed = ready - started
            if elapsed > self.config.log_every_s:
                self._log(totals, count, elapsed, waited, total)
                started, totals, count, waited = ready, {}, 0, 0.0
        if count:
            self._log(totals, count, max(time.monotonic() - started, 1e-9), waited, total)

    def _step(self, batch: Sample, generator: torch.Generator, total: int) -> dict[str, float]:
        rate = learning_rate(self._progress.step, total, self._optimizer_config)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        loss, metrics = self._loss(batch, generator, self._autocast)
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(
                f"the loss is {metrics['loss']} at step {self._progress.step}; nothing was overwritten since the last "
                "checkpoint. Lower --optimizer.learning-rate, or train with --trainer.precision fp32."
            )
        loss.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), self._optimizer_config.clip_norm)
        self._optimizer.step()
        self._ema.update_parameters(self.student)
        self._progress.step += 1
        return {**metrics, "learning_rate": rate}

    def _log(self, totals: dict[str, float], count: int, elapsed: float, waited: float, total: int) -> None:
        if self._rank != 0:
            return
        line = {name: value / count for name, value in totals.items()}
        images = count * self.config.batch_size * self._world_size
        self._on_log(
            {
                "step": self._progress.step,
                "total_steps": total,
                "epoch": self._progress.epoch,
                **line,
                "images_per_second": images / elapsed,
                "waiting_share": waited / elapsed,
            }
        )

    def _checkpoint(self) -> None:
        scores: dict[str, float] = {}
        if self._rank == 0:
            if self._validation:
                averaged = copy.deepcopy(self.averaged_student).eval()
                found = validate(averaged, self._validation, self._autocast)
                scores = {f"val_{name}": value for name, value in found.items()}
                self._on_log({"step": self._progress.step, "epoch": self._progress.epoch, **scores})
            save_progress(self._checkpoints_url, self._progress, self.student, self.averaged_student, self._optimizer)
        self._on_checkpoint({"step": self._progress.step, **scores})


def learning_rate(step: int, total: int, config: OptimizerConfig) -> float:
    """Linear warm-up, then half a cosine down to ``final_learning_rate``."""
    warmup = min(config.warmup_steps, total // 2)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, total - warmup)
    span = config.learning_rate - config.final_learning_rate
    return config.final_learning_rate + span * (1 + math.cos(math.pi * min(1.0, share))) / 2


def moving_average(
    decay: float,
) -> Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor], torch.Tensor | int], None]:
    """An exponential moving average whose decay rises from 0.1 to ``decay``: the first weights are soon forgotten."""

    @torch.no_grad()
    def update(
        averaged: Sequence[torch.Tensor], current: Sequence[torch.Tensor], num_averaged: torch.Tensor | int
    ) -> None:
        now = min(decay, (1 + float(num_averaged)) / (10 + float(num_averaged)))
        for mean, value in zip(averaged, current, strict=True):
            if mean.is_floating_point():
                mean.lerp_(value.to(mean.dtype), 1 - now)
            else:
                mean.copy_(value)

    return update


def _parameter_groups(student: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    decayed = [p for p in student.parameters() if p.ndim > 1]
    others = [p for p in student.parameters() if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
