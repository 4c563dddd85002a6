"""The training set: the shards of one or several outputs of pipelines/cache_teacher.py."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq

from tinysam.lake.codecs import Codec
from tinysam.lake.filesystem import join, list_files, read_bytes, redact_url
from tinysam.lake.shards import SHARDS_FOLDER, ShardError, read_shard, read_shard_metadata

COLUMNS = ("image_id", "status", "input_height", "input_width", "image", "masks")
FACTS = ("image_size", "embedding_shape", "codec", "teacher_sha256", "preprocessing")
"""What all shards of a training set must have in common."""


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
    facts: Mapping[str, str]
    """``FACTS`` as the shards' metadata state them."""

    @property
    def images(self) -> int:
        """Rows of an epoch, bad images included."""
        return sum(shard.images for shard in self.shards)

    def limited(self, images: int) -> Cache:
        """The first shards, as many as hold ``images`` images."""
        before = itertools.accumulate((shard.images for shard in self.shards), initial=0)
        shards = tuple(shard for shard, count in zip(self.shards, before, strict=False) if count < images)
        return replace(self, shards=shards)

    def read(self, shard: int) -> pa.Table:
        """The columns of a shard that training needs.

        Raises:
            LakeError: if the shard is gone or cut short, or belongs to another cache; the message names it.
        """
        url = self.shards[shard].url
        embeddings = () if self.embedding_shape is None else ("embedding",)
        table = read_shard(url, columns=[*COLUMNS, *embeddings])
        found = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        different = ", ".join(key for key in FACTS if found.get(key, "") != self.facts[key])
        if different:
            raise ShardError(
                f"{redact_url(url)} was made with another {different} than the rest of its cache. "
                "Delete it and run pipelines/cache_teacher.py again: it makes what is missing."
            )
        return table


def open_cache(urls: Sequence[str], repeats: Sequence[int] = ()) -> Cache:
    """Lists the caches that ``pipelines/cache_teacher.py`` wrote, and checks that they fit each other.

    Args:
        urls: output folders of that job.
        repeats: how often each of them is seen in an epoch; once each if empty.

    Raises:
        ShardError: if shards are missing, or the caches differ in teacher, image size or codec.
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
        facts = {key: metadata.get(key, "") for key in FACTS}
        if common and facts != common:
            different = ", ".join(key for key in facts if facts[key] != common[key])
            raise ShardError(f"{url} does not fit {urls[0]}: they differ in {different}. Cache both the same way.")
        common = facts
        rows = _rows_of_shards(url)
        missing = sorted(rows.keys() - {_shard_id(file) for file in files})
        if missing:
            raise ShardError(
                f"{url} lacks {len(missing)} of its {len(rows)} shards, {missing[0]} for one. "
                "Run pipelines/cache_teacher.py with the same flags again: it makes what is missing."
            )
        shards += [CachedShard(file, rows.get(_shard_id(file), 0)) for file in files] * times
    shape = tuple(int(side) for side in common["embedding_shape"].split(",")) if common["embedding_shape"] else None
    return Cache(
        shards=tuple(shards),
        image_size=int(common["image_size"]),
        embedding_shape=cast("tuple[int, int, int] | None", shape),
        codec=cast(Codec, common["codec"] or "fp16"),
        teacher=metadata.get("teacher", ""),
        teacher_sha256=common["teacher_sha256"],
        facts=common,
    )


def _shard_id(url: str) -> str:
    return url.rsplit("/", 1)[-1].removesuffix(".parquet")


def _rows_of_shards(url: str) -> dict[str, int]:
    index = pq.read_table(pa.BufferReader(read_bytes(join(url, "index.parquet"))), columns=["shard_id"])
    counts = index["shard_id"].value_counts().to_pylist()
    return {entry["values"]: entry["counts"] for entry in counts}
