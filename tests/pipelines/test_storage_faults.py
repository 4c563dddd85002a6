"""Storage that fails as real storage does, between the project and a real S3 server."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.pipelines.fault_proxy import Fault, FaultProxy, fault_proxy
from tinysam.lake import patience
from tinysam.lake.filesystem import (
    LakeError,
    TransientError,
    join,
    list_files,
    open_filesystem,
    read_bytes,
    write_once,
)
from tinysam.lake.index import read_image_bytes
from tinysam.lake.patience import patiently
from tinysam.verify import verify

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def proxy(s3: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy through which all S3 requests of this process, and of those that it starts, go."""
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.endpoint)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # botocore's own retries would hide most faults from us
        monkeypatch.setattr(patience, "FIRST_WAIT", 0.01)
        yield running


def times(count: int, fault: Fault, method: str = "GET") -> Callable[[str, str, int], Fault | None]:
    """The first so many requests of a method fail."""
    left = [count]

    def choose(found: str, path: str, number: int) -> Fault | None:
        if found != method or left[0] == 0:
            return None
        left[0] -= 1
        return fault

    return choose


OVERLOAD = {
    "500": Fault(status=500, code="InternalError"),
    "502": Fault(status=502, code="502"),
    "503": Fault(status=503, code="ServiceUnavailable"),
    "slow down": Fault(status=503, code="SlowDown"),
    "cut off": Fault(cut_after=10),
    "cut off at once": Fault(cut_after=0),
}


@pytest.mark.parametrize("case", OVERLOAD)
def test_reads_outlast_an_outage_of_a_few_requests(case: str, proxy: FaultProxy) -> None:
    url, data = f"s3://tests/outage/{case}.bin", os.urandom(100_000)
    write_once(url, data)
    proxy.choose = times(3, OVERLOAD[case])
    row = {"uri": url, "offset": 0, "size": len(data)}
    assert read_image_bytes(row) == data
    assert proxy.faults == 3


@pytest.mark.parametrize("case", OVERLOAD)
def test_an_outage_that_lasts_is_the_storages_fault_and_not_the_images(
    case: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://tests/lasting/{case}.bin"
    write_once(url, bytes(1000))
    proxy.choose = times(10**6, OVERLOAD[case])
    monkeypatch.setattr(patience, "ATTEMPTS", 2)
    with pytest.raises(TransientError, match="s3://tests/lasting") as error:
        patiently(lambda: read_bytes(url), attempts=2, first_wait=0.01)
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(error.value)


@pytest.mark.parametrize("case", ["500", "503", "slow down"])
def test_writes_outlast_an_outage_and_are_whole(case: str, proxy: FaultProxy) -> None:
    url, data = f"s3://tests/writes/{case}.bin", os.urandom(50_000)
    proxy.choose = times(2, OVERLOAD[case], "PUT")
    patiently(lambda: write_once(url, data), first_wait=0.01)
    proxy.choose = lambda method, path, number: None
    assert read_bytes(url) == data


def test_a_write_whose_answer_is_lost_is_written_again_to_the_same_bytes(proxy: FaultProxy) -> None:
    url, data = "s3://tests/writes/lost.bin", os.urandom(5000)
    proxy.choose = times(1, Fault(cut_after=0), "PUT")
    patiently(lambda: write_once(url, data), first_wait=0.01)
    assert read_bytes(url) == data
    assert len(list_files("s3://tests/writes", "lost*")) == 1


def test_a_slow_answer_is_waited_for(proxy: FaultProxy) -> None:
    url = "s3://tests/slow.bin"
    write_once(url, b"x" * 1000)
    proxy.choose = times(1, Fault(delay=1.5))
    start = time.monotonic()
    assert read_bytes(url) == b"x" * 1000
    assert time.monotonic() - start > 1.4


def test_a_missing_object_and_denied_access_are_not_tried_again(proxy: FaultProxy) -> None:
    open_filesystem("s3://tests/warm")
    before = len(proxy.requests)
    with pytest.raises(LakeError, match="does not exist"):
        patiently(lambda: read_bytes("s3://tests/absent.bin"))
    write_once("s3://tests/there.bin", b"x")
    proxy.choose = times(10**6, Fault(status=403, code="ExpiredToken"))
    with pytest.raises(LakeError, match="AWS_SECRET_ACCESS_KEY") as error:
        patiently(lambda: read_bytes("s3://tests/there.bin"))
    assert not isinstance(error.value, TransientError)
    assert len(proxy.requests) - before < 12


def run_job(lake: str, output: str) -> subprocess.CompletedProcess[str]:
    """The cheapest real job, with a Ray of its own: workers have the environment that Ray was started with."""
    args = ["--lake", lake, "--output", output, "--teacher", "none", "--image-size", "64"]
    args += ["--images-per-shard", "2", "--num-workers", "1", "--max-error-rate", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    script = [sys.executable, str(ROOT / "pipelines" / "cache_teacher.py")]
    return subprocess.run([*script, *args], env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_over_storage_that_fails_now_and_then_loses_and_doubles_nothing(
    proxy: FaultProxy,
    s3: Any,
    make_lake: Callable[[Path, int], Path],
    read_output: Callable[[str], pa.Table],
    tmp_path: Path,
) -> None:
    lake = s3.upload(make_lake(tmp_path, 12), "faulty/lake")
    kinds = list(OVERLOAD.values())
    hit = itertools.count()

    def choose(method: str, path: str, number: int) -> Fault | None:
        # The driver's own requests are left alone: a person sees their errors, and starts the job again.
        is_work = (method == "GET" and path.endswith(".jpg")) or (method == "PUT" and "/shards/" in path)
        return kinds[next(hit) % len(kinds)] if is_work and number % 3 == 0 else None

    proxy.choose = choose
    output = "s3://tests/faulty/output"
    job = run_job(lake, output)
    assert job.returncode == 0, job.stderr
    assert proxy.faults > 5
    rows = read_output(output)
    assert rows["image_id"].to_pylist() == [f"{number:03d}.jpg" for number in range(12)]
    assert set(rows["status"].to_pylist()) == {"ok"}
    assert verify(output).ok


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_credentials_that_expire_stop_the_job_and_new_ones_continue_it(
    proxy: FaultProxy,
    s3: Any,
    make_lake: Callable[[Path, int], Path],
    read_output: Callable[[str], pa.Table],
    tmp_path: Path,
) -> None:
    lake = s3.upload(make_lake(tmp_path, 24), "expiring/lake")
    output = "s3://tests/expiring/output"

    def choose(method: str, path: str, number: int) -> Fault | None:
        written = sum(1 for found, where in proxy.requests if found == "PUT" and "/shards/" in where)
        return Fault(status=403, code="ExpiredToken") if written >= 3 and path.endswith(".jpg") else None

    proxy.choose = choose
    job = run_job(lake, output)
    assert job.returncode == 1, job.stderr
    assert "AWS_SECRET_ACCESS_KEY" in job.stderr
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in job.stderr + job.stdout
    assert "Traceback" not in job.stderr
    done = list_files(join(output, "shards"))
    assert 3 <= len(done) < 12
    proxy.choose = lambda method, path, number: None
    job = run_job(lake, output)
    assert job.returncode == 0, job.stderr
    assert read_output(output)["image_id"].to_pylist() == [f"{number:03d}.jpg" for number in range(24)]
    assert verify(output).ok
