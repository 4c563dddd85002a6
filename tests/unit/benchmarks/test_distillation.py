"""The ablation's bookkeeping: which flags make a row, and what its numbers are."""

from __future__ import annotations

import pytest
from scipy import stats

from benchmarks.distillation import SCORES, DistillationBenchmark, estimate, rows, summarise
from pipelines.common.cli import parse_config
from pipelines.distill import DistillConfig


def job_of(flags: tuple[str, ...]) -> DistillConfig:
    return parse_config(DistillConfig, ["--cache", "a", "--output", "b", *flags])


def test_each_row_adds_its_part_to_the_row_above() -> None:
    config = DistillationBenchmark(cache=("a",), validation_cache=("b",), runs="c", rounds=5, mining=0.7)
    jobs = {name: job_of(flags) for name, flags in rows(config).items()}
    parts = {
        name: (
            job.losses.output > 0,
            job.losses.embedding > 0,
            job.losses.token > 0,
            job.prompts.max_rounds,
            job.losses.hard_mask_weight,
            job.mining.strength,
        )
        for name, job in jobs.items()
    }
    assert {job.prompts.policy for job in jobs.values()} == {"tinysam"}, "the paper's prompts are what is measured"
    assert list(parts.values()) == [
        (False, False, False, 0, False, 0),
        (True, False, False, 0, False, 0),
        (True, True, False, 0, False, 0),
        (True, True, True, 0, False, 0),
        (True, True, True, 5, False, 0),
        (True, True, True, 5, True, 0),
        (True, True, True, 5, True, 0.7),
    ]


def test_an_interval_is_that_of_students_t() -> None:
    values = [0.5, 0.7, 0.65, 0.4]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = estimate(values)
    assert found.mean - found.half_width == pytest.approx(expected.low)
    assert found.mean + found.half_width == pytest.approx(expected.high)


def test_gains_are_paired_by_seed_and_the_gap_is_counted_from_the_first_row() -> None:
    first = [dict.fromkeys(SCORES, value) for value in (0.2, 0.4)]
    second = [dict.fromkeys(SCORES, value) for value in (0.3, 0.5)]
    found = summarise({"alone": first, "taught": second}, dict.fromkeys(SCORES, 0.5))
    assert found["alone"]["box"]["gain"] is None
    # Both seeds gain 0.1 exactly, though they differ by 0.2 among themselves.
    assert found["taught"]["box"]["gain"] == pytest.approx({"mean": 0.1, "half_width": 0.0}, abs=1e-12)
    assert found["taught"]["click_3"]["gap_closed"] == pytest.approx(0.1 / 0.2)


def test_one_seed_has_no_interval() -> None:
    with pytest.raises(ValueError, match="at least 2 seeds"):
        DistillationBenchmark(cache=("a",), validation_cache=("b",), runs="c", seeds=1)
