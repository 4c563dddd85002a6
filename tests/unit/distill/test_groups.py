from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tinysam.distill.groups import Group, Portion, deal, epoch_order, make_groups


def test_epochs_visit_every_shard_once_in_their_own_order() -> None:
    orders = [epoch_order(50, seed=1, epoch=epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1]
    assert orders[0] == epoch_order(50, seed=1, epoch=0)


def test_groups_make_as_many_steps_as_their_images_ask_for() -> None:
    groups = make_groups([2, 0, 1], [10, 20, 1], done=0, group_shards=2, images_per_step=4)
    assert groups == [Group(offset=0, shards=(2, 0), steps=round(11 / 4)), Group(offset=2, shards=(1,), steps=5)]


@given(
    shards=st.integers(1, 40),
    group_shards=st.integers(1, 5),
    lives=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 9)), min_size=1, max_size=6),
)
def test_every_shard_of_an_epoch_is_trained_once_however_often_workers_die_and_change_in_number(
    shards: int, group_shards: int, lives: list[tuple[int, int]]
) -> None:
    """Each life of a run has so many workers, and commits so many groups before it dies; the last one finishes."""
    order, done, trained = epoch_order(shards, 0, 0), 0, Counter[int]()
    for life, (workers, committed) in enumerate(lives):
        groups = make_groups(
            order, [3] * shards, done=done, group_shards=group_shards * workers, images_per_step=workers
        )
        for group in groups[: committed if life < len(lives) - 1 else None]:
            assert group.offset == done
            trained.update(group.shards)
            done += len(group.shards)
    assert trained == Counter(range(shards))


@given(shards=st.integers(1, 12), readers=st.integers(1, 12), images=st.integers(1, 9))
def test_readers_divide_a_groups_images_among_them(shards: int, readers: int, images: int) -> None:
    portions = [portion for reader in range(readers) for portion in deal(range(shards), reader, readers)]
    seen = [(p.shard, image) for p in portions for image in range(images)[p.part :: p.parts]]
    assert sorted(seen) == [(shard, image) for shard in range(shards) for image in range(images)]


def test_readers_that_outnumber_the_shards_share_them() -> None:
    assert [deal([7, 8], reader, 3) for reader in range(3)] == [
        [Portion(shard=7, part=0, parts=2)],
        [Portion(shard=8, part=0, parts=1)],
        [Portion(shard=7, part=1, parts=2)],
    ]
