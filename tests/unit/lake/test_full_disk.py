"""What a disk that runs full leaves behind."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.small_disk import on_small_disk

ROOT = Path(__file__).resolve().parents[3]

WRITE = """
import sys
sys.path.insert(0, sys.argv[1])
from tinysam.lake.filesystem import LakeError, write_once
try:
    write_once(sys.argv[2], sys.argv[3].encode() * int(sys.argv[4]))
except LakeError as error:
    sys.exit(str(error))
"""


def test_a_write_to_a_full_disk_says_so_and_leaves_what_was_there(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    file = disk / "file"

    def write(letter: str, size: int) -> list[str]:
        return [sys.executable, "-c", WRITE, str(ROOT), str(file), letter, str(size)]

    show = [sys.executable, "-c", f"import os; print(os.listdir({str(disk)!r}), open({str(file)!r}).read(3))"]
    first, second, left, third, last = on_small_disk(
        disk, 64, [write("a", 8000), write("b", 100_000), show, write("c", 30_000), show]
    )
    assert (first.returncode, first.stdout) == (0, "")
    assert (second.returncode, second.stdout) == (
        1,
        f"{file}: the disk is full. Free some space, or use another folder.\n",
    )
    assert left.stdout == "['file'] aaa\n"
    assert third.returncode == 0
    assert last.stdout == "['file'] ccc\n"
