"""Trying again what may work a moment later."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from tinysam.lake.filesystem import TransientError

ATTEMPTS = 6
FIRST_WAIT = 1.0
"""Seconds before the second attempt; each further wait is twice as long, so half a minute in all."""

T = TypeVar("T")


def patiently(function: Callable[[], T], *, attempts: int | None = None, first_wait: float | None = None) -> T:
    """Calls ``function`` until it raises no ``TransientError``, at most ``attempts`` times (None: ``ATTEMPTS``).

    The drivers of object stores retry single requests within seconds; this is for outages beyond that. Waits are drawn
    between half and all of their length, so that the workers of a cluster do not come back all at once. Our choice.

    Raises:
        TransientError: That of the last attempt.
    """
    wait = FIRST_WAIT if first_wait is None else first_wait
    for attempt in range((attempts or ATTEMPTS) - 1):
        try:
            return function()
        except TransientError:
            time.sleep(wait * 2**attempt * random.uniform(0.5, 1.0))
    return function()
