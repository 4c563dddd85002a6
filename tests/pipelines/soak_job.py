"""The job that the soak test kills: it does nothing, and takes a while for it.

python tests/pipelines/soak_job.py LAKE OUTPUT
"""

from __future__ import annotations

import sys
import time
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
    """Finds no masks in any image."""

    schema: ClassVar[pa.Schema] = schema.MASKS

    def __init__(self, placement: Placement) -> None:
        super().__init__()

    def process(self, rows: pa.Table) -> pa.Table:
        """The same rows whoever makes them."""
        time.sleep(SECONDS_PER_IMAGE * rows.num_rows)
        done = [{"image_id": name, "uri": "", "status": schema.OK} for name in rows["image_id"].to_pylist()]
        return pa.Table.from_pylist(done, schema=self.schema)


def main() -> int:
    """Runs the job; returns its exit code."""
    from tests.pipelines import soak_job  # workers find classes by their module

    lake, output = sys.argv[1:]
    config = ShardJobConfig(lake=lake, output=output, images_per_shard=4, num_workers=2, max_error_rate=1.0)
    return ShardJob(name="label_images", config=config, make_worker=soak_job.SoakWorker, identity={}).run()


if __name__ == "__main__":
    run_main(main)
