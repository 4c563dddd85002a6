"""Charts as inline SVG."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from tinysam.report.charts import Axis, histogram_chart, line_chart, share_bar
from tinysam.report.histogram import Histogram


def numbers(svg: str, attribute: str) -> list[float]:
    return [float(value) for value in re.findall(rf'\b{attribute}="([-\d.]+)"', svg)]


def test_bars_are_as_high_as_their_counts_and_stay_inside() -> None:
    histogram = Histogram.linear(0, 1, 10).add(np.array([0.05] * 4 + [0.15] * 2 + [0.95]))
    chart = histogram_chart(histogram, describe=lambda v: f"{v:.1f}", unit="masks")
    bars = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)">', chart)
    x, y, width, height = np.array(bars, float).T
    assert height[0] == pytest.approx(2 * height[1], rel=0.01)
    assert height[2:9].max() == 0
    assert height[9] > 0
    assert y + height == pytest.approx(np.full(10, 100.0))
    assert x.min() >= 0
    assert (x + width).max() <= 100
    assert "0.0 to 0.1: 4 masks" in chart


def test_a_single_value_among_a_million_can_be_seen() -> None:
    counts = np.array([10**6, 0, 1])
    chart = histogram_chart(
        Histogram(edges=np.array([0.0, 1, 2, 3]), counts=counts), describe=lambda v: f"{v:.0f}", unit="images"
    )
    heights = [float(h) for h in re.findall(r' height="([\d.]+)"><title>', chart)]
    assert heights[1] == 0
    assert heights[2] >= 0.5


def test_values_that_lie_in_one_bin_are_drawn() -> None:
    chart = histogram_chart(Histogram.linear(0, 1, 10).add(np.array([0.5])), describe=str, unit="masks")
    assert chart.count("<rect") == 1


def test_without_values_the_chart_says_so() -> None:
    assert "No values" in histogram_chart(Histogram.linear(0, 1, 10), describe=str, unit="masks")
    assert "No values" in line_chart({"loss": ([1.0], [math.nan])})


def test_curves_stay_inside_and_leave_out_what_is_not_finite() -> None:
    chart = line_chart({"loss": ([1, 2, 3, 4], [5.0, math.inf, 2.0, 1.0]), "iou": ([1, 4], [0.5, 0.9])}, log=True)
    curves = re.findall(r'<polyline points="([^"]+)"', chart)
    assert [len(curve.split()) for curve in curves] == [3, 2]
    for curve in curves:
        points = np.array([[float(v) for v in point.split(",")] for point in curve.split()])
        assert points.min() >= 0
        assert points.max() <= 100
    assert "loss <b>1</b>" in chart


def test_long_curves_are_thinned_without_losing_their_ends() -> None:
    steps = list(range(100_000))
    chart = line_chart({"loss": (steps, [1 + 1 / (1 + step) for step in steps])})
    assert len(chart) < 12_000
    assert "100,000" in chart or "80,000" in chart


@pytest.mark.parametrize("values", [[3.0, 3.0], [0.0, 0.0], [-2.0, -1.0], [1e-12, 1e-3]])
def test_flat_and_tiny_curves_are_drawn(values: list[float]) -> None:
    for log in (False, True):
        chart = line_chart({"loss": ([0.0, 1.0], values)}, log=log)
        assert "nan" not in chart
        assert chart.count("<polyline") == 1


def test_a_single_point_is_a_dot() -> None:
    assert re.search(r"<polyline class=dot points=\"([\d.]+,[\d.]+) \1\"", line_chart({"loss": ([10.0], [2.0])}))


def test_a_bar_is_split_by_size_in_the_order_asked_for() -> None:
    bar = share_bar([("read", 1.0, "1 s"), ("segment", 3.0, "3 s")], order=["segment", "read"])
    assert numbers(bar, "width") == [75.0, 25.0]
    assert bar.index("segment") < bar.index("read")
    alone = share_bar([("read", 2.0, "2 s")], order=["segment", "read"])
    assert "var(--series-1)" in alone, "a name keeps its colour among bars of one order"


def test_names_from_strangers_are_escaped() -> None:
    evil = '<script>"&'
    for chart in (
        line_chart({evil: ([0.0, 1.0], [0.0, 1.0])}),
        share_bar([(evil, 1.0, evil)], order=[evil]),
        histogram_chart(Histogram.linear(0, 1, 2).add(np.array([0.1])), describe=lambda _: evil, unit=evil),
    ):
        assert "<script>" not in chart
        assert "&lt;script&gt;" in chart


def test_logarithmic_ticks_are_powers_of_ten_or_their_simple_multiples() -> None:
    assert Axis(low=1e-4, high=1, log=True).ticks(5) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1])
    assert Axis(low=0.9, high=6, log=True).ticks(5) == pytest.approx([1, 2, 5])
    assert Axis(low=0.1, high=0.1, log=True).place(0.1) == 0


def test_whole_numbers_have_whole_ticks() -> None:
    def ticks(values: list[float]) -> list[str]:
        histogram = Histogram(edges=np.arange(30) - 0.5, counts=np.zeros(29, np.int64)).add(np.array(values))
        chart = histogram_chart(histogram, describe=lambda v: f"{math.ceil(v)}", unit="images", whole=True)
        return re.findall(r"translateX\([^)]*\)\">(\d+)<", chart)

    assert ticks([0.0]) == ["0"]
    assert ticks([0.0, 3.0, 16.0]) == ["0", "5", "10", "15"]
