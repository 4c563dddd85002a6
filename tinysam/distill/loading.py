"""From groups of shards to batches: read ahead, decoded by processes beside the training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tinysam.distill.cache import Cache
from tinysam.distill.groups import Group, Portion, deal
from tinysam.distill.samples import Sample, SampleConfig, make_sample
from tinysam.lake import schema
from tinysam.lake.shards import ShardError

BATCHES_AHEAD = 4
"""That each process keeps ready."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What of a cache is read, and how."""

    groups: Sequence[Group]
    """In their order."""
    samples: SampleConfig
    """How a row becomes a sample."""
    prompts: int
    """Masks prompted in each sample."""
    dense: bool = False
    """Whether samples have the auxiliary task's target."""
    batch_size: int
    """Images of a batch."""
    batches_per_step: int = 1
    """Batches that each worker sees in a step of a group."""
    seed: Sequence[int] = (0,)
    """Of the order within groups, the crops and the choice of masks."""
    worker: int = 0
    """Who reads, of ``workers``."""
    workers: int = 1
    """Who share each group."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """How often an image is drawn, relative to others, by its sample's key; 1 for what is not listed. Empty: every
    image once before any comes twice."""


def load_batches(cache: Cache, reading: Reading, *, processes: int, pin_memory: bool = False) -> Iterator[Sample]:
    """Batches of one group after another: ``steps * batches_per_step`` of each.

    Args:
        processes: that decode; 0 decodes between the steps.
        pin_memory: for GPUs.
    """
    loader = DataLoader(
        GroupedSamples(cache, reading),
        batch_size=reading.batch_size,
        collate_fn=Sample.stack,
        num_workers=processes,
        prefetch_factor=BATCHES_AHEAD if processes else None,
        pin_memory=pin_memory,
    )
    return iter(loader)


class GroupedSamples(IterableDataset[Sample]):
    """The samples of the batches that this process makes.

    Processes take turns with batches, so each makes every n-th of them, from the part of each group that
    :func:`tinysam.distill.groups.deal` gives it. The next group is read while the present one's samples are made.
    Where the images are too few they come again, and where a part holds none to train on, the next shard of the cache
    that does stands in for it; that keeps workers in step whose parts differ.
    """

    def __init__(self, cache: Cache, reading: Reading) -> None:
        self._cache, self._reading = cache, reading

    def __iter__(self) -> Iterator[Sample]:
        reading, info = self._reading, get_worker_info()
        process, processes = (info.id, info.num_workers) if info is not None else (0, 1)
        reader, readers = reading.worker * processes + process, reading.workers * processes
        parts = [deal(group.shards, reader, readers) for group in reading.groups]
        first = 0
        for group, rows in zip(reading.groups, _read_ahead(self._cache, parts), strict=True):
            batches = group.steps * reading.batches_per_step
            mine = len(range((process - first) % processes, batches, processes))
            first += batches
            rng = np.random.default_rng([*reading.seed, group.offset, reader])
            yield from self._draw(rows, mine * reading.batch_size, rng)

    def _draw(self, rows: _Rows, count: int, rng: np.random.Generator) -> Iterator[Sample]:
        drawn = 0
        while drawn < count:
            drawn_before = drawn
            for i in self._order(rows, rng):
                sample = make_sample(
                    rows.table.slice(i, 1).to_pylist()[0],
                    config=self._reading.samples,
                    prompts=self._reading.prompts,
                    image_size=self._cache.image_size,
                    embedding_shape=self._cache.embedding_shape,
                    codec=self._cache.codec,
                    rng=rng,
                    dense=self._reading.dense,
                    key=rows.keys[i],
                )
                if sample is None:
                    continue
                yield sample
                drawn += 1
                if drawn == count:
                    return
            if drawn == drawn_before:
                raise ShardError(
                    f"no image of {', '.join(rows.shards)} can be trained on: each failed, or has no mask while the "
                    "cache holds no embeddings. Give the lake's annotations to pipelines/cache_teacher.py, or a "
                    "teacher."
                )

    def _order(self, rows: _Rows, rng: np.random.Generator) -> np.ndarray:
        if not self._reading.weights:
            return rng.permutation(rows.usable)
        weights = np.array([self._reading.weights.get(rows.keys[i], 1.0) for i in rows.usable])
        return rng.choice(rows.usable, len(rows.usable), p=weights / weights.sum())


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """One reader's part of a group."""

    table: pa.Table
    keys: list[str]
    """``SHARD#ID`` of every row."""
    usable: np.ndarray
    """Numbers of the rows to draw from."""
    shards: list[str]
    """URLs."""


def _read_ahead(cache: Cache, parts: Sequence[Sequence[Portion]]) -> Iterator[_Rows]:
    with ThreadPoolExecutor(1) as pool:
        pending: Future[_Rows] | None = None
        for portions in parts:
            following = pool.submit(_read_usable, cache, portions)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def _read_usable(cache: Cache, portions: Sequence[Portion]) -> _Rows:
    """The rows of some portions, or of the first shard after them that has any to train on."""
    rows, shards = _read(cache, portions), len(cache.shards)
    for shard in range(portions[-1].shard + 1, portions[-1].shard + shards):
        if len(rows.usable):
            break
        rows = _read(cache, [Portion(shard=shard % shards)])
    return rows


def _read(cache: Cache, portions: Sequence[Portion]) -> _Rows:
    tables: list[pa.Table] = []
    keys: list[str] = []
    usable: list[np.ndarray] = []
    urls: list[str] = []
    for portion in portions:
        table, url = cache.read(portion.shard), cache.shards[portion.shard].url
        good = np.flatnonzero(_usable(table, has_embeddings=cache.embedding_shape is not None))
        # A worker without images would not make its steps; better that two of them see the same ones.
        own = good[portion.part :: portion.parts] if portion.part < len(good) else good
        usable.append(own + len(keys))
        keys += [f"{url}#{image_id}" for image_id in table["image_id"].to_pylist()]
        tables.append(table)
        urls.append(url)
    return _Rows(table=pa.concat_tables(tables), keys=keys, usable=np.concatenate(usable), shards=urls)


def _usable(table: pa.Table, *, has_embeddings: bool) -> np.ndarray:
    """Which rows teach something: images that did not fail, and have a mask where there is no embedding."""
    usable = pc.equal(table["status"], schema.OK)
    if not has_embeddings:
        usable = pc.and_(usable, pc.greater(pc.fill_null(pc.list_value_length(table["masks"]), 0), 0))
    return usable.to_numpy()
