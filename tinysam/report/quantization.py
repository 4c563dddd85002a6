"""The page about a quantized model: what it gained and cost, and every layer with its scales and its error."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from tinysam.lake.filesystem import LakeError, join, read_bytes, redact_url
from tinysam.report.rendering import render
from tinysam.report.stages import read_stage

REPORT_FILE, PAGE_FILE = "report.json", "report.html"
"""What ``pipelines/quantize.py`` says about the model beside it, for programs and for people."""


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """A layer, in words."""

    name: str
    kind: str
    precision: str
    reason: str
    """Why it stayed in float; empty where it did not."""
    activations: str
    """Their steps, and zero points other than 0."""
    weights: str
    """The smallest and the largest step of the channels."""
    error: float | None
    """Relative error of its result."""
    share: float
    """Of the largest error, between 0 and 1."""


def render_quantization(folder: str) -> str:
    """The page as a string.

    Args:
        folder: output of ``pipelines/quantize.py``.

    Raises:
        LakeError: if the folder's report or run record is missing, or is not one of that job.
    """
    stage = read_stage(folder)
    path = join(folder, REPORT_FILE)
    try:
        report = json.loads(read_bytes(path))
        layers = _rows(report["layers"])
        executed = report["report"]["executed"]
        engine = f"{report['report']['engine']}, {report['report']['precision']} beside the integers"
        sizes = (int(report["bytes_int8_model"]), int(report["bytes_float_model"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LakeError(
            f"{redact_url(path)} is not what pipelines/quantize.py writes ({type(error).__name__}: {error}); "
            "quantize the model again"
        ) from error
    return render(
        "quantization.html.j2",
        stages=[stage],
        name=str((stage.record.config.get("student") if stage.record else None) or folder),
        source=redact_url(folder),
        layers=layers,
        executed=executed,
        engine=engine,
        sizes=sizes,
    )


def _rows(layers: Sequence[dict[str, object]]) -> list[LayerRow]:
    errors = [layer["relative_error"] for layer in layers]
    largest = max((error for error in errors if isinstance(error, float)), default=0.0) or 1.0
    return [
        LayerRow(
            name=str(layer["name"]),
            kind=str(layer["kind"]),
            precision=str(layer["precision"]),
            reason=str(layer["reason"] or ""),
            activations=_activations(layer["activation_scales"], layer["activation_zero_points"]),  # type: ignore[arg-type]
            weights=" – ".join(f"{step:.2g}" for step in layer["weight_scales"]),  # type: ignore[attr-defined]
            error=error if isinstance(error, float) else None,
            share=error / largest if isinstance(error, float) else 0.0,
        )
        for layer, error in zip(layers, errors, strict=True)
    ]


def _activations(scales: Sequence[float], zero_points: Sequence[int]) -> str:
    return ", ".join(
        f"{scale:.3g}" + (f" (0 at {zero})" if zero else "") for scale, zero in zip(scales, zero_points, strict=True)
    )
