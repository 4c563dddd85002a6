"""scripts/simulate_cluster.py against a real job whose images take a known time."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from benchmarks import pipelines as benchmark
from benchmarks.pipelines import iter_index, run_timed
from pipelines.common.job_config import ShardJobConfig
from pipelines.common.shard_job import ShardJob
from tests.unit.scripts.test_simulate_cluster import simulator
from tinysam.lake.plan import write_plan

SECONDS_PER_IMAGE, IMAGES_PER_SHARD, SHARDS, WORKERS = 1.0, 4, 20, 2


@pytest.mark.usefixtures("ray_address")
def test_a_real_job_is_as_fast_as_the_simulation_says(tmp_path: Path) -> None:
    images = SHARDS * IMAGES_PER_SHARD
    write_plan(tmp_path, iter_index(images), images_per_shard=IMAGES_PER_SHARD)
    job = ShardJob(
        name="simulation",
        config=ShardJobConfig(
            lake="s3://bucket/lake", output=str(tmp_path), images_per_shard=IMAGES_PER_SHARD, num_workers=WORKERS
        ),
        make_worker=partial(benchmark.SleepingWorker, SECONDS_PER_IMAGE),
        identity={},
    )
    real = run_timed(job, tmp_path, lambda rows: rows["uri"][0].as_py())["images/s"]
    load = simulator.Workload(
        images=images,
        workers=WORKERS,
        seconds_per_image=SECONDS_PER_IMAGE,
        images_per_shard=IMAGES_PER_SHARD,
        overlap=False,
        spread=0.0,
        load_seconds=0.0,
    )
    assert real == pytest.approx(images / simulator.simulate(load).seconds, rel=0.15)
