"""The part of a shard job that runs on the workers."""

from __future__ import annotations

import json
import logging
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa
import ray

from pipelines.common.attempts import MAX_ATTEMPTS
from pipelines.common.timing import StageClock
from tinysam.lake import schema
from tinysam.lake.filesystem import join
from tinysam.lake.shards import SHARDS_FOLDER, write_shard

logger = logging.getLogger(__name__)

COUNTS_KEY = "counts"
"""Key of a shard's metadata: JSON of its images by status, so that a resumed run can count without reading rows."""

SHARD_COLUMN = "rows"
"""What goes from the driver to a worker: one column, one value, the packed index rows of a shard."""

RESULT = pa.schema(
    [
        pa.field("shard_id", pa.string()),
        pa.field("bytes_read", pa.int64()),
        pa.field("failure", pa.string()),  # why the shard was not written; null where it was, and the rest is there
        pa.field("counts", pa.string()),  # JSON, images by status
        pa.field("time_split", pa.string()),  # JSON, seconds by stage
    ]
)
"""What comes back to the driver from one shard."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a worker finds itself."""

    device: str
    """"cpu" or "cuda"."""
    num_cpus: int
    """CPUs that it has reserved, and so the threads that it may keep busy."""


class ShardWorker(ABC):
    """What a job does with the images of one shard. Built once in each worker process, so it can hold a model.

    Results must depend on the rows and the configuration alone: then a shard's bytes are the same whoever computes it
    and however often, which is what makes a retry harmless.
    """

    schema: ClassVar[pa.Schema]
    """Schema of the table that ``process`` returns; it has a ``status`` column."""

    def __init__(self) -> None:
        self.clock = StageClock()
        """``with self.clock.stage("decode"):`` makes a stage appear in the job's time split."""

    def metadata(self) -> dict[str, str]:
        """Facts about the model that every shard's file metadata repeats."""
        return {}

    @abstractmethod
    def process(self, rows: pa.Table) -> pa.Table:
        """Turns the index rows of a shard (``tinysam.lake.schema.INDEX``) into its results, in the same order.

        An image that cannot be processed is a row with a status; an exception fails the whole shard and is for causes
        that no image is to blame for.
        """


def pack_rows(rows: pa.Table) -> bytes:
    """A shard's index rows as one value, so that one item of Ray Data is one shard."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    return sink.getvalue().to_pybytes()


class ShardActor:
    """The callable that Ray Data keeps alive in each worker: a packed shard in, a ``RESULT`` row out."""

    def __init__(
        self,
        make_worker: Callable[[Placement], ShardWorker],
        placement: Placement,
        output: str,
        attempts: ray.actor.ActorHandle,
    ) -> None:
        self._make_worker, self._placement, self._output, self._attempts = make_worker, placement, output, attempts
        self._worker: ShardWorker | None = None

    def __call__(self, item: pa.Table) -> pa.Table:
        rows = pa.ipc.open_stream(item[SHARD_COLUMN][0].as_buffer()).read_all()
        shard_id = rows["shard_id"][0].as_py()
        result: dict[str, Any] = {
            "shard_id": shard_id,
            "bytes_read": sum(size for size in rows["size"].to_pylist() if size > 0),
        }
        try:
            if ray.get(self._attempts.begin.remote(shard_id)) > MAX_ATTEMPTS:
                result["failure"] = (
                    f"its worker died {MAX_ATTEMPTS} times: out of memory (fewer workers, a smaller --batch-size or "
                    "more --num-cpus-per-worker leave more for each), or an image that crashes the decoder"
                )
            else:
                counts, split = self._run(shard_id, rows)
                result |= {"counts": json.dumps(counts), "time_split": json.dumps(split)}
        except Exception as error:
            # The boundary of the worker: the driver reports the failure, and the other shards go on.
            logger.exception("shard %s failed", shard_id)
            result["failure"] = f"{type(error).__name__}: {error}"
        return pa.Table.from_pylist([result], schema=RESULT)

    def _run(self, shard_id: str, rows: pa.Table) -> tuple[dict[str, int], dict[str, float]]:
        start = time.perf_counter()
        loading = {}
        if self._worker is None:
            # Not in __init__: a model that cannot be loaded would make Ray restart the actor for ever.
            self._worker = self._make_worker(self._placement)
            loading = {"load": time.perf_counter() - start}
            self._fix_threads()
        worker = self._worker
        table = worker.process(rows)
        if not table.schema.equals(worker.schema) or table.num_rows != rows.num_rows:
            raise TypeError(f"{type(worker).__name__}.process must return one row of its schema for each image")
        counts = dict(sorted(Counter(table["status"].to_pylist()).items()))
        metadata = {
            "schema_version": str(schema.SCHEMA_VERSION),
            COUNTS_KEY: json.dumps(counts),
            **worker.metadata(),
        }
        with worker.clock.stage("write"):
            write_shard(join(self._output, SHARDS_FOLDER), shard_id, table, metadata)
        return counts, loading | worker.clock.take()

    def _fix_threads(self) -> None:
        # Sums depend on how many threads share them, and Ray's own choice depends on the machine. A job without a
        # model need not load torch for it.
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(self._placement.num_cpus)
