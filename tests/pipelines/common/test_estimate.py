"""Estimates from a sample, and a dry run's tables."""

from __future__ import annotations

import time
from typing import ClassVar

import pyarrow as pa
import pytest

from pipelines.common.estimate import measure
from pipelines.common.job_config import ShardJobConfig
from pipelines.common.shard_worker import Placement, ShardWorker
from pipelines.common.summary import print_dry_run, print_estimate
from tests.plans import plan_of
from tinysam.lake import schema

SECONDS = 0.02


class TimedWorker(ShardWorker):
    """Takes a known time for each image, and longer for the first; remembers what it saw."""

    schema: ClassVar[pa.Schema] = schema.MASKS
    seen: ClassVar[list[str]] = []

    def __init__(self, placement: Placement) -> None:
        super().__init__()
        self.seen.clear()

    def process(self, rows: pa.Table) -> pa.Table:
        names = rows["image_id"].to_pylist()
        time.sleep(SECONDS * len(names) + (0 if self.seen else 0.3))
        self.seen.extend(names)
        done = [{"image_id": name, "uri": "", "status": "ok"} for name in names]
        return pa.Table.from_pylist(done, schema=self.schema)


def index_of(count: int, size: int = 1000) -> pa.Table:
    rows = [{"image_id": f"{i:03d}", "uri": f"s3://lake/{i}", "offset": 0, "size": size} for i in range(count)]
    return pa.Table.from_pylist(rows, schema=schema.INDEX)


def config(**options: object) -> ShardJobConfig:
    return ShardJobConfig(lake="lake", output="output", device="cpu", **options)  # type: ignore[arg-type]


def test_an_estimate_follows_from_images_spread_over_what_is_to_do() -> None:
    todo = plan_of(index_of(100), images_per_shard=8)[3:]
    estimate = measure(TimedWorker, config(dry_run_images=5, num_workers=4, num_gpus_per_worker=0.5), todo)
    assert TimedWorker.seen[1:] == ["024", "042", "061", "080", "099"]
    assert (estimate.images, estimate.sample) == (76, 5)
    assert estimate.load_seconds >= 0.3
    assert SECONDS <= estimate.seconds_per_image < 0.3, "what is set up once was counted for every image"
    assert estimate.seconds == pytest.approx(76 * estimate.seconds_per_image / 4)
    assert estimate.worker_hours == pytest.approx(76 * estimate.seconds_per_image / 3600)
    assert estimate.gpu_hours == pytest.approx(estimate.worker_hours / 2)
    assert estimate.bytes_out > 0


def test_a_sample_is_never_more_than_there_is() -> None:
    assert measure(TimedWorker, config(dry_run_images=50), plan_of(index_of(3), images_per_shard=2)).sample == 3


@pytest.mark.parametrize(("size", "text"), [(1024, "10.0 KiB"), (-1, "at least 0 B")])
def test_a_dry_run_says_sizes_as_far_as_they_are_known(
    size: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(index_of(10, size), images_per_shard=4)
    print_dry_run("job", config(), plan, plan)
    print_estimate(measure(TimedWorker, config(dry_run_images=2), plan))
    printed = capsys.readouterr().out
    assert text in printed
    assert "worker-hours" in printed
