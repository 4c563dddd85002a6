"""The part of a shard job that runs on the workers."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from pipelines.common.isolation import process_one_by_one
from pipelines.common.ledger import MAX_ATTEMPTS, Attempt
from pipelines.common.preemption import NoticeBoard, NoticeWatch
from pipelines.common.timing import StageClock
from tinysam.lake import schema
from tinysam.lake.filesystem import LakeError, MissingError, join, redact_url
from tinysam.lake.images import decode_image
from tinysam.lake.index import read_image_bytes
from tinysam.lake.patience import patiently
from tinysam.lake.plan import IndexReader
from tinysam.lake.shards import (
    COUNTS_KEY,
    FINGERPRINT_KEY,
    SCHEMA_VERSION_KEY,
    SHARDS_FOLDER,
    ShardError,
    read_shard,
    shard_url,
    write_shard,
)

logger = logging.getLogger(__name__)

RESULT = pa.schema(
    [
        pa.field("job", pa.int64()),  # which of those that run together
        pa.field("shard_id", pa.string()),
        pa.field("worker", pa.string()),  # which worker says this
        pa.field("stopped", pa.bool_()),  # the job is ending, and the shard was not begun; nothing below is there
        pa.field("failure", pa.string()),  # why the shard was not written; null where it was, and the rest is there
        pa.field("images", pa.int64()),  # processed now; less than the shard's where only failed ones were
        pa.field("bytes_read", pa.int64()),
        pa.field("seconds", pa.float64()),
        pa.field("counts", pa.string()),  # JSON, images of the whole shard by status
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

        An image that cannot be processed is a row with a status. After an exception the images are processed one by
        one (:mod:`pipelines.common.isolation`), so that only those at fault are lost; a ``LakeError`` is the storage's
        fault and fails the shard.
        """

    def read_pixels(self, row: Mapping[str, Any]) -> np.ndarray:
        """The image of an index row, (H, W, 3) uint8 RGB; its time counts as ``read`` and ``decode``.

        Raises:
            ImageError: if it cannot be decoded.
            LakeError: if the storage fails.
        """
        with self.clock.stage("read"):
            data = read_image_bytes(row)
        with self.clock.stage("decode"):
            return decode_image(data)


@dataclass(frozen=True, kw_only=True)
class WorkOrder:
    """What every worker of a job is told beside its shards."""

    make_worker: Callable[[Placement], ShardWorker]
    """Builds what computes them."""
    output: str
    """Folder or URL; the workers read ``index.parquet`` there and write to ``shards/``."""
    fingerprint: str
    """Of the run; every shard's metadata repeats it."""
    retry_failed: bool
    """Whether shards that exist are to be written again, with new rows for the images that failed."""
    notice_board: NoticeBoard | None
    """Where a worker looks for its machine's notice; None: nowhere."""


@dataclass(frozen=True, kw_only=True)
class Computed:
    """A shard that only needs to be written."""

    table: pa.Table
    metadata: dict[str, str]
    """Of the file."""
    report: dict[str, Any]
    """Fields of its ``RESULT``."""
    seconds: dict[str, float]
    """Spent so far, by stage."""


class ShardActor:
    """The callable that Ray Data keeps alive in each worker: the place of a shard in, a ``RESULT`` row out.

    Called from two threads, it computes one shard while it writes the one before.
    """

    def __init__(self, orders: Sequence[WorkOrder], placement: Placement, ledger: ray.actor.ActorHandle) -> None:
        """``orders`` are those of jobs that come one after the other; the worker of one is kept at a time."""
        self._orders, self._placement, self._ledger = orders, placement, ledger
        self._order, self._index = orders[0], IndexReader(orders[0].output)
        self._worker: ShardWorker | None = None
        self._computing, self._writing = threading.Lock(), threading.Lock()
        self._name = ray.get_runtime_context().get_actor_id()
        board = orders[0].notice_board  # all have the same
        self._watch = NoticeWatch(board) if board is not None else None

    def __call__(self, item: pa.Table) -> pa.Table:
        [place] = item.to_pylist()
        order = self._orders[place["job"]]
        result: dict[str, Any] = {name: place[name] for name in ("job", "shard_id")}
        result |= {"worker": self._name, "stopped": False}
        start = time.perf_counter()
        try:
            with ExitStack() as writing:
                with self._computing:
                    start, computed = time.perf_counter(), None
                    attempt = self._begin(_key(place))
                    if attempt is None:
                        result["stopped"] = True
                    elif attempt.number > MAX_ATTEMPTS:
                        result["failure"] = (
                            f"its worker died {MAX_ATTEMPTS} times before it came to an image: the model needs more "
                            "memory than there is (fewer workers or more --num-cpus-per-worker leave more for each)"
                        )
                    else:
                        computed = self._compute(order, place, attempt)
                    # Before another shard is begun: a worker says that it stopped after its last shard is written.
                    writing.enter_context(self._writing)
                if computed is not None:
                    result |= _write(order, place["shard_id"], computed)
        except Exception as error:
            # The boundary of the worker: the driver reports the failure, and the other shards go on.
            logger.exception("shard %s failed", place["shard_id"])
            result["failure"] = f"{type(error).__name__}: {error}"
        return pa.Table.from_pylist([result | {"seconds": time.perf_counter() - start}], schema=RESULT)

    def _begin(self, key: str) -> Attempt | None:
        """The ledger's answer. On a machine with a notice it is not asked: once that is gone, Ray gives the shard to
        another one."""
        if self._watch is not None:
            self._watch.wait_while_notified(until=lambda: ray.get(self._ledger.is_stopping.remote()))
        return ray.get(self._ledger.begin.remote(key))

    def _compute(self, order: WorkOrder, place: Mapping[str, Any], attempt: Attempt) -> Computed:
        start = time.perf_counter()
        if self._order is not order:
            self._worker = None  # before the next is built: two models may not fit
            self._order, self._index = order, IndexReader(order.output)
        rows = patiently(lambda: self._index.read(place["start"], place["num_rows"]))
        loading = {}
        if self._worker is None:
            # Not in __init__: a model that cannot be loaded would make Ray restart the actor for ever.
            self._worker = order.make_worker(self._placement)
            loading = {"load": time.perf_counter() - start}
            self._fix_threads()
        worker = self._worker
        earlier = _earlier(order, place["shard_id"], rows) if order.retry_failed else None
        if earlier is not None:
            rows = rows.filter(pc.not_equal(earlier["status"], schema.OK))
        table = self._process(worker, place, rows, attempt)
        if not table.schema.equals(worker.schema) or table.num_rows != rows.num_rows:
            raise TypeError(f"{type(worker).__name__}.process must return one row of its schema for each image")
        if earlier is not None:
            table = _replace_failed(earlier, table)
        counts = dict(sorted(Counter(table["status"].to_pylist()).items()))
        metadata = {
            SCHEMA_VERSION_KEY: str(schema.SCHEMA_VERSION),
            FINGERPRINT_KEY: order.fingerprint,
            COUNTS_KEY: json.dumps(counts),
            **worker.metadata(),
        }
        report = {
            "images": rows.num_rows,
            "bytes_read": sum(size for size in rows["size"].to_pylist() if size > 0),
            "counts": json.dumps(counts),
        }
        return Computed(table=table, metadata=metadata, report=report, seconds=loading | worker.clock.take())

    def _process(self, worker: ShardWorker, place: Mapping[str, Any], rows: pa.Table, attempt: Attempt) -> pa.Table:
        """All images together, or one by one where some image makes that fail."""
        if rows.num_rows == 0:
            return worker.schema.empty_table()
        if not attempt.one_by_one:
            try:
                return worker.process(rows)
            except LakeError:
                raise
            except Exception:
                logger.exception("shard %s failed as a whole; now its images one by one", place["shard_id"])
        key = _key(place)
        table = process_one_by_one(
            worker.process,
            rows,
            schema=worker.schema,
            given_up=attempt.given_up,
            begin_image=lambda image_id: ray.get(self._ledger.begin_image.remote(key, image_id)),
        )
        ray.get(self._ledger.end_images.remote(key))
        return table

    def _fix_threads(self) -> None:
        # Sums depend on how many threads share them, and Ray's own choice depends on the machine. A job without a
        # model need not load torch for it.
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(self._placement.num_cpus)


def _key(place: Mapping[str, Any]) -> str:
    """A shard's name in the ledger of jobs that run together."""
    return f"{place['job']}/{place['shard_id']}"


def _write(order: WorkOrder, shard_id: str, computed: Computed) -> dict[str, Any]:
    start = time.perf_counter()
    folder = join(order.output, SHARDS_FOLDER)
    patiently(lambda: write_shard(folder, shard_id, computed.table, computed.metadata))
    seconds = computed.seconds | {"write": time.perf_counter() - start}
    return computed.report | {"time_split": json.dumps(seconds)}


def _earlier(order: WorkOrder, shard_id: str, rows: pa.Table) -> pa.Table | None:
    """The shard as an earlier run wrote it; None where none did."""
    url = shard_url(order.output, shard_id)
    try:
        earlier = patiently(lambda: read_shard(url))
    except MissingError:
        return None
    if earlier["image_id"].to_pylist() != rows["image_id"].to_pylist():
        raise ShardError(f"{redact_url(url)} does not hold the images of its plan. Run `tinysam verify --repair`.")
    return earlier


def _replace_failed(earlier: pa.Table, fresh: pa.Table) -> pa.Table:
    """``earlier`` with ``fresh`` in the place of the rows whose status is not ok, in their order."""
    kept = pc.equal(earlier["status"], schema.OK).to_numpy()
    order = np.where(kept, np.arange(earlier.num_rows), earlier.num_rows + np.cumsum(~kept) - 1)
    return pa.concat_tables([earlier.cast(fresh.schema), fresh]).take(pa.array(order))
