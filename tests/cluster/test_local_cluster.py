"""Every pipeline submitted to a cluster of several nodes by cluster/local.sh, one of which is killed on the way."""

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

import pyarrow.parquet as pq
import pytest

from pipelines.common.local_s3 import local_s3
from tinysam.synthetic.write import SceneSet, iter_write

ROOT = Path(__file__).resolve().parents[2]
IMAGES = 12
EVERYTHING = (
    *("--everything.points-per-side", "8", "--everything.pred-iou-thresh", "0.3"),
    *("--everything.stability-score-thresh", "0.5"),
)
PATIENCE_SECONDS = 900


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for found in sockets:
        found.bind(("127.0.0.1", 0))
    ports = [found.getsockname()[1] for found in sockets]
    for found in sockets:
        found.close()
    return ports


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


def start(jobs: Sequence[Sequence[str]], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    gcs, dashboard = free_ports(2)
    ports = {"GCS_PORT": str(gcs), "DASHBOARD_PORT": str(dashboard)}
    words = [word for job in jobs for word in (*job, "--")]
    with log.open("wb") as output:
        # Three nodes for two workers: a node that is lost leaves room for its worker, as an autoscaler would make it.
        return subprocess.Popen(
            ["cluster/local.sh", *words],
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


def chain() -> list[list[str]]:
    """Every pipeline, each on what those before it have written."""
    lake, student = ("--lake", "s3://bucket/lake"), "s3://bucket/student/student.safetensors"
    small = ("--limit", str(IMAGES), "--num-workers", "2")
    return [
        [
            *("pipelines/cache_teacher.py", *lake, "--output", "s3://bucket/cache", "--teacher", "demo_teacher"),
            *("--images-per-shard", "3", *small),
        ],
        [
            *("pipelines/distill.py", "--cache", "s3://bucket/cache", "--output", "s3://bucket/student"),
            *("--student", "demo_student", "--num-workers", "2", "--cpus-per-worker", "1", "--trainer.epochs", "1"),
            *("--trainer.batch-size", "2", "--samples.crop-size", "128", "--prompts.per-image", "2"),
        ],
        [
            *("pipelines/quantize.py", "--student", student, *lake, "--output", "s3://bucket/quantized"),
            *("--calibration-images", "2", "--held-out-images", "1"),
        ],
        [
            *("pipelines/label_images.py", *lake, "--output", "s3://bucket/masks"),
            *("--quantized", "s3://bucket/quantized", *EVERYTHING, "--images-per-shard", "1", *small),
        ],
        [
            *("pipelines/evaluate.py", "--checkpoints", student, "s3://bucket/quantized", *lake),
            *("--output", "s3://bucket/scores", "--tasks", "box", "--images-per-shard", "3", *small),
        ],
    ]


@pytest.mark.slow
@pytest.mark.timeout(2 * PATIENCE_SECONDS)
def test_every_pipeline_is_submitted_and_outlives_the_loss_of_a_node(tmp_path: Path) -> None:
    bucket, log = tmp_path / "s3" / "bucket", tmp_path / "log"
    with local_s3(bucket.parent, [bucket.name]) as server:
        list(iter_write(SceneSet(output=str(bucket / "lake"), count=IMAGES, height=240, width=320)))
        process = start(chain(), server.over(os.environ), log)
        shards = bucket / "masks" / "shards"
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
    assert sorted(row["image_id"] for row in rows) == [f"scene-{number:05d}.jpg" for number in range(IMAGES)]
    assert {row["status"] for row in rows} == {"ok"}
    assert any(row["masks"] for row in rows)
    for job in ("cache", "masks", "scores"):
        assert json.loads((bucket / job / "run.json").read_text())["counts"] == {"ok": IMAGES}
    scores = json.loads((bucket / "scores" / "results.json").read_text())
    assert len(next(iter(scores["datasets"].values()))["checkpoints"]) == 2
