"""Results side by side: JSON for programs, Markdown for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tinysam.eval.bootstrap import Metric

if TYPE_CHECKING:
    from tinysam.eval.reduce import Reduction

_FIXED_NAMES = {
    "ap": "mask AP",
    "ap_50": "mask AP50",
    "ap_75": "mask AP75",
    "ap_small": "mask AP, small",
    "ap_medium": "mask AP, medium",
    "ap_large": "mask AP, large",
    "ap_rare": "mask AP, rare categories",
    "ap_common": "mask AP, common categories",
    "ap_frequent": "mask AP, frequent categories",
    "box_miou": "box mIoU",
    "best_match_miou": "everything: best-match mIoU",
    "masks_per_image": "everything: masks an image",
}


def title(metric: str) -> str:
    """What a metric's key means, for a table: ``"ar_1000_small"`` is "everything: AR@1000, small"."""
    if metric in _FIXED_NAMES:
        return _FIXED_NAMES[metric]
    if metric.startswith("click_miou_"):
        clicks = metric.removeprefix("click_miou_")
        return f"mIoU after {clicks} click{'s' * (clicks != '1')}"
    if metric.startswith("ar_"):
        limit, _, size = metric.removeprefix("ar_").partition("_")
        return f"everything: AR@{limit}" + (f", {size}" if size else "")
    if metric.endswith("_single"):
        return title(metric.removesuffix("_single")) + ", single mask"
    return metric


def to_json(metrics: Mapping[str, Metric]) -> dict[str, dict[str, float | int | None]]:
    """Plain values; NaN, which JSON does not have, becomes None."""
    return {
        name: {key: None if math.isnan(value) else value for key, value in asdict(metric).items()}
        for name, metric in metrics.items()
    }


def dataset_results(
    lake: str,
    annotations: str | None,
    models: Mapping[str, tuple[str, str]],
    reductions: Mapping[str, Reduction],
    *,
    teacher: str | None = None,
    seconds_per_image: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, Any]:
    """A data set's part of ``results.json``.

    Args:
        lake: where its images lie.
        annotations: the file with its ground truth, if there is one.
        models: checkpoint and its SHA-256 by label.
        reductions: by label.
        teacher: the model whose masks were the ground truth.
        seconds_per_image: by label and stage.
    """
    return {
        "lake": lake,
        "annotations": annotations,
        "teacher": teacher,
        "images": max(reduction.images for reduction in reductions.values()),
        "checkpoints": {
            label: {
                "checkpoint": models[label][0],
                "sha256": models[label][1],
                "images": reduction.images,
                "images_without_ground_truth": reduction.without_ground_truth,
                "statuses": reduction.statuses,
                "metrics": to_json(reduction.metrics),
                "seconds_per_image": (seconds_per_image or {}).get(label, {}),
            }
            for label, reduction in reductions.items()
        },
    }


def to_markdown(results: Mapping[str, Any]) -> str:
    """A table for each data set, a column for each checkpoint; values with their 95 % intervals.

    Args:
        results: the content of ``results.json``.
    """
    return "\n\n".join(_section(name, dataset) for name, dataset in results["datasets"].items()) + "\n"


def _section(name: str, dataset: Mapping[str, Any]) -> str:
    columns = {label: entry["metrics"] for label, entry in dataset["checkpoints"].items()}
    names = list(dict.fromkeys(metric for metrics in columns.values() for metric in metrics))
    lines = [
        f"## {name}",
        "",
        f"{dataset['images']} images {_truth(dataset)}. In brackets the 95 % interval from resampling images.",
        "",
        "| | n | " + " | ".join(columns) + " |",
        "| --- | ---: |" + " ---: |" * len(columns),
    ]
    for metric in names:
        cells = [metrics.get(metric) for metrics in columns.values()]
        counts = {str(cell["n"]) for cell in cells if cell is not None}
        lines.append(f"| {title(metric)} | {', '.join(sorted(counts))} | {' | '.join(map(_cell, cells))} |")
    return "\n".join([*lines, *_times(dataset)])


def _truth(dataset: Mapping[str, Any]) -> str:
    teacher = dataset.get("teacher")
    return f"with the masks of {teacher} as ground truth" if teacher else "with ground truth"


def _times(dataset: Mapping[str, Any]) -> list[str]:
    """A table of where the time went; nothing where none was measured."""
    columns = {label: entry.get("seconds_per_image", {}) for label, entry in dataset["checkpoints"].items()}
    stages = list(dict.fromkeys(stage for seconds in columns.values() for stage in seconds))
    if not stages:
        return []
    rows = [[f"{seconds[stage]:.3f}" if stage in seconds else "–" for seconds in columns.values()] for stage in stages]
    return [
        "",
        "Seconds an image, by stage:",
        "",
        "| | " + " | ".join(columns) + " |",
        "| --- |" + " ---: |" * len(columns),
        *(f"| {stage} | {' | '.join(cells)} |" for stage, cells in zip(stages, rows, strict=True)),
    ]


def _cell(metric: Mapping[str, Any] | None) -> str:
    if metric is None or metric["value"] is None:
        return "–"
    digits = 1 if metric["value"] > 1 else 3
    text = f"{metric['value']:.{digits}f}"
    if metric["low"] is None:
        return text
    return f"{text} [{metric['low']:.{digits}f}, {metric['high']:.{digits}f}]"
