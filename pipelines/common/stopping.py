"""Stopping in good order on SIGTERM: what Kubernetes, Slurm and the notice of a spot machine's end come down to."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

GRACE_SECONDS = 25.0
"""What is in hand may take so long after SIGTERM; Kubernetes kills after 30 s unless told otherwise."""


class TerminatedError(Exception):
    """The job was asked to end."""


@contextmanager
def stopping_on_sigterm(ask_to_stop: Callable[[], None], grace_seconds: float = GRACE_SECONDS) -> Iterator[None]:
    """While the context lasts, SIGTERM calls ``ask_to_stop`` in a thread, and ``grace_seconds`` later raises.

    Does nothing outside the main thread, which has no signals.

    Raises:
        TerminatedError: from whatever the body waits for, if it still does when the time is up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def time_is_up(number: int, frame: FrameType | None) -> None:
        raise TerminatedError

    def stop(number: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, grace_seconds)
        # In a thread: the main one may have been interrupted inside Ray, which is not to be entered twice.
        threading.Thread(target=ask_to_stop, name="stop", daemon=True).start()

    before = signal.signal(signal.SIGTERM, stop), signal.signal(signal.SIGALRM, time_is_up)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGALRM, before[1])
