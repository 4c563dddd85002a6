"""Training on a cluster that grows: workers join a run that goes on from its newest checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Read when ray is imported. Tests talk to a Ray of their own on loopback.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import pytest
from segment_anything.modeling import Sam

from tests.distill_cache import write_cache
from tinysam import save_checkpoint
from tinysam.distill.history import Line, read_history

ROOT = Path(__file__).resolve().parents[2]
EPOCHS, STEPS_OF_ONE, STEPS_OF_TWO = 10_000, 4 * 2, 2 * 2
"""Steps of an epoch: four shards of five rows, in batches of two images a worker."""
PATIENCE_SECONDS = 800


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_a_worker_that_finds_room_later_joins_the_run(tiny_sam: Sam, tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    student, output = str(tmp_path / "student.safetensors"), str(tmp_path / "run")
    save_checkpoint(tiny_sam, student)
    cache = write_cache(tmp_path / "cache", shards=4, embeddings=False)
    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    command = [
        *(sys.executable, "pipelines/distill.py", "--ray-address", cluster.address),
        *("--cache", cache, "--output", output, "--student", student),
        *("--num-workers", "2", "--min-workers", "1", "--cpus-per-worker", "1", "--samples.crop-size", "64"),
        *("--prompts.per-image", "2", "--prompts.max-rounds", "0", "--trainer.epochs", str(EPOCHS)),
        *("--trainer.batch-size", "2", "--trainer.group-shards", "1", "--trainer.precision", "fp32"),
        *("--trainer.loader-processes", "0", "--trainer.log-every-s", "1", "--trainer.checkpoint-every-s", "1"),
    ]
    job = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        lines = wait_for_line(job, output, lambda line: line["step"] > 5)
        assert lines[-1]["total_steps"] == EPOCHS * STEPS_OF_ONE
        cluster.add_node(**node)
        lines = wait_for_line(job, output, lambda line: line["total_steps"] < EPOCHS * STEPS_OF_ONE)
        alone, together = (
            [line for line in lines if (line["total_steps"] == EPOCHS * STEPS_OF_ONE) is is_alone]
            for is_alone in (True, False)
        )
        # It went on where one worker had been: what is left of the epochs takes half the steps from there on.
        assert 0 < together[0]["step"] <= alone[-1]["step"] + STEPS_OF_ONE
        left = together[0]["total_steps"] - together[0]["step"]
        assert left == pytest.approx((EPOCHS - together[0]["epoch"]) * STEPS_OF_TWO, abs=STEPS_OF_ONE)
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        cluster.shutdown()


def wait_for_line(job: subprocess.Popen[bytes], output: str, is_it: Callable[[Line], bool]) -> list[Line]:
    """The history as soon as its last line of training is such a one."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        assert job.poll() is None, "the job has ended"
        lines = read_history(f"{output}/history.csv")
        if lines and is_it(lines[-1]):
            return lines
        time.sleep(1)
    raise AssertionError(f"nothing of the kind in {PATIENCE_SECONDS} s")
