"""Shard jobs against a real S3 server: resume, failures, and what is refused before anything starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest

from pipelines import cache_teacher
from pipelines.common import shard_worker
from pipelines.common.cli import JobError, run_main
from pipelines.common.job_config import ShardJobConfig
from pipelines.common.ray_setup import start_ray
from pipelines.common.shard_job import ShardJob, run_jobs
from pipelines.common.shard_worker import Placement, ShardWorker
from pipelines.common.stopping import TerminatedError
from tests.pipelines.metadata_server import metadata_server
from tinysam.lake import schema
from tinysam.lake.filesystem import LakeError, join, list_files
from tinysam.lake.run_record import read_run_record
from tinysam.lake.shards import read_shard, read_shard_metadata
from tinysam.verify import verify

ROOT = Path(__file__).resolve().parents[3]


def teacher_args(lake: object, output: str, *more: str) -> list[str]:
    """The cheapest real job: no teacher, small images, two of them in a shard."""
    args = ["--lake", str(lake), "--output", output, "--teacher", "none", "--image-size", "64"]
    return [*args, "--images-per-shard", "2", *more]


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder, with its size and the time of its last change."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


class EchoWorker(ShardWorker):
    """Gives every image no masks; an image whose name says so makes it fail or die."""

    schema: ClassVar[pa.Schema] = schema.MASKS

    def __init__(self, placement: Placement) -> None:
        super().__init__()

    def process(self, rows: pa.Table) -> pa.Table:
        names = rows["image_id"].to_pylist()
        if any("fail" in name for name in names):
            raise RuntimeError("this shard cannot be done")
        if any("huge" in name for name in names):
            np.empty(1 << 60, np.uint8)
        if any("kill" in name for name in names):
            os.kill(os.getpid(), signal.SIGKILL)
        if any("slow" in name for name in names):
            time.sleep(1)
        done = [{"image_id": name, "uri": "", "status": "ok"} for name in names]
        return pa.Table.from_pylist(done, schema=self.schema)


@pytest.fixture(scope="module", autouse=True)
def _workers_need_no_tests_on_their_path() -> None:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])


def echo_job(lake: Path, output: str, **options: Any) -> ShardJob:
    options = {"images_per_shard": 1, "num_workers": 1} | options
    config = ShardJobConfig(lake=str(lake), output=output, **options)
    return ShardJob(name="echo", config=config, make_worker=EchoWorker, identity={})


def name_images(lake: Path, *names: str) -> Path:
    lake.mkdir()
    for name in names:
        (lake / f"{name}.jpg").write_bytes(b"x")
    return lake


class PatientWriter(EchoWorker):
    """Writes no shard before the next one is begun; there are two."""

    def __init__(self, placement: Placement) -> None:
        super().__init__(placement)
        self.begun = threading.Semaphore(0)
        write_shard = shard_worker.write_shard

        def write(*args: Any) -> Any:
            if not self.begun.acquire(timeout=20):
                raise RuntimeError("the next shard was not begun while this one was written")
            self.begun.release()
            return write_shard(*args)

        shard_worker.write_shard = write  # of this worker's process

    def process(self, rows: pa.Table) -> pa.Table:
        if rows["image_id"].to_pylist() == ["b.jpg"]:
            self.begun.release()
        return super().process(rows)


@pytest.mark.usefixtures("ray_address")
def test_a_worker_on_a_gpu_computes_a_shard_while_it_writes_another(tmp_path: Path) -> None:
    lake = name_images(tmp_path / "lake", "a", "b")
    job = echo_job(lake, str(tmp_path / "out"), device="cuda", num_gpus_per_worker=0)
    assert replace(job, make_worker=PatientWriter).run() == 0
    assert read_run_record(str(tmp_path / "out")).counts == {"ok": 2}


@pytest.mark.usefixtures("ray_address")
def test_a_shard_that_fails_costs_no_other_and_is_done_again_later(
    tmp_path: Path, read_output: Callable[[str], pa.Table], capsys: pytest.CaptureFixture[str]
) -> None:
    lake = name_images(tmp_path / "lake", "a", "b-fail", "c")
    output = str(tmp_path / "output")
    with pytest.raises(JobError, match=r"(?s)1 shards failed.*shard-00001-.*RuntimeError: this shard cannot be done"):
        echo_job(lake, output).run()
    assert read_output(output)["image_id"].to_pylist() == ["a.jpg", "c.jpg"]
    record = read_run_record(output)
    assert record is not None
    assert (record.counts, record.extra["finished"], record.extra["shards_failed"]) == ({"ok": 2}, False, 1)

    with pytest.raises(JobError, match="1 shards failed"):
        echo_job(lake, output).run()
    record = read_run_record(output)
    assert record is not None
    assert (record.counts, record.extra["shards_before"]) == ({"ok": 2}, 2)
    assert "2 in 3 shards" in capsys.readouterr().out


@pytest.mark.usefixtures("ray_address")
def test_a_plan_that_ray_is_given_in_parts_is_done_whole(
    tmp_path: Path, read_output: Callable[[str], pa.Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.common.shard_job.SHARDS_OF_A_WORKER_AT_ONCE", 2)
    lake = name_images(tmp_path / "lake", *"abcde")
    output = str(tmp_path / "output")
    assert echo_job(lake, output).run() == 0
    assert read_output(output)["image_id"].to_pylist() == [f"{name}.jpg" for name in "abcde"]
    record = read_run_record(output)
    assert record is not None
    assert (record.counts, record.extra["finished"]) == ({"ok": 5}, True)


class TellingWorker(EchoWorker):
    """Tells which process it lives in."""

    def metadata(self) -> dict[str, str]:
        return {"pid": str(os.getpid())}


class UnbuiltWorker(EchoWorker):
    def __init__(self, placement: Placement) -> None:
        raise RuntimeError("no such model")


@pytest.mark.usefixtures("ray_address")
def test_jobs_that_run_together_share_their_workers(tmp_path: Path, read_output: Callable[[str], pa.Table]) -> None:
    lake = name_images(tmp_path / "lake", "a", "b", "c")
    outputs = [str(tmp_path / name) for name in ("one", "two")]
    assert run_jobs("both", [replace(echo_job(lake, to), make_worker=TellingWorker) for to in outputs]) == [0, 0]
    for output in outputs:
        assert read_output(output)["image_id"].to_pylist() == ["a.jpg", "b.jpg", "c.jpg"]
        record = read_run_record(output)
        assert record is not None
        assert (record.counts, record.extra["images_this_run"], record.extra["finished"]) == ({"ok": 3}, 3, True)
    shards = [url for output in outputs for url in list_files(join(output, "shards"))]
    assert len({read_shard_metadata(url)["pid"] for url in shards}) == 1


@pytest.mark.usefixtures("ray_address")
def test_a_job_that_fails_stops_those_after_it_and_what_came_before_is_kept(
    tmp_path: Path, read_output: Callable[[str], pa.Table]
) -> None:
    lake = name_images(tmp_path / "lake", "a", "b", "c")
    outputs = [str(tmp_path / name) for name in ("one", "two", "three")]
    one, two, three = (echo_job(lake, output) for output in outputs)
    with pytest.raises(JobError, match=r"shard-.*no such model"):
        run_jobs("all", [one, replace(two, make_worker=UnbuiltWorker), three])
    records = [read_run_record(output) for output in outputs]
    assert [record is not None and record.extra["finished"] for record in records] == [True, False, False]

    before = snapshot(tmp_path / "one")
    assert run_jobs("all", [one, two, three]) == [0, 0, 0]
    assert snapshot(tmp_path / "one") == before
    for output in outputs:
        assert read_output(output)["image_id"].to_pylist() == ["a.jpg", "b.jpg", "c.jpg"]


@pytest.mark.usefixtures("ray_address")
def test_when_nothing_works_the_job_stops_at_the_first_failure(tmp_path: Path) -> None:
    lake = name_images(tmp_path / "lake", *(f"{i:02d}-fail" for i in range(30)))
    with pytest.raises(JobError, match="1 shards failed"):
        echo_job(lake, str(tmp_path / "output")).run()


@pytest.mark.usefixtures("ray_address")
def test_an_image_that_kills_or_fails_its_worker_costs_no_other(
    tmp_path: Path, read_output: Callable[[str], pa.Table]
) -> None:
    lake = name_images(tmp_path / "lake", "a", "b-kill", "c", "d", "e-fail", "f", "g-huge", "h", "i")
    output = str(tmp_path / "output")
    assert echo_job(lake, output, images_per_shard=3, max_error_rate=1.0).run() == 0
    rows = {row["image_id"]: row for row in read_output(output).to_pylist()}
    statuses = {name.removesuffix(".jpg"): row["status"] for name, row in rows.items()}
    bad = {"b-kill": "crashed", "e-fail": "failed", "g-huge": "out_of_memory"}
    assert statuses == dict.fromkeys("acdfhi", "ok") | bad
    assert "died 2 times" in rows["b-kill.jpg"]["error"]
    assert rows["e-fail.jpg"]["error"] == "RuntimeError: this shard cannot be done"
    record = read_run_record(output)
    assert record is not None
    assert record.counts == {"ok": 6, "crashed": 1, "failed": 1, "out_of_memory": 1}
    assert record.extra["finished"]


@pytest.mark.usefixtures("ray_address")
def test_only_failed_images_are_retried(tmp_path: Path, make_lake: Callable[[Path, int], Path], s3: Any) -> None:
    lake = make_lake(tmp_path / "lake", 6)
    good = (lake / "001.jpg").read_bytes()
    (lake / "001.jpg").write_bytes(good[: len(good) // 2])
    (lake / "005.jpg").write_bytes(b"")
    output = str(tmp_path / "output")
    args = teacher_args(lake, output, "--max-error-rate", "1")
    assert cache_teacher.main(args) == 0
    before = {url: read_shard(url) for url in list_files(join(output, "shards"))}
    times = snapshot(tmp_path / "output" / "shards")

    (lake / "001.jpg").write_bytes(good)
    (lake / "000.jpg").unlink()  # would be an error now, if it were looked at again
    assert cache_teacher.main([*args, "--retry-failed"]) == 0
    after = {url: read_shard(url) for url in list_files(join(output, "shards"))}
    rows = [row for url in sorted(after) for row in after[url].to_pylist()]
    assert [row["status"] for row in rows] == ["ok"] * 5 + ["empty"]
    assert rows[1]["image"] is not None
    first, second, _ = sorted(after)
    assert after[first].slice(0, 1).equals(before[first].slice(0, 1))
    assert after[second].equals(before[second])
    name = Path(second).name
    assert snapshot(tmp_path / "output" / "shards")[name] == times[name], "a shard without errors was written again"
    record = read_run_record(output)
    assert record is not None
    assert (record.counts, record.extra["images_this_run"]) == ({"ok": 5, "empty": 1}, 2)
    assert verify(output).ok


def test_a_killed_driver_run_again_loses_and_doubles_no_row(
    s3: Any,
    ray_address: str,
    make_lake: Callable[[Path, int], Path],
    read_output: Callable[[str], pa.Table],
    tmp_path: Path,
) -> None:
    images = s3.upload(make_lake(tmp_path, 60), "killed/images")
    output = "s3://tests/killed/out put"
    args = teacher_args(images, output, "--num-workers", "1")
    script = [sys.executable, str(ROOT / "pipelines" / "cache_teacher.py")]
    environment = {**os.environ, "RAY_ADDRESS": ray_address}
    # From another folder, and with the packages nowhere on the path: the script has to find them.
    environment.pop("PYTHONPATH", None)
    driver = subprocess.Popen([*script, *args], env=environment, cwd=s3.folder, stderr=subprocess.PIPE)
    shards = s3.folder / "killed" / "out put" / "shards"
    while driver.poll() is None and not any(shards.glob("*.parquet")):
        time.sleep(0.01)
    driver.kill()
    _, errors = driver.communicate()
    assert driver.returncode == -signal.SIGKILL, errors.decode()

    done = len(list_files(join(output, "shards"), "*.parquet"))
    assert 0 < done < 30
    before = snapshot(shards)
    assert cache_teacher.main(args) == 0
    rows = read_output(output)
    assert rows["image_id"].to_pylist() == [f"{number:03d}.jpg" for number in range(60)]
    assert set(rows["status"].to_pylist()) == {"ok"}
    after = snapshot(shards)
    assert {name: after[name] for name in before} == before, "finished shards were written again"
    record = read_run_record(output)
    assert record is not None
    assert record.counts == {"ok": 60}
    # A worker of the killed driver may have finished the shard that it had in hand.
    assert record.extra["shards_before"] in (done, done + 1)

    everything = snapshot(s3.folder / "killed")
    assert cache_teacher.main(args) == 0
    assert snapshot(s3.folder / "killed") == everything, "a run that has nothing to do wrote something"


def test_a_dry_run_says_what_there_is_to_do_and_writes_nothing(
    tmp_path: Path, make_lake: Callable[[Path, int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    lake = make_lake(tmp_path / "lake", 5)
    before = snapshot(tmp_path)
    assert cache_teacher.main(teacher_args(lake, str(tmp_path / "output"), "--dry-run")) == 0
    assert snapshot(tmp_path) == before
    assert not (tmp_path / "output").exists()
    size = sum(path.stat().st_size for path in lake.iterdir()) / 1024
    to_do = next(line for line in capsys.readouterr().out.splitlines() if "to do" in line)
    assert [cell.strip() for cell in to_do.strip("│ ").split("│")] == ["to do", "5", "3", f"{size:.1f} KiB"]


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, ray_address: str, make_lake: Callable[[Path, int], Path]
) -> Callable[[Path], list[str]]:
    """A function that copies a finished run of four images elsewhere and returns its command line."""
    import shutil

    folder = tmp_path_factory.mktemp("finished")
    lake = make_lake(folder / "lake", 4)
    assert cache_teacher.main(teacher_args(lake, str(folder / "output"))) == 0

    def copy(target: Path) -> list[str]:
        shutil.copytree(folder / "output", target / "output")
        return teacher_args(lake, str(target / "output"))

    return copy


def test_an_output_of_another_run_is_refused_and_left_alone(
    finished: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    args = finished(tmp_path)
    before = snapshot(tmp_path)
    for change in (["--image-size", "128"], ["--limit", "3"], ["--jpeg-quality", "80"], ["--images-per-shard", "4"]):
        with pytest.raises(LakeError, match=r"holds another run.*--overwrite"):
            cache_teacher.main([*args, *change])
    assert snapshot(tmp_path) == before


def test_other_workers_and_limits_on_errors_are_the_same_run(
    finished: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    args = finished(tmp_path)
    before = snapshot(tmp_path)
    assert cache_teacher.main([*args, "--num-workers", "3", "--batch-size", "1", "--max-error-rate", "0"]) == 0
    assert snapshot(tmp_path) == before


def test_overwrite_replaces_another_run(
    finished: Callable[[Path], list[str]], tmp_path: Path, read_output: Callable[[str], pa.Table]
) -> None:
    args = finished(tmp_path)
    assert cache_teacher.main([*args, "--limit", "3", "--overwrite"]) == 0
    output = str(tmp_path / "output")
    assert read_output(output)["image_id"].to_pylist() == ["000.jpg", "001.jpg", "002.jpg"]
    record = read_run_record(output)
    assert record is not None
    assert record.counts == {"ok": 3}


def test_a_lake_that_has_grown_is_taken_in_when_asked_and_old_shards_stay(
    finished: Callable[[Path], list[str]],
    tmp_path: Path,
    read_output: Callable[[str], pa.Table],
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = finished(tmp_path)
    lake = Path(args[args.index("--lake") + 1])
    newcomer = lake / "000-new.jpg"
    newcomer.write_bytes((lake / "000.jpg").read_bytes())
    output = tmp_path / "output"
    before = snapshot(output / "shards")
    try:
        assert cache_teacher.main(args) == 0
        assert "4 in 2 shards" in capsys.readouterr().out
        assert cache_teacher.main([*args, "--update"]) == 0
        assert "5 in 3 shards" in capsys.readouterr().out
        after = snapshot(output / "shards")
        assert {name: after[name] for name in before} == before, "old shards were written again"
        assert read_output(str(output))["image_id"].to_pylist()[-1] == "000-new.jpg"
        assert verify(str(output)).ok
        assert cache_teacher.main([*args, "--update"]) == 0
        assert cache_teacher.main(args) == 0
        assert snapshot(output / "shards") == after
    finally:
        newcomer.unlink()


@pytest.mark.usefixtures("ray_address")
@pytest.mark.parametrize("sign", ["SIGTERM", "notice"])
def test_asked_to_stop_a_job_finishes_what_is_in_hand_and_the_same_command_goes_on(
    sign: str, tmp_path: Path, read_output: Callable[[str], pa.Table]
) -> None:
    names = [f"{number:02d}-slow" for number in range(12)]
    lake = name_images(tmp_path / "lake", *names)
    output = str(tmp_path / "output")

    def stop_after_first_shard() -> None:
        while not list_files(join(output, "shards")):
            time.sleep(0.05)
        if sign == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        cloud.leaving = True

    threading.Thread(target=stop_after_first_shard, daemon=True).start()
    with metadata_server() as cloud:
        notice = {"preemption_notice": "aws", "metadata_url": cloud.url} if sign == "notice" else {}
        with pytest.raises(TerminatedError):
            echo_job(lake, output, **notice).run()
    done = len(list_files(join(output, "shards")))
    assert 0 < done < 12
    record = read_run_record(output)
    assert record is not None
    assert (record.counts, record.extra["finished"]) == ({"ok": done}, False)
    assert echo_job(lake, output).run() == 0
    assert [name.removesuffix(".jpg") for name in read_output(output)["image_id"].to_pylist()] == names


@pytest.mark.parametrize(
    ("variable", "value", "complaint"),
    [
        ("AWS_SECRET_ACCESS_KEY", "a-wrong-secret", "AWS_SECRET_ACCESS_KEY"),
        ("AWS_ACCESS_KEY_ID", "wrong", "AWS_ACCESS_KEY_ID"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9", "AWS_ENDPOINT_URL"),
    ],
)
def test_wrong_credentials_end_in_an_error_that_names_the_setting_and_hides_the_secret(
    s3: Any,
    variable: str,
    value: str,
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = s3.upload(tmp_path, "credentials")
    monkeypatch.setenv(variable, value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(SystemExit) as exit_:
        run_main(partial(cache_teacher.main, teacher_args(images, join(images, "output"))))
    assert exit_.value.code == 1
    printed = capsys.readouterr().err
    error = printed[printed.index("error: ") :]
    assert error.startswith("error: s3://tests/credentials")
    assert complaint in error
    assert "Traceback" not in printed
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in printed


def test_a_missing_bucket_is_named(s3: Any, tmp_path: Path, make_lake: Callable[[Path, int], Path]) -> None:
    with pytest.raises(LakeError, match="s3://no-such-bucket"):
        cache_teacher.main(teacher_args("s3://no-such-bucket", str(tmp_path / "output")))
    lake = make_lake(tmp_path / "lake", 1)
    with pytest.raises(LakeError, match="s3://no-such-bucket"):
        cache_teacher.main(teacher_args(lake, "s3://no-such-bucket/output"))


def test_a_missing_cluster_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def no_cluster(**options: object) -> None:
        raise ConnectionError(f"cannot reach {options['address']}")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", no_cluster)
    with pytest.raises(JobError, match=r"no Ray cluster at 127\.0\.0\.1:9.*--ray-address"):
        start_ray("127.0.0.1:9")


def test_an_empty_lake_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "lake").mkdir()
    with pytest.raises(LakeError, match="no images"):
        cache_teacher.main(teacher_args(tmp_path / "lake", str(tmp_path / "output")))


def test_every_odd_file_is_a_row_and_too_many_bad_ones_the_exit_code(
    s3: Any,
    ray_address: str,
    odd_lake: Callable[[Path], dict[str, str]],
    read_output: Callable[[str], pa.Table],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = odd_lake(tmp_path)
    output = "s3://tests/odd/output"
    args = teacher_args(s3.upload(tmp_path, "odd/lake"), output)
    assert cache_teacher.main(args) == 3
    assert "--max-error-rate" in capsys.readouterr().err
    rows = {row["image_id"]: row for row in read_output(output).to_pylist()}
    assert {name: row["status"] for name, row in rows.items()} == expected
    for row in rows.values():
        assert (row["image"] is not None) == (row["status"] == "ok")
        assert (row["error"] is None) == (row["status"] == "ok")
    record = json.loads((s3.folder / "odd" / "output" / "run.json").read_text())
    assert record["counts"] == Counter(expected.values())

    assert cache_teacher.main(args) == 3, "a rerun that has nothing to do forgot the errors"
    assert cache_teacher.main([*args, "--max-error-rate", "0.5"]) == 0
