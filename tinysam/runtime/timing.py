"""Comparing the speed of several ways to do one thing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def interleaved_seconds(calls: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """The shortest wall time of each call.

    The calls take turns, so that a machine that is busy for a while slows all of them; the shortest time is what the
    call takes when nothing else interferes. Each is called once before, which is not timed.
    """
    for call in calls.values():
        call()
    seconds = dict.fromkeys(calls, float("inf"))
    for _ in range(repetitions):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds
