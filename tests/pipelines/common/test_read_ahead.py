"""Reading ahead: the order of map, a bound on what exists, and errors where they belong."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.common.read_ahead import read_ahead


@settings(max_examples=25, deadline=None)
@given(items=st.lists(st.integers(), max_size=12), threads=st.integers(1, 4), ahead=st.integers(1, 6))
def test_it_is_map_in_order(items: list[int], threads: int, ahead: int) -> None:
    assert list(read_ahead(lambda x: 2 * x, items, threads=threads, ahead=ahead)) == [2 * x for x in items]


def test_slow_items_do_not_change_the_order() -> None:
    def wait(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    delays = [0.05, 0.0, 0.03, 0.0]
    assert list(read_ahead(wait, delays, threads=4, ahead=4)) == delays


def test_no_more_results_exist_than_allowed() -> None:
    started = 0
    lock = threading.Lock()

    def count(item: int) -> int:
        nonlocal started
        with lock:
            started += 1
        return item

    results = read_ahead(count, range(100), threads=4, ahead=3)
    for taken in range(10):
        next(results)
        assert started <= taken + 1 + 3
    results.close()
    assert started <= 13


def test_an_error_comes_with_its_item_and_ends_the_threads() -> None:
    def fail_at_two(item: int) -> int:
        if item == 2:
            raise ValueError("two")
        return item

    results = read_ahead(fail_at_two, range(100), threads=2, ahead=2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]
