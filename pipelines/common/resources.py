"""How many workers a job asks Ray for, and what each of them reserves."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.common.job_config import ShardJobConfig
from pipelines.common.ray_setup import cluster_total
from pipelines.common.shard_worker import Placement

MAX_CPUS_BESIDE_GPU = 16
"""More threads than this decode faster than any encoder takes the images."""


@dataclass(frozen=True, kw_only=True)
class WorkerResources:
    """The request to Ray."""

    num_workers: int
    """Worker processes."""
    placement: Placement
    """What each of them is told."""
    num_gpus: float
    """GPUs that each of them reserves."""

    @property
    def shards_in_hand(self) -> int:
        """Shards that a worker holds: on a GPU it computes one while it writes another. A CPU takes minutes for a shard
        and less than a second to write it, so one that waits behind another there would be better off elsewhere."""
        return 2 if self.placement.device == "cuda" else 1


def plan_workers(config: ShardJobConfig, num_shards: int) -> WorkerResources:
    """Fills in what the flags leave open, from what the running cluster has; never more workers than shards."""
    cpus, gpus = cluster_total("CPU"), cluster_total("GPU")
    device = config.device if config.device != "auto" else "cuda" if gpus else "cpu"
    num_gpus = config.num_gpus_per_worker
    if num_gpus is None:
        num_gpus = 1.0 if device == "cuda" else 0.0
    num_cpus = config.num_cpus_per_worker
    if num_cpus is None:
        # Beside a GPU, CPUs only decode, and sharing them out changes no result; on a CPU, torch's sums depend on it.
        share = int(cpus * num_gpus / gpus) if num_gpus and gpus else 1
        num_cpus = min(max(share, 1), MAX_CPUS_BESIDE_GPU)
    num_workers = config.num_workers
    if num_workers is None:
        fitting = [cpus / num_cpus, *([gpus / num_gpus] if num_gpus else [])]
        num_workers = max(1, int(min(fitting)))
    return WorkerResources(
        num_workers=min(num_workers, num_shards),
        placement=Placement(device=device, num_cpus=num_cpus),
        num_gpus=num_gpus,
    )
