"""Workers of a training run without Ray: processes that torch connects."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from pipelines.distill import NO_TEACHER, DistillConfig, train
from tinysam.distill.cache import open_cache


class StoppedError(Exception):
    """Stands for the worker's death."""


def _work(rank: int, workers: int, meeting: Path, config: DistillConfig, last_step: int) -> None:
    def stop(scores: dict[str, float]) -> None:
        if scores["step"] >= last_step:
            raise StoppedError

    dist.init_process_group("gloo", init_method=meeting.as_uri(), rank=rank, world_size=workers)
    try:
        train(
            config,
            open_cache(config.cache),
            NO_TEACHER,
            device="cpu",
            rank=rank,
            world_size=workers,
            on_checkpoint=stop,
        )
    except StoppedError:
        dist.destroy_process_group()
    else:
        raise AssertionError(f"the run ended before step {last_step}")


def train_until(last_step: int, config: DistillConfig, *, workers: int, meeting: Path) -> None:
    """Trains on ground truth until the checkpoint of a step is written.

    Args:
        meeting: a file of this run alone, through which the workers find each other.
    """
    torch.multiprocessing.spawn(_work, (workers, meeting, config, last_step), nprocs=workers)
