"""Charts as inline SVG: shapes stretch with the page, and their text is HTML, so that it stays readable."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from tinysam.report.histogram import Histogram, round_ticks

Format = Callable[[float], str]

BARS = 40
POINTS = 400
"""Points of a curve that are drawn; more would only make the page larger."""
SERIES_COLOURS = 8
"""Colours that the style sheet names ``--series-0`` and so on."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Values from ``low`` to ``high`` mapped to 0..100."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """Position of a value, in percent."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        return 100 * (self._scaled(value) - low) / (high - low) if high > low else 0.0

    def ticks(self, count: int) -> list[float]:
        """Round values on the axis, about ``count`` of them."""
        if not self.log:
            return round_ticks(self.low, self.high, count)
        low, high = math.log10(self.low), math.log10(self.high)
        digits = (1,) if high - low >= 2 else (1, 2, 5)
        values = [digit * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for digit in digits]
        values = [value for value in values if low - 1e-9 <= math.log10(value) <= high + 1e-9]
        return values[:: math.ceil(len(values) / (count + 1))] if values else []

    def _scaled(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.log else value


def histogram_chart(
    histogram: Histogram, *, describe: Format, unit: str, log: bool = False, whole: bool = False
) -> Markup:
    """Bars with ticks below.

    Args:
        describe: writes a value of the axis.
        unit: what is counted, for the bars' titles.
        log: whether the histogram's bins are logarithmic.
        whole: whether the values are whole numbers, and so the ticks.
    """
    shown = histogram.trimmed(bars=BARS)
    if not shown.size:
        return Markup('<p class="muted">No values.</p>')
    x = Axis(low=float(shown.edges[0]), high=float(shown.edges[-1]), log=log)
    y = Axis(low=0, high=float(shown.counts.max()) * 1.06)
    bars = []
    for low, high, count in zip(shown.edges[:-1], shown.edges[1:], shown.counts, strict=True):
        left, right = x.place(low), x.place(high)
        gap = 0.12 * (right - left)
        # A bar that is there must be seen, however high its neighbours are.
        height = max(y.place(float(count)), 0.8) if count else 0
        title = escape(f"{describe(low)} to {describe(high)}: {count:,} {unit}")
        bars.append(
            f'<rect x="{left + gap / 2:.3f}" y="{100 - height:.3f}" width="{right - left - gap:.3f}" '
            f'height="{height:.3f}"><title>{title}</title></rect>'
        )
    svg = f'<svg class="bars" viewBox="0 0 100 100" preserveAspectRatio="none">{_grid(y)}{"".join(bars)}</svg>'
    return Markup(f'<div class="plot">{svg}{_y_labels(y, _compact)}</div>{_x_labels(x, describe, whole)}')


def line_chart(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, log: bool = False) -> Markup:
    """Curves over a common axis of whole numbers (steps, clicks), with a legend.

    Args:
        curves: x and y of each curve by its name; values that are not finite are left out.
        log: logarithmic y where all values allow it.
    """
    series = {name: points for name, (xs, ys) in curves.items() if len(points := _finite(xs, ys)) > 0}
    if not series:
        return Markup('<p class="muted">No values.</p>')
    every = np.concatenate(list(series.values()))
    low, high = float(every[:, 1].min()), float(every[:, 1].max())
    log = log and low > 0 and high / low > 4
    pad = 0.06 * (high - low) or abs(high) or 1.0
    y = (
        Axis(low=low / 1.1, high=high * 1.1, log=True)
        if log
        else Axis(low=max(low - pad, min(low, 0.0)), high=high + pad)
    )
    x = Axis(low=float(every[:, 0].min()), high=float(every[:, 0].max()))
    lines, names = [], []
    for index, (name, points) in enumerate(series.items()):
        colour = f"var(--series-{index % SERIES_COLOURS})"
        # A line that goes nowhere has round ends: a dot.
        drawn = _thin(points) if len(points) > 1 else np.repeat(points, 2, axis=0)
        path = " ".join(f"{x.place(px):.2f},{100 - y.place(py):.2f}" for px, py in drawn)
        lines.append(
            f'<polyline{" class=dot" if len(points) == 1 else ""} points="{path}" style="stroke:{colour}">'
            f"<title>{escape(name)}</title></polyline>"
        )
        names.append(
            f'<li><i style="background:{colour}"></i>{escape(name)} <b>{_compact(float(points[-1, 1]))}</b></li>'
        )
    svg = f'<svg class="lines" viewBox="0 0 100 100" preserveAspectRatio="none">{_grid(y)}{"".join(lines)}</svg>'
    axis = _x_labels(x, lambda value: f"{value:,.0f}", whole=True)
    return Markup(
        f'<div class="plot">{svg}{_y_labels(y, _compact)}</div>{axis}<ul class="legend">{"".join(names)}</ul>'
    )


def share_bar(parts: Sequence[tuple[str, float, str]], *, order: Sequence[str]) -> Markup:
    """One bar split into coloured parts, with a legend.

    Args:
        parts: name, size and what to write beside the name.
        order: names from left to right; bars with the same order have the same colours.
    """
    total = sum(size for _, size, _ in parts) or 1.0
    places = {name: place for place, name in enumerate(order)}
    rects, names, left = [], [], 0.0
    for name, size, note in sorted(parts, key=lambda part: places[part[0]]):
        colour, width = f"var(--series-{places[name] % SERIES_COLOURS})", 100 * size / total
        rects.append(
            f'<rect x="{left:.3f}" y="0" width="{width:.3f}" height="100" style="fill:{colour}">'
            f"<title>{escape(name)}: {escape(note)}</title></rect>"
        )
        names.append(f'<li><i style="background:{colour}"></i>{escape(name)} <b>{escape(note)}</b></li>')
        left += width
    svg = f'<svg class="share" viewBox="0 0 100 100" preserveAspectRatio="none">{"".join(rects)}</svg>'
    return Markup(f'{svg}<ul class="legend">{"".join(names)}</ul>')


def _finite(xs: Sequence[float], ys: Sequence[float]) -> np.ndarray:
    points = np.stack([np.asarray(xs, np.float64), np.asarray(ys, np.float64)], axis=1)
    return points[np.isfinite(points).all(axis=1)]


def _thin(points: np.ndarray) -> np.ndarray:
    """At most ``POINTS`` points: means of neighbours, so that noise is smoothed rather than sampled."""
    if len(points) <= POINTS:
        return points
    return np.stack([part.mean(axis=0) for part in np.array_split(points, POINTS)])


def _grid(y: Axis) -> str:
    return "".join(
        f'<line class="grid" x1="0" x2="100" y1="{100 - y.place(tick):.2f}" y2="{100 - y.place(tick):.2f}"/>'
        for tick in y.ticks(4)
    )


def _y_labels(y: Axis, describe: Format) -> str:
    labels = "".join(
        f'<span style="bottom:{y.place(tick):.2f}%">{escape(describe(tick))}</span>' for tick in y.ticks(4) if tick
    )
    return f'<div class="y-axis" aria-hidden="true">{labels}</div>'


def _x_labels(x: Axis, describe: Format, whole: bool = False) -> str:
    labels = []
    for tick in x.ticks(5):
        if whole and tick != round(tick):
            continue
        place = x.place(tick)
        # Labels at the ends would stick out of the chart if they were centred.
        shift = "0" if place < 4 else "-100%" if place > 96 else "-50%"
        labels.append(f'<span style="left:{place:.2f}%;transform:translateX({shift})">{escape(describe(tick))}</span>')
    return f'<div class="x-axis">{"".join(labels)}</div>'


def _compact(value: float) -> str:
    """1,234,567 → "1.2M"; small numbers with three significant digits."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scaled = value / (1e3 if suffix == "k" else limit)
            return f"{scaled:.3g}{suffix}"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
