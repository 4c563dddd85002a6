"""The jobs' own cost: planning millions of images, driving many workers, and a job against a plain loop.

    python -m benchmarks.pipelines planning --images 10000000
    python -m benchmarks.pipelines driving --workers 1 4 64
    python -m benchmarks.pipelines loop --job label_images --images 200

``planning`` cuts, writes and reads back the plan of an index that is made up, and reports seconds and the peak of the
process's memory. ``driving`` runs a job whose images take a known time, so that whatever is missing to
``workers / seconds per image`` is the job's own doing; the workers are Ray's, on as many logical CPUs as are asked for.
``loop`` runs a real job with one worker, and the same worker over the same images in a plain loop. A worker's rate
counts from its first shard to its last; the time until the job's first is reported apart. Run it on an idle machine.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.results import write_results
from benchmarks.sleeping_worker import SleepingWorker
from pipelines import cache_teacher, label_images
from pipelines.cache_teacher import CacheTeacherConfig
from pipelines.common.job_config import ShardJobConfig
from pipelines.common.ray_setup import ROOT, quiet_ray
from pipelines.common.shard_job import ShardJob
from pipelines.common.shard_worker import Placement
from pipelines.label_images import LabelImagesConfig
from tinysam.lake import schema
from tinysam.lake.plan import read_plan, todo, write_index, write_plan
from tinysam.synthetic.write import SceneSet, iter_write

INDEX_BATCH = 65_536
"""Images that are listed at a time, as ``tinysam.lake.index`` does."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What all measurements have."""

    output: Path | None = None
    """JSON file for the results."""


@dataclass(frozen=True, kw_only=True)
class Planning(Measurement):
    """Plans an index of made-up images."""

    images: int = 10_000_000
    """Rows of the index."""
    images_per_shard: int = 64
    """Rows of a shard."""


@dataclass(frozen=True, kw_only=True)
class Driving(Measurement):
    """Drives simulated workers."""

    workers: tuple[int, ...] = (1, 4, 64)
    """Numbers of workers to try. Each is a process of about 200 MB."""
    seconds_per_image: float = 0.5
    """What an image costs, as sleep; a CPU takes about as long for everything mode."""
    images_per_shard: int = 16
    """Images of a shard."""
    shards_per_worker: int = 24
    """Shards for each worker to compute: so many that all work at once for a while, however slowly they start."""


@dataclass(frozen=True, kw_only=True)
class Loop(Measurement):
    """Compares a job with a plain loop."""

    job: Literal["cache_teacher", "label_images"] = "label_images"
    """Which job, with its demo model."""
    images: int = 160
    """Synthetic scenes to process."""
    images_per_shard: int = 32
    """Images of a shard. A shard costs a job about 0.1 s, which shows where an image takes as little."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model runs."""


Benchmark = (
    Annotated[Planning, tyro.conf.subcommand("planning")]
    | Annotated[Driving, tyro.conf.subcommand("driving")]
    | Annotated[Loop, tyro.conf.subcommand("loop")]
)


def iter_index(images: int) -> Iterator[pa.RecordBatch]:
    """An index of images that are nowhere, with names and sizes as lakes have them."""
    for start in range(0, images, INDEX_BATCH):
        numbers = pa.array(np.arange(start, min(start + INDEX_BATCH, images)))
        digits = pc.utf8_lpad(pc.cast(numbers, pa.string()), 9, "0")
        names = pc.binary_join_element_wise("images/", pc.utf8_slice_codeunits(digits, 0, 5), "/", digits, ".jpg", "")
        columns = {column.name: pa.nulls(len(numbers), column.type) for column in schema.INDEX} | {
            "image_id": names,
            "uri": pc.binary_join_element_wise("s3://bucket/lake/", names, ""),
            "offset": pa.repeat(pa.scalar(0, pa.int64()), len(numbers)),
            "size": pc.add(numbers, 300_000),
        }
        yield pa.record_batch(columns, schema=schema.INDEX)


def peak_mib() -> float:
    """The most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_planning(config: Planning) -> list[dict[str, Any]]:
    """Seconds of each step, and the peak of memory after it."""
    rows = []

    def step(name: str, start: float) -> None:
        rows.append({"step": name, "seconds": time.perf_counter() - start, "peak MiB": peak_mib()})

    step("nothing yet", time.perf_counter())
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory() as output:
        start = time.perf_counter()
        plan = write_plan(Path(scratch), iter_index(config.images), images_per_shard=config.images_per_shard)
        step(f"plan of {len(plan)} shards", start)
        start = time.perf_counter()
        write_index(output, plan)
        step("index to the output", start)
        del plan
        start = time.perf_counter()
        plan = read_plan(output)
        step("a resumed run reads it", start)
        start = time.perf_counter()
        todo(plan, output)
        step("what is to do", start)
    return rows


def measure_driving(config: Driving) -> list[dict[str, Any]]:
    """Images a second for each number of workers, and how much of the possible that is."""
    rows = []
    for workers in config.workers:
        shards = workers * config.shards_per_worker
        with tempfile.TemporaryDirectory() as output, ray_with(cpus=workers):
            images = iter_index(shards * config.images_per_shard)
            write_plan(Path(output), images, images_per_shard=config.images_per_shard)
            job = ShardJob(
                name="driving",
                config=ShardJobConfig(
                    lake="s3://bucket/lake",
                    output=output,
                    images_per_shard=config.images_per_shard,
                    num_workers=workers,
                ),
                make_worker=partial(SleepingWorker, config.seconds_per_image),
                identity={},
            )
            rate = run_timed(job, Path(output), lambda rows: rows["uri"][0].as_py())
        possible = workers / config.seconds_per_image
        rows.append({"workers": workers, "possible": possible, **rate, "efficiency": rate["images/s"] / possible})
    return rows


def measure_loop(config: Loop) -> list[dict[str, Any]]:
    """Images a second of a plain loop and of the job."""
    with tempfile.TemporaryDirectory() as folder, ray_with(cpus=1):
        for _ in iter_write(SceneSet(output=f"{folder}/lake", count=config.images, seed=0)):
            pass
        output = Path(folder, "output")
        job = make_job(config, f"{folder}/lake", str(output))
        rate = run_timed(job, output, lambda rows: "the only one")
        plan = read_plan(str(output))
        torch.set_num_threads(1)  # as Ray sets it for a worker of one CPU
        worker = job.make_worker(Placement(device=config.device, num_cpus=1))
        worker.process(plan[0].rows)
        start = time.perf_counter()
        for shard in plan[1:]:
            worker.process(shard.rows)
        plain = (config.images - plan[0].num_rows) / (time.perf_counter() - start)
    loop = {"variant": "plain loop", "images/s": plain, "to the first shard, s": 0.0, "share": 1.0}
    return [loop, {"variant": config.job, **rate, "share": rate["images/s"] / plain}]


def make_job(config: Loop, lake: str, output: str) -> ShardJob:
    """The job with its demo model and one worker."""
    common: Mapping[str, Any] = {
        "lake": lake,
        "output": output,
        "images_per_shard": config.images_per_shard,
        "num_workers": 1,
        "num_cpus_per_worker": 1,
        "device": config.device,
    }
    if config.job == "cache_teacher":
        return cache_teacher.job(CacheTeacherConfig(teacher="demo_teacher", **common))
    return label_images.job(LabelImagesConfig(student="demo_student", **common))


def run_timed(job: ShardJob, output: Path, worker_of: Callable[[pa.Table], str]) -> dict[str, float]:
    """Runs a job; the sum of its workers' rates, each from its first shard to its last, and the time until the first.

    Workers do not start together, so that no shorter stretch would do all of them justice.

    Args:
        job: With an output on the local disk.
        output: Its output.
        worker_of: Tells from a shard's rows which worker made it.
    """
    started = time.time()
    job.run()
    shards: dict[str, list[tuple[float, int]]] = {}
    for path in (output / "shards").iterdir():
        rows = pq.read_table(path, columns=["uri"])
        shards.setdefault(worker_of(rows), []).append((path.stat().st_mtime, rows.num_rows))
    rates = []
    for worker, made in shards.items():
        (first, _), *rest = sorted(made)
        if not rest:
            raise SystemExit(f"worker {worker} made one shard only, which shows no rate: give more shards")
        rates.append(sum(images for _, images in rest) / (rest[-1][0] - first))
    first_of_all = min(time_ for made in shards.values() for time_, _ in made)
    return {"images/s": sum(rates), "to the first shard, s": first_of_all - started}


@contextmanager
def ray_with(cpus: int) -> Iterator[None]:
    """A Ray on this machine that believes in so many CPUs."""
    environment = {"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}}
    ray.init(
        "local",  # and not one that runs here already
        num_cpus=cpus,
        include_dashboard=False,
        logging_level="error",
        log_to_driver=False,
        runtime_env=environment,
    )
    quiet_ray()
    try:
        yield
    finally:
        ray.shutdown()


def main() -> None:
    """Measures, prints a table, and writes the results."""
    config: Planning | Driving | Loop = tyro.cli(Benchmark, description=__doc__)  # type: ignore[arg-type]
    if isinstance(config, Planning):
        rows = measure_planning(config)
    elif isinstance(config, Driving):
        rows = measure_driving(config)
    else:
        rows = measure_loop(config)
    options = {name: value for name, value in asdict(config).items() if name != "output"}
    table = Table(title=json.dumps(options))
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=max(Console().width, 110)).print(table)
    if config.output is not None:
        write_results(config.output, config, rows)


if __name__ == "__main__":
    sys.exit(main())
