from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinysam.lake.filesystem import LakeError
from tinysam.report.quantization import REPORT_FILE, render_quantization

EVIL = "<script>alert(1)</script>"


def layer(name: str, error: float | None, **values: Any) -> dict[str, Any]:
    return {
        "name": name,
        "kind": "conv",
        "precision": "int8" if error is not None else "float32",
        "reason": None if error is not None else "float_layers names it",
        "activation_scales": [0.0123456],
        "activation_zero_points": [7],
        "weight_scales": [0.00051, 0.0042],
        "relative_error": error,
        **values,
    }


@pytest.fixture
def folder(make_stages: Callable[[], dict[str, Path]]) -> Path:
    """The output of a run, as far as the page reads it."""
    folder = make_stages()["quantized"]
    report = {
        "bytes_float_model": 1000,
        "bytes_int8_model": 370,
        "report": {"engine": "openvino", "precision": "bf16", "executed": {"Convolution": {"u8": 3, "bf16": 1}}},
        "layers": [layer(f"worst {EVIL}", 0.25), layer("better", 0.0625), layer("none", None)],
    }
    (folder / REPORT_FILE).write_text(json.dumps(report))
    return folder


def test_the_page_has_each_layer_with_its_steps_and_its_error(folder: Path) -> None:
    page = render_quantization(str(folder))
    for text in ("0.2500", "0.0625", "0.0123 (0 at 7)", "0.00051 – 0.0042", "float_layers names it", "3 × u8", "37 %"):
        assert text in page, text
    assert "width:25.0%" in page, "errors are drawn to scale"
    assert EVIL not in page


@pytest.mark.parametrize("text", ["not JSON", "[]", '{"layers": [{"name": 1}]}'])
def test_a_report_of_something_else_is_refused(text: str, folder: Path) -> None:
    (folder / REPORT_FILE).write_text(text)
    with pytest.raises(LakeError, match=r"pipelines/quantize\.py"):
        render_quantization(str(folder))
