"""The training set: shards of one or several caches, in a seeded order, dealt out to workers group by group."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import IterableDataset

from tinysam.distill.samples import Sample, SampleConfig, make_sample
from tinysam.lake import schema
from tinysam.lake.codecs import Codec
from tinysam.lake.filesystem import join, list_files, read_bytes
from tinysam.lake.shards import SHARDS_FOLDER, ShardError, read_shard, read_shard_metadata

COLUMNS = ("image_id", "status", "input_height", "input_width", "image", "masks")


@dataclass(frozen=True)
class CachedShard:
    """A shard of a cache."""

    url: str
    images: int
    """Rows, bad images included."""


@dataclass(frozen=True)
class Cache:
    """The shards of one or several caches, and what they have in common."""

    shards: tuple[CachedShard, ...]
    """In the caches' order; a cache that is repeated contributes its shards several times."""
    image_size: int
    embedding_shape: tuple[int, int, int] | None
    """(C, H, W); None if the cache holds no embeddings."""
    codec: Codec
    teacher: str
    teacher_sha256: str


def open_cache(urls: Sequence[str], repeats: Sequence[int] = ()) -> Cache:
    """Lists the caches that ``pipelines/cache_teacher.py`` wrote, and checks that they fit each other.

    Args:
        urls: output folders of that job.
        repeats: how often each of them is seen in an epoch; once each if empty.

    Raises:
        ShardError: if there is no shard, or the caches differ in teacher, image size or codec.
        ValueError: if ``repeats`` has another length than ``urls``.
    """
    repeats = repeats or [1] * len(urls)
    if len(repeats) != len(urls):
        raise ValueError(f"{len(urls)} caches, but {len(repeats)} repeats")
    shards: list[CachedShard] = []
    common: dict[str, str] = {}
    for url, times in zip(urls, repeats, strict=True):
        files = list_files(join(url, SHARDS_FOLDER), "*.parquet")
        if not files:
            raise ShardError(f"{url} holds no shards. Run pipelines/cache_teacher.py --output {url} first.")
        metadata = read_shard_metadata(files[0])
        facts = {
            key: metadata.get(key, "")
            for key in ("image_size", "embedding_shape", "codec", "teacher_sha256", "preprocessing")
        }
        if common and facts != common:
            different = ", ".join(key for key in facts if facts[key] != common[key])
            raise ShardError(f"{url} does not fit {urls[0]}: they differ in {different}. Cache both the same way.")
        common = facts
        rows = _rows_of_shards(url)
        shards += [CachedShard(file, rows.get(_shard_id(file), 0)) for file in files] * times
    shape = tuple(int(side) for side in common["embedding_shape"].split(",")) if common["embedding_shape"] else None
    return Cache(
        shards=tuple(shards),
        image_size=int(common["image_size"]),
        embedding_shape=cast("tuple[int, int, int] | None", shape),
        codec=cast(Codec, common["codec"] or "fp16"),
        teacher=metadata.get("teacher", ""),
        teacher_sha256=common["teacher_sha256"],
    )


def _shard_id(url: str) -> str:
    return url.rsplit("/", 1)[-1].removesuffix(".parquet")


def _rows_of_shards(url: str) -> dict[str, int]:
    index = pq.read_table(pa.BufferReader(read_bytes(join(url, "index.parquet"))), columns=["shard_id"])
    counts = index["shard_id"].value_counts().to_pylist()
    return {entry["values"]: entry["counts"] for entry in counts}


def epoch_order(shards: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch's shards: a permutation of ``range(shards)`` that depends on seed and epoch alone."""
    order = list(range(shards))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


class GroupSamples(IterableDataset[Sample]):
    """Samples of some shards in random order, over and over until ``count`` are drawn.

    Going round keeps workers in step whose shards have different numbers of usable images.

    Args:
        shards: URLs.
        count: samples to draw.
        prompts: masks prompted in each.
        seed: of the order, the crops and the choice of masks.
    """

    def __init__(
        self,
        cache: Cache,
        shards: Sequence[str],
        *,
        config: SampleConfig,
        prompts: int,
        count: int,
        seed: Sequence[int],
    ) -> None:
        self._cache, self._shards, self._config = cache, shards, config
        self._prompts, self._count, self._seed = prompts, count, seed

    def __iter__(self) -> Iterator[Sample]:
        rng = np.random.default_rng(self._seed)
        embeddings = () if self._cache.embedding_shape is None else ("embedding",)
        tables = [read_shard(url, columns=[*COLUMNS, *embeddings]) for url in self._shards]
        rows = pa.concat_tables(tables)
        usable = np.flatnonzero(np.array([status == schema.OK for status in rows["status"].to_pylist()]))
        drawn = 0
        while drawn < self._count:
            drawn_before = drawn
            for i in rng.permutation(usable):
                sample = make_sample(
                    rows.slice(i, 1).to_pylist()[0],
                    config=self._config,
                    prompts=self._prompts,
                    image_size=self._cache.image_size,
                    embedding_shape=self._cache.embedding_shape,
                    codec=self._cache.codec,
                    rng=rng,
                )
                if sample is None:
                    continue
                yield sample
                drawn += 1
                if drawn == self._count:
                    return
            if drawn == drawn_before:
                raise ShardError(
                    f"no image of {', '.join(self._shards)} can be trained on: none has a mask, and the cache holds "
                    "no embeddings. Give the lake's annotations to pipelines/cache_teacher.py, or a teacher."
                )
