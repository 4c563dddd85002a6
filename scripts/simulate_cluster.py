"""How long a shard job takes on a cluster, and what it costs: a simulation of shards, lost machines and stragglers.

    python scripts/simulate_cluster.py --images 11000000 --workers 64 --seconds-per-image 0.04 --megabytes-out 2.2
    python scripts/simulate_cluster.py --tables

The second command prints the tables of cluster/SIZING.md.

What is assumed: a worker computes a shard while it writes the one before, as ``pipelines.common.shard_worker`` does on
a GPU. The times of shards are log-normal around their mean. A straggler is a shard that takes ``straggler_factor``
times as long. Machines are lost independently of each other and of their age; the shards in hand are lost with them,
and a new machine starts ``replace_seconds`` later. Two things are shared and serve one shard at a time: the driver, and
the way to the storage, whose bandwidth is a number of bytes a second for the whole cluster.
"""

from __future__ import annotations

import heapq
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import tyro

ARRIVED, READY, BEGUN, COMPUTED, WRITTEN, LOST = range(6)
"""What happens to a worker: its machine is there; it has its model; has begun a shard; has computed it; has written
one; is gone."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A job on a cluster."""

    images: int
    """Images to process."""
    workers: int
    """Workers, each on a machine that is lost alone."""
    seconds_per_image: float
    """Of one worker, reading and computing."""
    images_per_shard: int = 64
    """The job's flag."""
    megabytes_in: float = 1.0
    """Read for an image, in units of 1e6 bytes."""
    megabytes_out: float = 0.0
    """Written for an image."""
    worker_megabytes_per_second: float = 100.0
    """What one worker writes a second at most."""
    overlap: bool = True
    """Whether a worker computes while it writes; where it runs on a CPU, it does not."""
    storage_megabytes_per_second: float = math.inf
    """What the whole cluster reads and writes a second at most."""
    driver_seconds_per_shard: float = 0.002
    """For which the driver is busy with a shard."""
    load_seconds: float = 60.0
    """Until a new worker has its model."""
    spread: float = 0.2
    """Standard deviation of the logarithm of a shard's time."""
    straggler_rate: float = 0.0
    """The part of the shards that take ``straggler_factor`` times as long."""
    straggler_factor: float = 5.0
    """See ``straggler_rate``."""
    losses_per_hour: float = 0.0
    """How often one machine is taken away."""
    replace_seconds: float = 240.0
    """From a machine's loss until its successor begins to load the model."""
    seed: int = 0
    """Of all that is random."""

    def __post_init__(self) -> None:
        for name in ("images", "workers", "images_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        for name in ("worker_megabytes_per_second", "storage_megabytes_per_second", "straggler_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0")
        for option in fields(self):
            if not getattr(self, option.name) >= 0:
                raise ValueError(f"{option.name} must not be negative")
        if self.straggler_rate > 1:
            raise ValueError("straggler_rate must not be greater than 1")

    @property
    def shards(self) -> int:
        """Shards of the plan; the last one may hold fewer images."""
        return -(-self.images // self.images_per_shard)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a workload. Seconds are sums over workers unless said otherwise."""

    seconds: float
    """From the start of the machines to the last shard, by the clock."""
    written: int
    """Shards written."""
    losses: int
    """Machines lost."""
    loading: float
    """Loading the model."""
    computing: float
    """Computing shards that were written."""
    writing: float
    """Writing and waiting for the storage, with nothing to compute meanwhile."""
    wasted: float
    """Computing shards that were lost with their machine."""
    waiting: float
    """Waiting for the driver, and for the last shards of others."""
    missing: float
    """For which a lost machine had no successor yet: not paid for."""

    @property
    def worker_hours(self) -> float:
        """Hours of machines paid for."""
        return (self.loading + self.computing + self.writing + self.wasted + self.waiting) / 3600


class Shared:
    """Something that serves one request at a time, in the order in which they come."""

    def __init__(self) -> None:
        self._free = 0.0

    def serve(self, now: float, seconds: float) -> float:
        """When a request of ``now`` that takes ``seconds`` is done."""
        self._free = max(self._free, now) + seconds
        return self._free


def simulate(load: Workload) -> Outcome:
    """Runs a workload, event by event."""
    rng = np.random.default_rng(load.seed)
    sizes = np.full(load.shards, load.images_per_shard, dtype=np.float64)
    sizes[-1] = load.images - load.images_per_shard * (load.shards - 1)
    noise = rng.lognormal(-(load.spread**2) / 2, load.spread, load.shards)  # its mean is 1
    slow = np.where(rng.random(load.shards) < load.straggler_rate, load.straggler_factor, 1.0)
    compute = sizes * load.seconds_per_image * noise * slow
    moved = sizes * (load.megabytes_in + load.megabytes_out) / load.storage_megabytes_per_second
    write = sizes * load.megabytes_out / load.worker_megabytes_per_second

    driver, storage = Shared(), Shared()
    todo = list(range(load.shards - 1, -1, -1))  # from the end: pop() takes the first, and a lost one comes next
    events: list[tuple[float, int, int]] = []
    death = [0.0] * load.workers
    in_hand: list[int | None] = [None] * load.workers  # being computed, or computed and waiting to be written
    computed = [False] * load.workers  # whether the shard in hand is
    writing: list[int | None] = [None] * load.workers
    doing = ["loading"] * load.workers
    since = [0.0] * load.workers
    spent = dict.fromkeys(("loading", "computing", "writing", "wasted", "waiting", "missing"), 0.0)
    written, losses, end = 0, 0, 0.0

    def schedule(worker: int, time: float, kind: int) -> None:
        if time <= death[worker]:  # a machine that is gone by then does nothing more
            heapq.heappush(events, (time, worker, kind))

    def begin_life(worker: int, now: float) -> None:
        lifetime = rng.exponential(3600 / load.losses_per_hour) if load.losses_per_hour else math.inf
        death[worker] = now + lifetime
        if lifetime < math.inf:
            schedule(worker, death[worker], LOST)
        schedule(worker, now + load.load_seconds, READY)

    def turn_to(worker: int, now: float, activity: str) -> None:
        spent[doing[worker]] += now - since[worker]
        doing[worker], since[worker] = activity, now

    def begin(worker: int, now: float) -> None:
        """Takes the next shard, or waits for one to come back."""
        if todo:
            in_hand[worker] = todo.pop()
            turn_to(worker, now, "waiting")
            schedule(worker, driver.serve(now, load.driver_seconds_per_shard), BEGUN)
        else:
            turn_to(worker, now, "waiting" if writing[worker] is None else "writing")

    def begin_to_write(worker: int, now: float) -> None:
        shard = in_hand[worker]
        assert shard is not None
        in_hand[worker], computed[worker], writing[worker] = None, False, shard
        schedule(worker, max(now + write[shard], storage.serve(now, moved[shard])), WRITTEN)
        if load.overlap:
            begin(worker, now)

    for worker in range(load.workers):
        begin_life(worker, 0.0)
    while written < load.shards:
        now, worker, kind = heapq.heappop(events)
        shard = in_hand[worker]
        if kind == ARRIVED:
            turn_to(worker, now, "loading")
            begin_life(worker, now)
        elif kind == READY:
            begin(worker, now)
        elif kind == BEGUN:
            assert shard is not None
            turn_to(worker, now, "computing")
            schedule(worker, now + compute[shard], COMPUTED)
        elif kind == COMPUTED:
            turn_to(worker, now, "writing")
            computed[worker] = True
            if writing[worker] is None:
                begin_to_write(worker, now)
        elif kind == WRITTEN:
            written, end = written + 1, now
            writing[worker] = None
            if computed[worker]:
                begin_to_write(worker, now)
            elif shard is None:
                begin(worker, now)
        else:
            losses += 1
            begun = 0.0  # seconds of the shard in hand
            if computed[worker]:
                begun = compute[shard]
            elif doing[worker] == "computing":
                begun = now - since[worker]
            turn_to(worker, now, "missing")
            lost = {} if shard is None else {shard: begun}
            if (other := writing[worker]) is not None:
                lost[other] = compute[other]
            for other, seconds in lost.items():
                todo.append(other)
                spent["computing"] -= seconds
                spent["wasted"] += seconds
            in_hand[worker], computed[worker], writing[worker] = None, False, None
            heapq.heappush(events, (now + load.replace_seconds, worker, ARRIVED))
            for idle in [w for w in range(load.workers) if doing[w] == "waiting" and in_hand[w] is None][: len(lost)]:
                begin(idle, now)
    for worker in range(load.workers):
        turn_to(worker, end, "waiting")
    return Outcome(seconds=end, written=written, losses=losses, **spent)


SA_1B = 11_000_000
SPOT = {"losses_per_hour": 0.05, "straggler_rate": 0.01}
CLUSTER = {"images_per_shard": 256, "storage_megabytes_per_second": 12_500.0, "driver_seconds_per_shard": 0.01}
JOBS = {
    "cache_teacher, SAM-H, fp16": {"seconds_per_image": 0.04, "megabytes_out": 2.2},
    "cache_teacher, SAM-H, int8": {"seconds_per_image": 0.04, "megabytes_out": 1.3},
    "cache_teacher, SAM-H, int6": {"seconds_per_image": 0.04, "megabytes_out": 0.9},
    "label_images": {"seconds_per_image": 0.25, "megabytes_out": 0.03},
}
"""What cluster/SIZING.md assumes, and says where each figure comes from."""


def tables() -> list[str]:
    """The tables of cluster/SIZING.md as Markdown: one a job, for SA-1B on 8, 64 and 512 GPUs."""
    found = []
    for name, costs in JOBS.items():
        lines = [
            f"| {name} | hours, arithmetic | hours, simulated | GPU-hours | of them not computing | storage, MB/s |",
            "| ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for workers in (8, 64, 512):
            load = Workload(images=SA_1B, workers=workers, **{**CLUSTER, **SPOT, **costs})
            outcome = simulate(load)
            hours = outcome.worker_hours
            idle = (outcome.wasted + outcome.waiting + outcome.writing) / 3600
            moved = load.images * (load.megabytes_in + load.megabytes_out) / outcome.seconds
            cells = (
                f"{workers} GPUs",
                f"{load.images * load.seconds_per_image / workers / 3600:.1f}",
                f"{outcome.seconds / 3600:.1f}",
                f"{hours:,.0f}",
                f"{idle / hours:.0%}",
                f"{moved:,.0f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
        found.append("\n".join(lines))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Simulates what the command line says; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--tables"]:
        sys.stdout.write("\n\n".join(tables()) + "\n")
        return 0
    load = tyro.cli(Workload, args=arguments, description=__doc__)
    outcome = simulate(load)
    parts = ("loading", "computing", "writing", "wasted", "waiting")
    split = ", ".join(f"{name} {getattr(outcome, name) / 36 / outcome.worker_hours:.1f} %" for name in parts)
    sys.stdout.write(
        f"{outcome.seconds / 3600:.2f} hours, {outcome.worker_hours:,.0f} machine-hours ({split}), "
        f"{outcome.losses} machines lost\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
