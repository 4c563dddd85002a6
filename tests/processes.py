"""Processes that tests look at and kill."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def ray_processes(name: str) -> list[int]:
    """Process ids of the workers that this process's Ray runs and whose title holds ``name``, such as a class's.

    Other Rays on the machine are left alone.
    """
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
            pid = int(entry.name)
            title = (entry / "cmdline").read_bytes()
            if title.startswith(b"ray::") and name.encode() in title and _parent(_parent(pid)) == os.getpid():
                found.append(pid)
    return found


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
