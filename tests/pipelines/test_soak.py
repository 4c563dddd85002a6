"""Jobs whose processes are killed over and over, at random moments: `make soak`."""

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

from tests.processes import ray_processes
from tinysam.lake.filesystem import list_files
from tinysam.verify import verify

KILLS = int(os.environ.get("TINYSAM_SOAK_KILLS", "24"))
IMAGES = 480
"""Of one job, four in a shard. A kill costs it a few shards; where it ends before enough were done, another begins."""

VICTIMS = {"driver": 5, "MapWorker": 4, "Ledger": 1}
"""What is killed, and how often."""
AT_ONCE = 0.25
"""Share of drivers that are killed while they start, before they did anything."""

ROOT = Path(__file__).resolve().parents[2]


class SoakedJob:
    """A job in processes that can be killed; its driver is started again when it dies."""

    def __init__(self, lake: Path, output: Path, ray_address: str, log: Path) -> None:
        script = [sys.executable, str(ROOT / "tests" / "pipelines" / "soak_job.py"), str(lake), str(output)]
        environment = {**os.environ, "RAY_ADDRESS": ray_address, "PYTHONPATH": str(ROOT)}
        self._output, self._log = output, log

        def start() -> subprocess.Popen[bytes]:
            with log.open("ab") as errors:
                return subprocess.Popen(script, env=environment, stderr=errors, stdout=subprocess.DEVNULL)

        self._start = start
        self.driver = start()

    def shards(self) -> int:
        """Shards written so far."""
        return len(list_files(str(self._output / "shards")))

    def ended(self) -> bool:
        """Whether it is done; it may not end in any other way."""
        code = self.driver.poll()
        assert code in (None, 0), f"the job ended with code {code}:\n{self._log.read_text()[-3000:]}"
        return code == 0

    def wait_for_a_shard(self) -> None:
        """Waits until one more is written, or the job ends."""
        before = self.shards()
        while not self.ended() and self.shards() == before:
            time.sleep(0.05)

    def kill(self, victim: str, moments: random.Random) -> bool:
        """Kills the driver or one of the other processes; tells whether there was one."""
        if victim == "driver":
            self.driver.kill()
            killed = self.driver.wait() == -signal.SIGKILL
            if killed:
                self.driver = self._start()
            return killed
        found = ray_processes(victim)
        if found:
            os.kill(moments.choice(found), signal.SIGKILL)
        return bool(found)


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    folder = tmp_path / "lake"
    folder.mkdir()
    return folder


def fill(lake: Path, images: int) -> list[str]:
    """Makes so many images, which nobody looks at; returns their names."""
    names = [f"{number:05d}.jpg" for number in range(images)]
    for name in names:
        (lake / name).write_bytes(b"x")
    return names


@pytest.mark.starts_ray_in_make_test
def test_a_job_outlives_its_driver_its_workers_and_its_ledger(
    lake: Path, ray_address: str, tmp_path: Path, read_output: Callable[[str], pa.Table]
) -> None:
    names, output = fill(lake, 60), tmp_path / "output"
    job = SoakedJob(lake, output, ray_address, tmp_path / "log")
    for victim in ("MapWorker", "Ledger", "driver"):
        job.wait_for_a_shard()
        assert job.kill(victim, random.Random(0)), f"the job ended before its {victim} was killed"
    while not job.ended():
        time.sleep(0.05)
    assert read_output(str(output))["image_id"].to_pylist() == names
    assert verify(str(output)).counts == {"ok": 60}


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_killed_at_random_moments_jobs_lose_and_double_no_image(
    lake: Path,
    ray_address: str,
    tmp_path: Path,
    read_output: Callable[[str], pa.Table],
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = fill(lake, IMAGES)
    moments = random.Random(0)
    kills: Counter[str] = Counter()
    jobs = 0
    began = time.monotonic()
    while kills.total() < KILLS:
        jobs += 1
        output = tmp_path / f"output-{jobs}"
        job = SoakedJob(lake, output, ray_address, tmp_path / f"log-{jobs}")
        started = time.monotonic()
        job.wait_for_a_shard()
        start_up = time.monotonic() - started
        while not job.ended():
            if kills.total() < KILLS:
                time.sleep(moments.uniform(0, 1))
                [victim] = moments.choices(list(VICTIMS), list(VICTIMS.values()))
                if job.kill(victim, moments):
                    kills[victim] += 1
                    if victim == "driver" and moments.random() < AT_ONCE and kills.total() < KILLS:
                        time.sleep(moments.uniform(0, start_up))
                        kills["starting driver"] += job.kill("driver", moments)
                    with capsys.disabled():
                        print(f"{time.monotonic() - began:6.0f} s, job {jobs}, {job.shards()} shards, {dict(kills)}")
            job.wait_for_a_shard()  # a kill that nothing was done since shows nothing
        assert read_output(str(output))["image_id"].to_pylist() == names
        result = verify(str(output))
        assert result.ok
        assert set(result.counts) <= {"ok", "crashed"}
        assert result.counts["ok"] > 0.9 * IMAGES, "images were blamed for what was done to their workers"
