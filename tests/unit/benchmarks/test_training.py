from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.training import Measurement, TrainingBenchmark, measure, summarise, write_cache
from tinysam.distill.step import DistillationLoss


def test_the_job_and_the_plain_loop_make_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainingBenchmark(
        image_size=128, crop_size=64, prompts=2, max_rounds=2, batch_size=8, images=32, epochs=3, precision="fp32"
    )
    write_cache(config, str(tmp_path))
    steps: list[tuple[Any, ...]] = []
    forward = DistillationLoss.forward

    def noted(module: DistillationLoss, batch: Any, refinements: list[bool], *rest: Any) -> Any:
        steps.append((tuple(refinements), batch.image.shape, batch.targets.shape, batch.embedding.shape))
        return forward(module, batch, refinements, *rest)

    monkeypatch.setattr(DistillationLoss, "forward", noted)
    plain = measure(config, str(tmp_path), None)
    of_plain, steps = steps, []
    job = measure(config, str(tmp_path), 0)
    assert of_plain == steps
    assert len({refinements for refinements, *_ in steps}) > 1
    assert len(steps) == config.images * config.epochs // config.batch_size
    for measured in (plain, job):
        assert measured.images_per_second > 0
        assert 0 <= measured.waiting_share < 1


def test_a_variant_is_told_by_the_medians_of_its_measurements() -> None:
    def measured(*speeds: float) -> list[Measurement]:
        return [Measurement(images_per_second=speed, waiting_share=speed / 100, peak_gpu_mib=1.0) for speed in speeds]

    row = summarise(1, measured(3, 9, 6), measured(8, 1, 100))
    assert row["images_per_second"] == 6
    assert row["share_of_plain"] == pytest.approx(6 / 8)
    assert row["waiting_share"] == pytest.approx(0.06)
