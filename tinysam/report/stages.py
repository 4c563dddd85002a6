"""What the folders of other jobs say about themselves: speed, time, settings, training curves."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tinysam.lake.filesystem import LakeError, MissingError, join, read_bytes, redact_url
from tinysam.lake.run_record import RunRecord, read_run_record, redact
from tinysam.report.quality import QualityTable, read_quality
from tinysam.report.text import human_bytes, human_seconds, percent

HISTORY_FILE = "history.csv"
MOST_TEXT = 20_000
"""Characters of a configuration that the page repeats."""
MOST_FACTS = 24

# In the order in which a student comes about, with what the page calls them.
TITLES = {
    "cache_teacher": "Cache",
    "distill": "Distil",
    "quantize": "Quantize",
    "label_images": "Label",
    "evaluate": "Evaluate",
}
_LOSS_COLUMNS = ("loss", "embedding", "token", "output", "focal", "dice", "cross_entropy", "iou")
_LOSS_NAMES = {"loss": "total", "cross_entropy": "cross-entropy", "iou": "IoU"}
_QUANTIZATION = (
    *("bytes_int8_encoder", "bytes_float_encoder", "int8_ms", "engine_fp32_ms", "torch_fp32_ms"),
    *("mask_iou", "mask_iou_90", "layers_int8", "layers"),
)
_SCORE_COLUMNS = {
    "val_box": "box",
    "val_click": "one click",
    "val_click_3": "three clicks",
    "val_click_best": "one click, best of three",
}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One output folder."""

    url: str
    record: RunRecord | None
    """None where the job has not got so far as to write one."""
    losses: Mapping[str, tuple[list[float], list[float]]]
    """Training curves by name: steps and values."""
    scores: Mapping[str, tuple[list[float], list[float]]]
    """Validation curves by name: steps and values."""
    quality: tuple[QualityTable, ...]
    parts: tuple[Stage, ...] = ()
    """Runs of its own that the job consists of: an evaluation has one for each model."""

    @property
    def job(self) -> str:
        """Name of the pipeline; the folder's where that is not known."""
        return self.record.job if self.record else self.url.rstrip("/").rsplit("/", 1)[-1]

    @property
    def title(self) -> str:
        """What the page calls it."""
        return TITLES.get(self.job, self.job)

    @property
    def finished(self) -> bool | None:
        """Whether the job said that it had done all; None where it does not say."""
        value = self.record.extra.get("finished") if self.record else None
        return value if isinstance(value, bool) else None

    @property
    def time_parts(self) -> list[tuple[str, float, str]]:
        """Where the time went: name, seconds, and a text with seconds and share."""
        split = self.record.time_split if self.record else {}
        parts = {name: float(seconds) for name, seconds in split.items() if _is_number(seconds) and seconds > 0}
        total = sum(parts.values())
        return [
            (name.replace("_", " "), seconds, f"{human_seconds(seconds)} ({percent(seconds / total)})")
            for name, seconds in parts.items()
        ]

    @property
    def time_order(self) -> list[str]:
        """Names of the time's parts, those of ``parts`` included, the largest in all first."""
        totals: Counter[str] = Counter()
        for stage in (self, *self.parts):
            totals.update({name: seconds for name, seconds, _ in stage.time_parts})
        return [name for name, _ in totals.most_common()]

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What only this job has to say, as far as it fits a line each."""
        extra = self.record.extra if self.record else {}
        left_out = {"finished", *(_QUANTIZATION if self.quantization else ())}
        named = [(name.replace("_", " "), _fact(name, value)) for name, value in _flat(extra) if name not in left_out]
        return [(name, text) for name, text in named if text][:MOST_FACTS]

    @property
    def quantization(self) -> list[tuple[str, str, str]]:
        """What quantizing gained and cost: title, figure and what to compare it with."""
        extra = self.record.extra if self.record else {}
        found = {name: float(extra[name]) for name in _QUANTIZATION if _is_number(extra.get(name))}
        if self.job != "quantize" or len(found) < len(_QUANTIZATION):
            return []
        size, float_size = found["bytes_int8_encoder"], found["bytes_float_encoder"]
        return [
            ("Encoder in int8", human_bytes(size), f"{percent(size / float_size)} of {human_bytes(float_size)}"),
            (
                "Encoder, an image",
                f"{found['int8_ms']:.0f} ms",
                f"float {found['engine_fp32_ms']:.0f} ms, torch {found['torch_fp32_ms']:.0f} ms",
            ),
            (
                "Agreement of masks",
                f"{found['mask_iou']:.3f}",
                f"IoU with the float model’s; {percent(found['mask_iou_90'])} above 0.9",
            ),
            ("Layers in int8", f"{found['layers_int8']:.0f}", f"of {found['layers']:.0f}"),
        ]

    @property
    def config_text(self) -> str:
        """The resolved configuration, as JSON."""
        return _clipped(_pretty(self.record.config)) if self.record else ""

    @property
    def versions(self) -> str:
        """Packages and their versions, in one line."""
        return ", ".join(f"{name} {version}" for name, version in self.record.versions.items()) if self.record else ""

    @property
    def machine(self) -> str:
        """The machine that started the job, in one line."""
        machine = dict(self.record.machine) if self.record else {}
        memory = machine.get("memory_bytes")
        parts = [
            machine.get("processor"),
            f"{machine['cpus']} CPUs" if machine.get("cpus") else None,
            f"{memory / 2**30:.0f} GiB" if isinstance(memory, int) else None,
            *(machine.get("gpus") or ()),
            machine.get("system"),
        ]
        return ", ".join(str(part) for part in parts if part)


def read_stage(url: str) -> Stage:
    """Reads what a job left in its output folder.

    Raises:
        LakeError: if there is neither a run record nor anything else that is known, or a file cannot be read.
    """
    record = _read_record(url)
    losses, scores = _read_history(url)
    quality = read_quality(url)
    if record is None and not losses and not quality:
        raise LakeError(f"{redact_url(url)} holds neither run.json nor results: is it the output folder of a job?")
    models = dict.fromkeys(column for table in quality for column in table.columns)
    parts = [(name, _read_record(join(url, name))) for name in models]
    return Stage(
        url=redact_url(url),
        record=record,
        losses=losses,
        scores=scores,
        quality=tuple(quality),
        parts=tuple(
            Stage(url=name, record=part, losses={}, scores={}, quality=()) for name, part in parts if part is not None
        ),
    )


def in_order(stages: list[Stage]) -> list[Stage]:
    """The stages in the order in which a student comes about; unknown jobs last, in the order given."""
    known = list(TITLES)
    return sorted(stages, key=lambda stage: known.index(stage.job) if stage.job in known else len(known))


def _read_record(url: str) -> RunRecord | None:
    record = read_run_record(url)
    # The page goes to more people than the folder does, so nothing is left to whoever wrote the record.
    return record and replace(record, config=redact(record.config), extra=redact(record.extra))


Curves = dict[str, tuple[list[float], list[float]]]


def _read_history(url: str) -> tuple[Curves, Curves]:
    try:
        text = read_bytes(join(url, HISTORY_FILE)).decode("utf-8", "replace")
    except MissingError:
        return {}, {}
    rows = list(csv.DictReader(io.StringIO(text)))
    losses = {_LOSS_NAMES.get(name, name): _curve(rows, name) for name in _LOSS_COLUMNS}
    scores = {title: _curve(rows, name) for name, title in _SCORE_COLUMNS.items()}
    return {k: v for k, v in losses.items() if v[0]}, {k: v for k, v in scores.items() if v[0]}


def _curve(rows: list[dict[str, str]], name: str) -> tuple[list[float], list[float]]:
    points = [(_number(row.get("step")), _number(row.get(name))) for row in rows]
    kept = [(step, value) for step, value in points if math.isfinite(step) and math.isfinite(value)]
    return [step for step, _ in kept], [value for _, value in kept]


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Scalars of nested mappings; lists, paths and URLs are left out, as they do not fit a line."""
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{name} ")
        elif isinstance(value, int | float | bool) or (isinstance(value, str) and "/" not in value):
            found.append((f"{prefix}{name}", value))
    return found


def _fact(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not _is_number(value):
        return str(value)[:200]
    if "bytes" in name:
        return human_bytes(value)
    if "seconds" in name:
        return human_seconds(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _pretty(values: Any) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False)


def _clipped(text: str) -> str:
    return text if len(text) <= MOST_TEXT else text[:MOST_TEXT] + "\n…"
