"""A page with the curves of a training run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import resources

from markupsafe import Markup

from tinysam.distill.history import Line
from tinysam.distill.losses import TERMS
from tinysam.distill.validation import SCORES
from tinysam.report.charts import line_chart

CURVES_FILE = "curves.html"
_CHARTS = (
    ("Loss", ("loss", *TERMS), True),
    ("Validation IoU", tuple(f"val_{name}" for name in SCORES), False),
    ("Learning rate", ("learning_rate",), False),
    ("Images a second", ("images_per_second",), False),
    ("Share of time waiting for data", ("waiting_share",), False),
)


def curves_page(title: str, lines: Sequence[Line]) -> str:
    """An HTML page without scripts or outside resources: losses, scores and speed over optimizer steps."""
    style = resources.files("tinysam.report").joinpath("templates/report.css").read_text(encoding="utf-8")
    sections = Markup().join(
        Markup("<h2>{}</h2><figure>{}</figure>").format(heading, line_chart(curves, log=log))
        for heading, names, log in _CHARTS
        if (curves := {name: _curve(lines, name) for name in names if any(name in line for line in lines)})
    )
    return Markup(
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>{}</title><style>{}</style>'
        "<main><h1>{}</h1>{}</main></html>\n"
    ).format(title, Markup(style), title, sections)


def _curve(lines: Sequence[Line], name: str) -> tuple[list[float], list[float]]:
    # Steps that a run made twice, having died between them and a checkpoint, count as they were made last.
    points = {line["step"]: line[name] for line in lines if math.isfinite(line.get(name, math.nan))}
    steps = sorted(points)
    return steps, [points[step] for step in steps]
