"""Progress, the clock of stages, and the resources that a job asks for."""

from __future__ import annotations

import io
import threading
import time
from collections import Counter
from typing import Any

import pytest
from rich.console import Console

from pipelines.common import resources
from pipelines.common.job_config import ShardJobConfig
from pipelines.common.progress import JobProgress
from pipelines.common.result import JobResult
from pipelines.common.summary import human_bytes
from pipelines.common.timing import StageClock


def test_without_a_terminal_lines_come_in_intervals_even_while_nothing_finishes() -> None:
    text = io.StringIO()
    console = Console(file=text, width=200)
    with JobProgress("label_images", 10, console, line_every=0.02) as progress:
        deadline = time.monotonic() + 10
        while "0/10 images" not in text.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        progress.advance(4, {"ok": 3, "truncated": 1})
        while "4/10 images" not in text.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    lines = text.getvalue().splitlines()
    assert lines[0] == "label_images: 0/10 images, 0.00 images/s, 0 errors, time left unknown"
    assert "4/10 images" in lines[-1]
    assert "1 errors (1 truncated)" in lines[-1]
    assert lines[-1].endswith("left")
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_on_a_terminal_a_bar_counts_images_and_errors() -> None:
    text = io.StringIO()
    with JobProgress("label_images", 10, Console(file=text, force_terminal=True, width=200)) as progress:
        progress.advance(10, {"ok": 7, "empty": 1, "truncated": 2})
    assert "10/10" in text.getvalue()
    assert "3 errors (2 truncated, 1 empty)" in text.getvalue()


def test_the_clock_adds_up_stages_over_threads() -> None:
    clock = StageClock()

    def work() -> None:
        with clock.stage("decode"):
            time.sleep(0.01)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with pytest.raises(ValueError, match="bad"), clock.stage("read"):
        raise ValueError("bad")
    seconds = clock.take()
    assert set(seconds) == {"decode", "read"}
    assert seconds["decode"] >= 0.04
    assert clock.take() == {}


def config(**changes: Any) -> ShardJobConfig:
    return ShardJobConfig(lake="lake", output="output", **changes)


@pytest.mark.parametrize(
    ("cluster", "changes", "workers", "device", "cpus", "gpus"),
    [
        ({"CPU": 8}, {}, 8, "cpu", 1, 0),
        ({"CPU": 8}, {"num_cpus_per_worker": 3}, 2, "cpu", 3, 0),
        ({"CPU": 8}, {"num_workers": 5}, 5, "cpu", 1, 0),
        ({"CPU": 8, "GPU": 2}, {}, 2, "cuda", 4, 1),
        ({"CPU": 8, "GPU": 2}, {"num_gpus_per_worker": 0.5}, 4, "cuda", 2, 0.5),
        ({"CPU": 8, "GPU": 2}, {"device": "cpu"}, 8, "cpu", 1, 0),
        ({"CPU": 256, "GPU": 1}, {}, 1, "cuda", 16, 1),
        # An autoscaled cluster that has no GPU node yet: the flags say all that the cluster cannot.
        ({"CPU": 2}, {"device": "cuda", "num_workers": 4, "num_cpus_per_worker": 8}, 4, "cuda", 8, 1),
        ({}, {}, 1, "cpu", 1, 0),
    ],
)
def test_workers_fill_the_cluster(
    cluster: dict[str, float],
    changes: dict[str, Any],
    workers: int,
    device: str,
    cpus: int,
    gpus: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resources, "cluster_total", lambda name: cluster.get(name, 0.0))
    plan = resources.plan_workers(config(**changes), num_shards=100)
    assert (plan.num_workers, plan.placement.device, plan.placement.num_cpus) == (workers, device, cpus)
    assert plan.num_gpus == gpus
    assert resources.plan_workers(config(**changes), num_shards=1).num_workers == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"images_per_shard": 0},
        {"limit": 0},
        {"num_workers": 0},
        {"num_cpus_per_worker": 0},
        {"num_gpus_per_worker": -1.0},
        {"max_error_rate": 1.5},
        {"dry_run_images": -1},
        {"update": True, "limit": 5},
        {"overwrite": True, "update": True},
        {"overwrite": True, "retry_failed": True},
    ],
)
def test_flags_out_of_range_are_refused_by_name(changes: dict[str, Any]) -> None:
    flag = "--" + next(iter(changes)).replace("_", "-")
    with pytest.raises(ValueError, match=flag):
        config(**changes)


@pytest.mark.parametrize(("errors", "limit", "code"), [(0, 0.0, 0), (5, 0.05, 0), (6, 0.05, 3), (100, 1.0, 0)])
def test_the_exit_code_follows_the_error_rate(errors: int, limit: float, code: int) -> None:
    result = JobResult(shards=1, shards_before=0, counts=Counter(ok=100 - errors, truncated=errors))
    assert result.exit_code(limit) == code


def test_failed_shards_are_an_error_whatever_the_rate() -> None:
    result = JobResult(shards=2, shards_before=0, counts=Counter(ok=10), failures={"shard-1": "out of memory"})
    assert result.exit_code(1.0) == 1


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 * 2**40, "5.0 TiB")])
def test_bytes_are_readable(count: int, text: str) -> None:
    assert human_bytes(count) == text
