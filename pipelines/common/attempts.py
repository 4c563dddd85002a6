"""Counting how often a shard was begun, so that an image that kills its worker cannot occupy a cluster for ever."""

from __future__ import annotations

from collections import Counter

import ray

MAX_ATTEMPTS = 5
"""A shard is begun so often before it counts as failed. Spot machines die too, so one attempt would be too few."""


class Attempts:
    """Lives in a process of its own, as the workers that it counts may die at any time."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, shard_id: str) -> int:
        """Counts one more attempt at a shard and returns how many there were, this one included."""
        self._begun[shard_id] += 1
        return self._begun[shard_id]


def start_attempts() -> ray.actor.ActorHandle:
    """Starts the counter; it ends with the driver."""
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Attempts).remote()
