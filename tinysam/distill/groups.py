"""Which shards are trained on together, by whom, and for how many steps: plain arithmetic that every worker repeats."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Group:
    """Shards that all workers mix at once. Progress is counted in finished groups."""

    offset: int
    """Place of its first shard in the epoch's order."""
    shards: tuple[int, ...]
    """Numbers of the shards."""
    steps: int
    """Optimizer steps that each worker makes on its part."""


@dataclass(frozen=True, kw_only=True)
class Portion:
    """Every ``parts``-th image of a shard, from the ``part``-th on."""

    shard: int
    part: int = 0
    parts: int = 1


def epoch_order(shards: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch's shards: a permutation of ``range(shards)`` that depends on seed and epoch alone."""
    order = list(range(shards))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def make_groups(
    order: Sequence[int], images: Sequence[int], *, done: int, group_shards: int, images_per_step: int
) -> list[Group]:
    """Cuts what is left of an epoch into groups.

    A shard that is done stays done when the number of workers changes, as ``done`` counts shards of the order, which
    does not depend on it.

    Args:
        order: the epoch's shards.
        images: of each shard, by its number.
        done: shards of the order that are finished.
        group_shards: shards of a group.
        images_per_step: that all workers together see in an optimizer step.
    """
    groups = []
    for offset in range(done, len(order), group_shards):
        shards = tuple(order[offset : offset + group_shards])
        steps = max(1, round(sum(images[shard] for shard in shards) / images_per_step))
        groups.append(Group(offset=offset, shards=shards, steps=steps))
    return groups


def deal(shards: Sequence[int], reader: int, readers: int) -> list[Portion]:
    """What one of ``readers`` reads of a group: whole shards, or images of one where readers outnumber the shards.

    The portions of all readers are a partition of the group's images.
    """
    if len(shards) >= readers:
        return [Portion(shard=shard) for shard in shards[reader::readers]]
    place = reader % len(shards)
    sharers = len(range(place, readers, len(shards)))
    return [Portion(shard=shards[place], part=reader // len(shards), parts=sharers)]
