"""A job whose output's disk runs full, and goes on when there is space again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from tests.small_disk import on_small_disk
from tinysam.lake.filesystem import list_files
from tinysam.verify import verify

ROOT = Path(__file__).resolve().parents[2]
DISK_KIB, FREE_KIB = 1024, 48
"""The ballast leaves room for the index, the run record and some of the shards, each of which takes a few pages."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_on_a_full_disk_stops_with_what_fits_and_goes_on_when_there_is_space(
    make_lake: Callable[[Path, int], Path],
    read_output: Callable[[str], pa.Table],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a Ray of its own, as the disk exists for the commands alone."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    lake, disk = make_lake(tmp_path / "lake", 12), tmp_path / "disk"
    output = disk / "output"
    job = [sys.executable, str(ROOT / "pipelines" / "cache_teacher.py"), "--lake", str(lake), "--output", str(output)]
    job += ["--teacher", "none", "--image-size", "64", "--images-per-shard", "1", "--num-workers", "1"]
    ballast = ["dd", "if=/dev/zero", f"of={disk / 'ballast'}", "bs=1k", f"count={DISK_KIB - FREE_KIB}"]
    save_full, save_whole = (["cp", "-r", str(output), str(tmp_path / name)] for name in ("full", "whole"))
    results = on_small_disk(disk, DISK_KIB, [ballast, job, save_full, ["rm", str(disk / "ballast")], job, save_whole])
    _, stopped, _, _, done, _ = results
    assert stopped.returncode == 1, stopped.stdout
    assert "the disk is full" in stopped.stdout
    assert "Traceback" not in stopped.stdout
    kept = list_files(str(tmp_path / "full" / "shards"))
    assert 0 < len(kept) < 12
    assert not list((tmp_path / "full" / "shards").glob(".*"))
    assert done.returncode == 0, done.stdout
    whole = str(tmp_path / "whole")
    assert read_output(whole)["image_id"].to_pylist() == [f"{number:03d}.jpg" for number in range(12)]
    assert verify(whole).ok
