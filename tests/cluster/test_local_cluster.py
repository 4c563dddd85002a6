"""A job submitted to a cluster of several nodes by cluster/local.sh, one of which is killed while it works."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.common.local_s3 import local_s3

ROOT = Path(__file__).resolve().parents[2]
IMAGES = 12
EVERYTHING = (
    *("--everything.points-per-side", "8", "--everything.pred-iou-thresh", "0.3"),
    *("--everything.stability-score-thresh", "0.5"),
)
PATIENCE_SECONDS = 480


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for found in sockets:
        found.bind(("127.0.0.1", 0))
    ports = [found.getsockname()[1] for found in sockets]
    for found in sockets:
        found.close()
    return ports


def write_images(folder: Path) -> set[str]:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = {f"{number:03d}.jpg" for number in range(IMAGES)}
    for name in names:
        coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((320, 240), Image.Resampling.NEAREST).save(folder / name)
    return names


def kill_session(leader: int) -> int:
    """Kills every process of a session at once, as a machine that is switched off does; returns how many."""
    members = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    killed = 0
    for pid in members:
        try:
            if os.getsid(pid) == leader:
                os.kill(pid, signal.SIGKILL)
                killed += 1
        except ProcessLookupError:
            continue  # ended by itself since it was listed
    return killed


def wait_for_shards(shards: Path, count: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(list(shards.glob("*.parquet"))) < count:
        assert process.poll() is None, f"the job ended before a node was killed:\n{log.read_text()}"
        assert time.monotonic() < deadline, f"no shard was written:\n{log.read_text()}"
        time.sleep(0.1)


def start(flags: Sequence[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    gcs, dashboard = free_ports(2)
    ports = {"GCS_PORT": str(gcs), "DASHBOARD_PORT": str(dashboard)}
    with log.open("wb") as output:
        # Three nodes for two workers: a node that is lost leaves room for its worker, as an autoscaler would make it.
        return subprocess.Popen(
            ["cluster/local.sh", "pipelines/label_images.py", *flags, "--num-workers", "2", "--images-per-shard", "1"],
            cwd=ROOT,
            env=environment | ports | {"NODES": "3", "CPUS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def nodes_at_work(log: Path) -> list[int]:
    """The sessions of worker nodes that run one of the job's actors."""
    leaders = [int(pid) for pid in re.findall(r"^node-\d+: pid (\d+)$", log.read_text(), re.MULTILINE)]
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            try:
                title = (path / "cmdline").read_bytes()
                if b"MapBatches(ShardActor)" in title and os.getsid(int(path.name)) in leaders:
                    found.append(os.getsid(int(path.name)))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


@pytest.mark.slow
@pytest.mark.timeout(2 * PATIENCE_SECONDS)
def test_submitted_job_survives_the_loss_of_a_node(tmp_path: Path) -> None:
    buckets, log = tmp_path / "s3", tmp_path / "log"
    with local_s3(buckets, ["bucket"]) as server:
        names = write_images(buckets / "bucket" / "lake")
        paths = ("--lake", "s3://bucket/lake", "--output", "s3://bucket/output")
        flags = [*paths, "--student", "demo_student", *EVERYTHING]
        process = start(flags, server.over(os.environ), log)
        shards = buckets / "bucket" / "output" / "shards"
        try:
            wait_for_shards(shards, 2, process, log)
            assert kill_session(nodes_at_work(log)[0]) > 1
            at_death = len(list(shards.glob("*.parquet")))
            assert at_death < IMAGES, "the job was done before the node was killed: the test shows nothing"
            assert process.wait(PATIENCE_SECONDS) == 0, log.read_text()
        finally:
            process.terminate()
            process.wait(60)
    rows = [row for path in shards.glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    assert sorted(row["image_id"] for row in rows) == sorted(names)
    assert {row["status"] for row in rows} == {"ok"}
    assert any(row["masks"] for row in rows)
    record = json.loads((buckets / "bucket" / "output" / "run.json").read_text())
    assert record["counts"] == {"ok": IMAGES}
