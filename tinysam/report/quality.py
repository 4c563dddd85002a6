"""Tables of quality from the results that ``pipelines/evaluate.py`` leaves."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tinysam.lake.filesystem import LakeError, MissingError, join, read_bytes, redact_url

RESULTS_FILE = "results.json"
MOST_DATASETS, MOST_ROWS, MOST_COLUMNS = 12, 60, 8

_CLICKS = re.compile(r"click_miou_(\d+)")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One figure."""

    value: float
    low: float | None
    """Lower end of its interval, where it has one."""
    high: float | None


@dataclass(frozen=True, kw_only=True)
class QualityTable:
    """Metrics by model on one data set."""

    dataset: str
    images: int
    """With ground truth."""
    teacher: str | None
    """Model whose masks were taken for ground truth."""
    columns: tuple[str, ...]
    """Models."""
    rows: tuple[tuple[str, str, tuple[Cell | None, ...]], ...]
    """Key of a metric, what it means, and its value for each model."""

    @property
    def clicks(self) -> dict[str, tuple[list[float], list[float]]]:
        """For each model, numbers of clicks and mIoU after them; only where there is more than one number."""
        found = [(int(match[1]), cells) for key, _, cells in self.rows if (match := _CLICKS.fullmatch(key))]
        if len(found) < 2:
            return {}
        curves = {}
        for place, name in enumerate(self.columns):
            points = sorted((clicks, cell.value) for clicks, cells in found if (cell := cells[place]) is not None)
            curves[name] = ([float(clicks) for clicks, _ in points], [value for _, value in points])
        return curves


def read_quality(url: str) -> list[QualityTable]:
    """The tables in ``<url>/results.json``; none where there is no such file.

    Raises:
        LakeError: if the file cannot be read or is not one of ``pipelines/evaluate.py``.
    """
    path = join(url, RESULTS_FILE)
    try:
        results = json.loads(read_bytes(path))
        return [_table(name, dataset) for name, dataset in list(results["datasets"].items())[:MOST_DATASETS]]
    except MissingError:
        return []
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LakeError(
            f"{redact_url(path)} is not what pipelines/evaluate.py writes ({type(error).__name__}: {error}). Give the "
            "output folder of an evaluation, or run it again."
        ) from error


def _table(name: str, dataset: Mapping[str, Any]) -> QualityTable:
    from tinysam.eval.results import title  # loads torch, which a report without an evaluation need not wait for

    columns = dict(list(dataset["checkpoints"].items())[:MOST_COLUMNS])
    metrics = [entry["metrics"] for entry in columns.values()]
    keys = list(dict.fromkeys(key for values in metrics for key in values))[:MOST_ROWS]
    return QualityTable(
        dataset=name,
        images=int(dataset["images"]),
        teacher=str(dataset["teacher"]) if dataset.get("teacher") else None,
        columns=tuple(columns),
        rows=tuple((key, title(key), tuple(_cell(values.get(key)) for values in metrics)) for key in keys),
    )


def _cell(metric: Mapping[str, Any] | None) -> Cell | None:
    value = _finite(metric["value"]) if metric else None
    if metric is None or value is None:
        return None
    return Cell(value=value, low=_finite(metric["low"]), high=_finite(metric["high"]))


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
