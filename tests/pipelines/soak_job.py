"""The job that the soak test kills: it takes a while, and says which processes work on it.

python tests/pipelines/soak_job.py LAKE OUTPUT FOLDER_OF_PIDS
"""

from __future__ import annotations

import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pyarrow as pa

from pipelines.common.cli import run_main
from pipelines.common.job_config import ShardJobConfig
from pipelines.common.shard_job import ShardJob
from pipelines.common.shard_worker import Placement, ShardWorker
from tinysam.lake import schema

SECONDS_PER_IMAGE = 0.1


class SoakWorker(ShardWorker):
    """Leaves its process id in a folder, and no masks in any image."""

    schema: ClassVar[pa.Schema] = schema.MASKS

    def __init__(self, pids: str, placement: Placement) -> None:
        super().__init__()
        self._pid = Path(pids, str(os.getpid()))

    def process(self, rows: pa.Table) -> pa.Table:
        """The same rows whoever makes them."""
        self._pid.touch()
        time.sleep(SECONDS_PER_IMAGE * rows.num_rows)
        done = [{"image_id": name, "uri": "", "status": schema.OK} for name in rows["image_id"].to_pylist()]
        return pa.Table.from_pylist(done, schema=self.schema)


def main() -> int:
    """Runs the job; returns its exit code."""
    from tests.pipelines import soak_job  # workers find classes by their module

    lake, output, pids = sys.argv[1:]
    config = ShardJobConfig(lake=lake, output=output, images_per_shard=4, num_workers=2, max_error_rate=1.0)
    make_worker = partial(soak_job.SoakWorker, pids)
    return ShardJob(name="label_images", config=config, make_worker=make_worker, identity={}).run()


if __name__ == "__main__":
    run_main(main)
