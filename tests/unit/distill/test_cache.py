from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tinysam.distill.cache import open_cache
from tinysam.lake.filesystem import LakeError, MissingError
from tinysam.lake.shards import ShardError


def test_repeats_show_a_cache_several_times_an_epoch(make_cache: Callable[..., str]) -> None:
    cache = open_cache([make_cache("a", shards=2), make_cache("b", shards=1)], [1, 3])
    assert len(cache.shards) == 2 + 3
    assert {shard.images for shard in cache.shards} == {5}  # four images and a broken one
    assert cache.images == 25
    assert cache.embedding_shape == (32, 8, 8)


def test_a_limit_keeps_the_shards_that_hold_so_many_images(make_cache: Callable[..., str]) -> None:
    cache = open_cache([make_cache("a")])
    assert [len(cache.limited(images).shards) for images in (1, 5, 6, 100)] == [1, 1, 2, 3]


def test_caches_of_different_teachers_are_not_mixed(make_cache: Callable[..., str]) -> None:
    with pytest.raises(ShardError, match="teacher_sha256"):
        open_cache([make_cache("a"), make_cache("b", metadata={"teacher_sha256": "other"})])


def test_a_folder_without_shards_names_the_job_that_writes_them(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(ShardError, match="cache_teacher"):
        open_cache([str(tmp_path_factory.mktemp("empty"))])


def test_a_cache_that_lacks_a_shard_is_refused_by_its_name(make_cache: Callable[..., str]) -> None:
    folder = make_cache("a")
    Path(folder, "shards", "shard-1.parquet").unlink()
    with pytest.raises(ShardError, match=r"1 of its 3 shards, shard-1.*cache_teacher"):
        open_cache([folder])


def test_a_shard_that_vanishes_while_training_is_named(make_cache: Callable[..., str]) -> None:
    cache = open_cache([make_cache("a")])
    Path(cache.shards[2].url).unlink()
    with pytest.raises(MissingError, match="shard-2"):
        cache.read(2)


def test_a_truncated_shard_is_named(make_cache: Callable[..., str]) -> None:
    cache = open_cache([make_cache("a")])
    path = Path(cache.shards[1].url)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(LakeError, match=r"shard-1.*run the job again"):
        cache.read(1)


def test_a_shard_of_another_fingerprint_within_a_cache_is_named(make_cache: Callable[..., str]) -> None:
    folder, other = make_cache("a"), make_cache("b", metadata={"preprocessing": "q"})
    Path(other, "shards", "shard-2.parquet").replace(Path(folder, "shards", "shard-2.parquet"))
    cache = open_cache([folder])
    assert cache.read(1).num_rows == 5
    with pytest.raises(ShardError, match=r"shard-2.*another preprocessing"):
        cache.read(2)
