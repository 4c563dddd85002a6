from __future__ import annotations

import pytest

from tinysam.lake import patience
from tinysam.lake.filesystem import LakeError, TransientError
from tinysam.lake.patience import patiently


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were slept, without sleeping."""
    slept: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", slept.append)
    return slept


def failing(times: int, error: Exception) -> tuple[list[int], object]:
    calls: list[int] = []

    def function() -> str:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return "done"

    return calls, function


def test_what_fails_for_a_moment_is_tried_again_after_growing_waits(waits: list[float]) -> None:
    calls, function = failing(4, TransientError("busy"))
    assert patiently(function, attempts=5, first_wait=1.0) == "done"  # type: ignore[arg-type]
    assert len(calls) == 5
    assert all(0.5 * 2**i <= wait <= 2**i for i, wait in enumerate(waits))


def test_what_keeps_failing_is_given_up(waits: list[float]) -> None:
    calls, function = failing(100, TransientError("busy"))
    with pytest.raises(TransientError, match="busy"):
        patiently(function, attempts=3)  # type: ignore[arg-type]
    assert (len(calls), len(waits)) == (3, 2)


def test_what_is_permanent_is_not_tried_again(waits: list[float]) -> None:
    calls, function = failing(1, LakeError("denied"))
    with pytest.raises(LakeError, match="denied"):
        patiently(function)  # type: ignore[arg-type]
    assert (len(calls), waits) == (1, [])
