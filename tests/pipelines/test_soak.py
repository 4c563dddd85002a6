"""A job whose driver and workers are killed over and over, at random moments: `pytest -m soak tests/pipelines`."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from tinysam.lake.filesystem import list_files
from tinysam.verify import verify

KILLS = int(os.environ.get("TINYSAM_SOAK_KILLS", "24"))
IMAGES = 60 * KILLS
ROOT = Path(__file__).resolve().parents[2]


def start(lake: Path, output: Path, pids: Path, ray_address: str) -> subprocess.Popen[bytes]:
    script = [sys.executable, str(ROOT / "tests" / "pipelines" / "soak_job.py"), str(lake), str(output), str(pids)]
    environment = {**os.environ, "RAY_ADDRESS": ray_address, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(script, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def alive(pids: Path) -> list[int]:
    """Workers that have begun a shard and are still there."""
    return [int(path.name) for path in pids.iterdir() if Path("/proc", path.name).exists()]


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_killed_at_random_moments_a_job_loses_and_doubles_no_image(
    ray_address: str, tmp_path: Path, read_output: Callable[[str], pa.Table]
) -> None:
    lake, output, pids = tmp_path / "lake", tmp_path / "output", tmp_path / "pids"
    lake.mkdir()
    pids.mkdir()
    names = [f"{number:05d}.jpg" for number in range(IMAGES)]
    for name in names:
        (lake / name).write_bytes(b"x")
    moments = random.Random(0)
    kills: Counter[str] = Counter()
    driver = start(lake, output, pids, ray_address)
    while kills.total() < KILLS:
        before = len(list_files(str(output / "shards")))
        while driver.poll() is None and len(list_files(str(output / "shards"))) == before:
            time.sleep(0.05)  # a kill before anything was done shows nothing
        time.sleep(moments.uniform(0, 1))
        assert driver.poll() is None, f"the job ended after {kills.total()} kills with code {driver.returncode}"
        if moments.random() < 0.5 and (workers := alive(pids)):
            os.kill(moments.choice(workers), signal.SIGKILL)
            kills["worker"] += 1
        else:
            driver.kill()
            driver.wait()
            kills["driver"] += 1
            driver = start(lake, output, pids, ray_address)
    assert driver.wait() == 0
    assert read_output(str(output))["image_id"].to_pylist() == names
    result = verify(str(output))
    assert result.ok
    assert set(result.counts) <= {"ok", "crashed"}
    assert result.counts["ok"] > 0.9 * IMAGES, "images were blamed for what was done to their workers"
