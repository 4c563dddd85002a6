"""The simulated worker of ``benchmarks.pipelines driving``.

Alone in its file, so that 64 of its processes fit one machine: torch, which the benchmarks import, takes 300 MiB and
seconds of each.
"""

from __future__ import annotations

import os
import time
from typing import ClassVar

import pyarrow as pa

from pipelines.common.shard_worker import Placement, ShardWorker
from tinysam.lake import schema


class SleepingWorker(ShardWorker):
    """Takes a known time for each image."""

    schema: ClassVar[pa.Schema] = schema.MASKS

    def __init__(self, seconds_per_image: float, placement: Placement) -> None:
        super().__init__()
        self._seconds = seconds_per_image

    def process(self, rows: pa.Table) -> pa.Table:
        """No masks, late, and this process in the place of the image's URI."""
        with self.clock.stage("sleep"):
            time.sleep(self._seconds * rows.num_rows)
        worker = str(os.getpid())
        done = [{"image_id": name, "uri": worker, "status": schema.OK} for name in rows["image_id"].to_pylist()]
        return pa.Table.from_pylist(done, schema=self.schema)
