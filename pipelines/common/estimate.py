"""How long a job would take, from a few of its images processed on this machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines.common.job_config import ShardJobConfig
from pipelines.common.shard_worker import Placement, ShardWorker
from tinysam.lake.plan import Shard
from tinysam.lake.shards import serialize


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a sample says about all images that are to do."""

    images: int
    """Images to do."""
    sample: int
    """Images that were processed and timed."""
    seconds_per_image: float
    """Of one worker, writing left out."""
    load_seconds: float
    """Until the worker was ready, its first image included."""
    bytes_out: float
    """Size of the output."""
    num_workers: int
    """Workers that ``seconds`` assumes."""
    num_gpus_per_worker: float
    """GPUs that each of them reserves."""
    device: str
    """Where the sample ran."""

    @property
    def worker_hours(self) -> float:
        """Hours of one worker."""
        return self.images * self.seconds_per_image / 3600

    @property
    def seconds(self) -> float:
        """Wall time of all workers."""
        return self.images * self.seconds_per_image / self.num_workers

    @property
    def gpu_hours(self) -> float:
        """Hours of GPUs reserved."""
        return self.worker_hours * self.num_gpus_per_worker


def measure(make_worker: Callable[[Placement], ShardWorker], config: ShardJobConfig, todo: Sequence[Shard]) -> Estimate:
    """Processes ``config.dry_run_images`` images, spread evenly over ``todo``, in this process; writes nothing."""
    device = config.device if config.device != "auto" else _device_here()
    start = time.perf_counter()
    worker = make_worker(Placement(device=device, num_cpus=config.num_cpus_per_worker or 1))
    rows = _spread(todo, config.dry_run_images)
    worker.process(rows.slice(0, 1))  # the first image pays for what is set up once
    ready = time.perf_counter()
    table = worker.process(rows)
    seconds = time.perf_counter() - ready
    gpus = config.num_gpus_per_worker
    images = sum(shard.num_rows for shard in todo)
    return Estimate(
        images=images,
        sample=rows.num_rows,
        seconds_per_image=seconds / rows.num_rows,
        load_seconds=ready - start,
        bytes_out=len(serialize(table, {})) * images / rows.num_rows,
        num_workers=config.num_workers or 1,
        num_gpus_per_worker=gpus if gpus is not None else float(device == "cuda"),
        device=device,
    )


def _spread(todo: Sequence[Shard], count: int) -> pa.Table:
    ends = np.cumsum([shard.num_rows for shard in todo])
    numbers = np.unique(np.linspace(0, ends[-1] - 1, min(count, int(ends[-1]))).astype(np.int64))
    owners = np.searchsorted(ends, numbers, side="right")
    rows = [
        todo[owner].rows.slice(number - (ends[owner] - todo[owner].num_rows), 1)
        for number, owner in zip(numbers.tolist(), owners.tolist(), strict=True)
    ]
    return pa.concat_tables(rows)


def _device_here() -> str:
    torch = sys.modules.get("torch")  # a job without a model has not loaded it
    return "cuda" if torch is not None and torch.cuda.is_available() else "cpu"
