"""Figures written for people."""

from __future__ import annotations

import pytest

from tinysam.report.text import clip, figure, human_bytes, human_seconds, percent


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.2 s"), (42.4, "42 s"), (75, "1 min 15 s"), (7384, "2 h 3 min"), (400_000, "4.6 days")],
)
def test_durations(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (5 << 50, "5,120.0 TiB")]
)
def test_sizes(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0.5, "50 %"), (0.0123, "1.2 %"), (0, "0 %"), (1, "100 %"), (1e-6, "0.0001 %"), (None, "–")]
)
def test_shares(share: float | None, text: str) -> None:
    assert percent(share) == text


@pytest.mark.parametrize(("value", "text"), [(0.12345, "0.123"), (12.345, "12.3"), (12345.6, "12,346"), (None, "–")])
def test_figures(value: float | None, text: str) -> None:
    assert figure(value) == text


def test_long_texts_are_cut_and_short_ones_are_not() -> None:
    assert clip("x" * 400, 10) == "x" * 9 + "…"
    assert clip("short") == "short"
    assert clip(None) == ""
