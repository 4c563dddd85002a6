"""How the accuracy study's draws are put together, and which model each row rounds."""

from __future__ import annotations

import pytest

from benchmarks.quantization import QuantizationBenchmark, scheme_of, summaries
from tinysam.quant import QuantizationConfig


def row(method: str, draw: int, miou: float) -> dict[str, object]:
    return {"bits": 8, "method": method, "draw": draw, "seconds": 1.0, "box_miou": miou, "agreement": 0.9}


def test_draws_become_means_and_standard_deviations() -> None:
    found = summaries([row("mse", 0, 0.5), row("minmax", 0, 0.1), row("mse", 1, 0.7)])
    assert [(one["method"], one["draws"]) for one in found] == [("mse", 2), ("minmax", 1)]
    assert found[0]["box_miou"] == pytest.approx(0.6)
    assert found[0]["box_miou_deviation"] == pytest.approx(0.02**0.5)
    assert found[0]["box_miou_of_draws"] == [0.5, 0.7]
    assert found[1]["box_miou_deviation"] is None


def test_the_integer_form_is_the_pipelines_own_on_the_encoder_alone() -> None:
    config = QuantizationBenchmark(form="integer")
    scheme, own = scheme_of(config, "hessian", 6), QuantizationConfig(method="hessian").scheme()
    assert (scheme.weight_bits, scheme.activation_bits) == (6, 6)
    assert (scheme.affine, scheme.per_head, scheme.two_ranges) == (own.affine, own.per_head, own.two_ranges)
    assert scheme.quantizes("image_encoder.neck.0")
    assert not scheme.quantizes("mask_decoder.iou_prediction_head.layers.0")
    assert scheme_of(QuantizationBenchmark(), "mse", 8).quantizes("mask_decoder.iou_prediction_head.layers.0")
