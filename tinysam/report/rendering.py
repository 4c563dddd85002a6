"""From templates to a page that needs no other file."""

from __future__ import annotations

import base64
import functools
import hashlib
from datetime import UTC, datetime
from typing import Any

import jinja2
from markupsafe import Markup

from tinysam.lake.run_record import package_versions
from tinysam.report import charts
from tinysam.report.text import clip, figure, human_seconds, percent


def render(template: str, **values: Any) -> str:
    """Fills a template of ``tinysam/report/templates``; what is not ``Markup`` is escaped."""
    environment = _environment()
    assert environment.loader is not None
    script, _, _ = environment.loader.get_source(environment, "report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return environment.get_template(template).render(
        **values,
        share_bar=charts.share_bar,
        line_chart=charts.line_chart,
        script=Markup(script),
        script_hash=digest,
        version=package_versions().get("tinysam", ""),
        now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tinysam.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"clip": clip, "duration": human_seconds, "percent": percent, "figure": figure}
    return environment
