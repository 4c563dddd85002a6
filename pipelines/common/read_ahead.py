"""Reading and decoding the next images while the model works on this one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int, ahead: int
) -> Iterator[Result]:
    """``map(function, items)``, in order, with up to ``ahead`` results computed in advance by ``threads`` threads.

    Decoding, resizing and network reads release the interpreter lock, so threads are enough. ``ahead`` bounds the
    memory: no more than that many results exist beyond the one that the caller holds.
    """
    waiting: deque[Future[Result]] = deque()
    remaining = iter(items)
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="read-ahead") as pool:
        try:
            waiting.extend(pool.submit(function, item) for item in islice(remaining, ahead))
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in islice(remaining, 1))
                yield result
        finally:
            for future in waiting:
                future.cancel()
