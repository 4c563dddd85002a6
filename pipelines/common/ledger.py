"""Which shards were begun, so that an image that kills its worker costs neither the cluster nor the other images."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import ray

TOGETHER_ATTEMPTS = 2
"""A shard's images are processed together so often; if the worker dies each time, one by one from then on."""

MAX_ATTEMPTS = 5
"""A shard fails when so many workers died over it without having come to a single image."""

IMAGE_ATTEMPTS = 2
"""An image is given up when so many workers died with it alone in hand. Spot machines die too, so one is too few."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What a worker is told when it begins a shard."""

    number: int
    """1 for the first."""
    given_up: frozenset[str]
    """Images of the shard that are not to be touched again."""

    @property
    def one_by_one(self) -> bool:
        """Whether to process the images one at a time."""
        return self.number > TOGETHER_ATTEMPTS


class Ledger:
    """Lives in a process of its own, as the workers that it knows of may die at any time."""

    def __init__(self) -> None:
        self._attempts: Counter[str] = Counter()
        self._in_hand: dict[str, str] = {}
        self._deaths: dict[str, Counter[str]] = {}
        self._stopping = False

    def begin(self, shard_id: str) -> Attempt | None:
        """Counts one more attempt at a shard; None when no more work is to be begun."""
        if self._stopping:
            return None
        self._attempts[shard_id] += 1
        deaths = self._deaths.setdefault(shard_id, Counter())
        if image_id := self._in_hand.pop(shard_id, None):
            deaths[image_id] += 1
        given_up = frozenset(image_id for image_id, count in deaths.items() if count >= IMAGE_ATTEMPTS)
        return Attempt(number=self._attempts[shard_id], given_up=given_up)

    def begin_image(self, shard_id: str, image_id: str) -> None:
        """Notes that a worker has this image alone in hand; whatever happens to it now is not the shard's fault."""
        self._in_hand[shard_id] = image_id
        self._attempts[shard_id] = TOGETHER_ATTEMPTS

    def end_images(self, shard_id: str) -> None:
        """Notes that no image of the shard is in hand any more."""
        self._in_hand.pop(shard_id, None)

    def is_stopping(self) -> bool:
        """Whether no more work is to be begun."""
        return self._stopping

    def stop(self) -> None:
        """From now on, no shard is begun."""
        self._stopping = True


def start_ledger() -> ray.actor.ActorHandle:
    """Starts the ledger; it ends with the driver."""
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Ledger).remote()
