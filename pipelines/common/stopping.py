"""Stopping in good order: on SIGTERM, which is what Kubernetes and Slurm send, and on a spot machine's notice."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from types import FrameType

from pipelines.common.preemption import NoticeBoard, NoticeWatch

GRACE_SECONDS = 25.0
"""What is in hand may take so long after SIGTERM; Kubernetes kills after 30 s unless told otherwise."""


class TerminatedError(Exception):
    """The job was asked to end."""


@contextmanager
def stopping_in_order(
    ask_to_stop: Callable[[], None], board: NoticeBoard | None = None, grace_seconds: float = GRACE_SECONDS
) -> Iterator[None]:
    """While the context lasts, SIGTERM and a notice call ``ask_to_stop`` in a thread, and some time later raise.

    Does nothing outside the main thread, which has no signals.

    Args:
        ask_to_stop: called for each of the two.
        board: where the notice of this machine is looked for; None: nowhere.
        grace_seconds: from SIGTERM on; from a notice on, it is the board's.

    Raises:
        TerminatedError: from whatever the body waits for, if it still does when the time is up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def time_is_up(number: int, frame: FrameType | None) -> None:
        raise TerminatedError

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, grace_seconds)
        # In a thread: the main one may have been interrupted inside Ray, which is not to be entered twice.
        threading.Thread(target=ask_to_stop, name="stop", daemon=True).start()

    def on_notice() -> None:
        assert board is not None
        signal.setitimer(signal.ITIMER_REAL, board.grace_seconds)
        ask_to_stop()

    before = signal.signal(signal.SIGTERM, on_sigterm), signal.signal(signal.SIGALRM, time_is_up)
    try:
        with closing(NoticeWatch(board, on_notice)) if board is not None else nullcontext():
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGALRM, before[1])
