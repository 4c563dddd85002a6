from __future__ import annotations

from collections.abc import Callable

import pytest

from tinysam.distill.cache import GroupSamples, epoch_order, open_cache
from tinysam.distill.samples import SampleConfig
from tinysam.lake.shards import ShardError


def test_repeats_show_a_cache_several_times_an_epoch(make_cache: Callable[..., str]) -> None:
    cache = open_cache([make_cache("a", shards=2), make_cache("b", shards=1)], [1, 3])
    assert len(cache.shards) == 2 + 3
    assert {shard.images for shard in cache.shards} == {5}  # four images and a broken one
    assert cache.embedding_shape == (32, 8, 8)


def test_caches_of_different_teachers_are_not_mixed(make_cache: Callable[..., str]) -> None:
    with pytest.raises(ShardError, match="teacher_sha256"):
        open_cache([make_cache("a"), make_cache("b", metadata={"teacher_sha256": "other"})])


def test_a_folder_without_shards_names_the_job_that_writes_them(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(ShardError, match="cache_teacher"):
        open_cache([str(tmp_path_factory.mktemp("empty"))])


def test_epochs_visit_every_shard_once_in_their_own_order() -> None:
    orders = [epoch_order(50, seed=1, epoch=epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1]
    assert orders[0] == epoch_order(50, seed=1, epoch=0)


def test_samples_go_round_until_enough_are_drawn_and_skip_bad_images(make_cache: Callable[..., str]) -> None:
    cache = open_cache([make_cache("a", shards=1)])
    config = SampleConfig(crop_size=64)
    stream = GroupSamples(cache, [cache.shards[0].url], config=config, prompts=2, count=11, seed=[0])
    samples = list(stream)
    assert len(samples) == 11
    again = list(stream)
    assert all((a.image == b.image).all() for a, b in zip(samples, again, strict=True))


def test_shards_that_teach_nothing_are_named(make_cache: Callable[..., str]) -> None:
    cache = open_cache([make_cache("a", shards=1, embeddings=False, masks=False)])
    stream = GroupSamples(cache, [cache.shards[0].url], config=SampleConfig(), prompts=2, count=1, seed=[0])
    with pytest.raises(ShardError, match="shard-0"):
        list(stream)
