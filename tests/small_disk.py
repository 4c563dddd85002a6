"""A disk of a few pages, to be full."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest


def on_small_disk(folder: Path, kib: int, commands: Sequence[Sequence[str]]) -> list[subprocess.CompletedProcess[str]]:
    """Runs commands one after the other that see a disk of ``kib`` KiB, a tmpfs of their own, mounted at ``folder``.

    It is gone with the last of them. Skips the test where users may not mount anything for themselves.
    """
    folder.mkdir(exist_ok=True)
    outputs = [folder.with_name(f"{folder.name}.{number}.txt") for number in range(len(commands))]
    mount = f"mount -t tmpfs -o size={kib}k tmpfs {shlex.quote(str(folder))} || exit 99"
    steps = [
        f"{shlex.join(command)} >{shlex.quote(str(output))} 2>&1; echo $?"
        for command, output in zip(commands, outputs, strict=True)
    ]
    namespace = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
    try:
        done = subprocess.run([*namespace, "\n".join([mount, *steps])], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    codes = done.stdout.split()
    if len(codes) < len(commands):
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    return [
        subprocess.CompletedProcess(command, int(code), output.read_text(), "")
        for command, code, output in zip(commands, codes, outputs, strict=True)
    ]
