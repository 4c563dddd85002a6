"""Figures written for people."""

from __future__ import annotations

MOST_NAME = 300
"""Characters of a name or message that the page repeats."""


def human_seconds(seconds: float) -> str:
    """75 → "1 min 15 s"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours / 24:.1f} days"


def human_bytes(count: float) -> str:
    """1536 → "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def clip(text: str | None, most: int = MOST_NAME) -> str:
    """The text, cut where it is longer than ``most`` characters."""
    text = text or ""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def percent(share: float | None) -> str:
    """0.123 → "12 %"; small shares with two significant digits, and a dash for None."""
    if share is None:
        return "–"
    value = 100 * share
    return f"{value:.0f} %" if value >= 10 or value == 0 else f"{value:.2g} %"


def figure(value: float | None) -> str:
    """A number with three significant digits, or whole with separators from 1000 on; a dash for None."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
