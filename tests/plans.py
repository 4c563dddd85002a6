"""Plans of indexes that tests make up."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pyarrow as pa

from tinysam.lake.plan import Shard, write_plan

_SCRATCH = tempfile.TemporaryDirectory()  # for as long as the tests run: a plan reads its rows from there


def plan_of(index: pa.Table, *, images_per_shard: int) -> list[Shard]:
    """The plan of a whole index (``schema.INDEX``)."""
    return write_plan(new_folder(), index.to_batches(), images_per_shard=images_per_shard)


def new_folder() -> Path:
    """An empty folder; hypothesis repeats a test within one ``tmp_path``."""
    return Path(tempfile.mkdtemp(dir=_SCRATCH.name))
