from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tinysam.distill.cache import Cache, open_cache
from tinysam.distill.groups import Group
from tinysam.distill.loading import Reading, load_batches
from tinysam.distill.samples import Sample, SampleConfig
from tinysam.lake.shards import ShardError


def batches(cache: Cache, *, steps: int = 2, processes: int = 0, groups: int = 2, **options: Any) -> list[Sample]:
    per_group = len(cache.shards) // groups
    reading = Reading(
        groups=[
            Group(offset=g * per_group, shards=tuple(range(g * per_group, (g + 1) * per_group)), steps=steps)
            for g in range(groups)
        ],
        **{"samples": SampleConfig(crop_size=64), "prompts": 2, "batch_size": 2, **options},
    )
    return list(load_batches(cache, reading, processes=processes))


def shard_numbers(batch: Sample) -> set[str]:
    return {key.split("#")[1].split("-")[0] for key in batch.key}


@pytest.mark.parametrize("processes", [0, 1, 2])
def test_groups_follow_each_other_with_the_batches_of_their_steps(
    make_cache: Callable[..., str], processes: int
) -> None:
    cache = open_cache([make_cache("a", shards=4)])
    loaded = batches(cache, steps=3, batches_per_step=2, processes=processes)
    assert len(loaded) == 2 * 3 * 2
    assert all(len(batch.key) == 2 for batch in loaded)
    assert all(shard_numbers(batch) <= {"0", "1"} for batch in loaded[:6])
    assert all(shard_numbers(batch) <= {"2", "3"} for batch in loaded[6:])


def test_workers_and_processes_see_every_image_once_between_them(make_cache: Callable[..., str]) -> None:
    cache = open_cache([make_cache("a", shards=2)])
    seen = Counter[str]()
    for worker in range(2):
        for batch in batches(cache, steps=2, processes=2, groups=1, batch_size=1, worker=worker, workers=4):
            seen.update(batch.key)
    for worker in (2, 3):
        for batch in batches(cache, steps=2, processes=2, groups=1, batch_size=1, worker=worker, workers=4):
            seen.update(batch.key)
    assert len(seen) == 2 * 4  # four good images in each of two shards, which eight readers share
    assert not any("bad" in key for key in seen)


def test_batches_repeat_under_a_seed_and_differ_between_epochs(make_cache: Callable[..., str]) -> None:
    cache = open_cache([make_cache("a", shards=2)])
    first, again, other = (batches(cache, seed=seed) for seed in ((0, 0), (0, 0), (0, 1)))
    assert [batch.key for batch in first] == [batch.key for batch in again]
    assert all(torch.equal(a.image, b.image) for a, b in zip(first, again, strict=True))
    assert [batch.key for batch in first] != [batch.key for batch in other]


def test_images_come_again_only_after_all_others_came(make_cache: Callable[..., str]) -> None:
    cache = open_cache([make_cache("a", shards=1)])
    keys = [key for batch in batches(cache, groups=1, steps=4) for key in batch.key]
    assert set(Counter(keys).values()) == {2}


def test_hard_images_come_more_often(make_cache: Callable[..., str]) -> None:
    cache = open_cache([make_cache("a", shards=1)])
    url = cache.shards[0].url
    weights = {f"{url}#0-{i}": 1.0 for i in range(3)} | {f"{url}#0-3": 9.0}
    keys = Counter(key for batch in batches(cache, groups=1, steps=100, weights=weights) for key in batch.key)
    assert 0.6 < keys[f"{url}#0-3"] / 200 < 0.9  # 9 of 12


def test_shards_that_teach_nothing_are_named(make_cache: Callable[..., str]) -> None:
    cache = open_cache([make_cache("a", shards=1, embeddings=False, masks=False)])
    with pytest.raises(ShardError, match="shard-0"):
        batches(cache, groups=1)
    with pytest.raises(ShardError, match="shard-0"):
        batches(cache, groups=1, processes=1)


def test_images_without_masks_are_passed_over_where_there_is_no_teacher(make_cache: Callable[..., str]) -> None:
    cache = open_cache(
        [make_cache("a", shards=1, embeddings=False), make_cache("b", shards=1, embeddings=False, masks=False)]
    )
    keys = {key for batch in batches(cache, groups=1, steps=6) for key in batch.key}
    assert len(keys) == 4
    assert all(key.startswith(cache.shards[0].url) for key in keys)


@pytest.mark.parametrize("workers", [1, 4])
def test_a_shard_that_teaches_nothing_is_stood_in_for_by_the_next(make_cache: Callable[..., str], workers: int) -> None:
    cache = open_cache(
        [
            make_cache("a", shards=1, embeddings=False),
            make_cache("b", shards=1, embeddings=False, masks=False),
            make_cache("c", shards=1, images=0, embeddings=False),
        ]
    )
    for worker in range(workers):
        loaded = batches(cache, groups=3, steps=1, worker=worker, workers=workers)
        assert len(loaded) == 3
        assert all(key.startswith(cache.shards[0].url) for batch in loaded for key in batch.key)


def test_workers_that_outnumber_the_images_of_a_shard_see_the_same_ones(make_cache: Callable[..., str]) -> None:
    cache = open_cache([make_cache("a", shards=1, images=2)])
    for worker in range(5):
        [batch] = batches(cache, groups=1, steps=1, worker=worker, workers=5)
        assert len(batch.key) == 2
