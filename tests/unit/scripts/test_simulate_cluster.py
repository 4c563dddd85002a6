"""The simulated cluster: nothing is lost or counted twice, and where nothing is random it is plain arithmetic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scripts import load_script

ROOT = Path(__file__).parents[3]


simulator = load_script("simulate_cluster")

CERTAIN: dict[str, Any] = {"spread": 0.0, "driver_seconds_per_shard": 0.0, "load_seconds": 30.0}


def test_without_chance_it_is_arithmetic() -> None:
    load = simulator.Workload(
        images=6400, workers=8, seconds_per_image=0.5, megabytes_out=2.0, overlap=False, **CERTAIN
    )
    outcome = simulator.simulate(load)
    shard = 64 * 0.5 + 64 * 2.0 / 100
    assert outcome.seconds == pytest.approx(30 + 13 * shard)  # 100 shards are 12.5 for each of 8 workers
    assert outcome.computing == pytest.approx(6400 * 0.5)
    assert outcome.writing == pytest.approx(6400 * 2.0 / 100)
    assert (outcome.losses, outcome.wasted) == (0, 0)


@pytest.mark.parametrize("megabytes_out", [2.0, 75.0])
def test_of_computing_and_writing_the_longer_one_counts_where_they_overlap(megabytes_out: float) -> None:
    load = simulator.Workload(
        images=6400, workers=8, seconds_per_image=0.5, megabytes_out=megabytes_out, overlap=True, **CERTAIN
    )
    outcome = simulator.simulate(load)
    compute, write = 64 * 0.5, 64 * megabytes_out / 100
    assert outcome.seconds == pytest.approx(30 + 13 * max(compute, write) + min(compute, write))
    assert outcome.computing == pytest.approx(6400 * 0.5)


def test_the_last_shard_holds_the_rest() -> None:
    outcome = simulator.simulate(simulator.Workload(images=65, workers=1, seconds_per_image=1.0, **CERTAIN))
    assert outcome.seconds == pytest.approx(30 + 65)
    assert outcome.written == 2


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [({"storage_megabytes_per_second": 50.0}, 12800 * 3.0 / 50), ({"driver_seconds_per_shard": 2.0}, 200 * 2.0)],
)
def test_what_is_shared_limits_a_large_cluster(limit: dict[str, float], seconds: float) -> None:
    load = simulator.Workload(images=12800, workers=200, seconds_per_image=0.01, megabytes_out=2.0, **CERTAIN | limit)
    found = simulator.simulate(load).seconds
    assert seconds + 30 <= found <= seconds + 40
    assert simulator.simulate(replace(load, workers=100)).seconds == pytest.approx(found, rel=0.02)


@settings(max_examples=60, deadline=None)
@given(
    images=st.integers(1, 3000),
    images_per_shard=st.integers(1, 100),
    workers=st.integers(1, 20),
    losses_per_hour=st.sampled_from([0.0, 1.0, 20.0]),
    straggler_rate=st.sampled_from([0.0, 0.1]),
    driver_seconds_per_shard=st.sampled_from([0.0, 3.0]),
    storage=st.sampled_from([20.0, float("inf")]),
    overlap=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_every_shard_is_written_once_and_every_second_counted_once(storage: float, **options: Any) -> None:
    load = simulator.Workload(seconds_per_image=0.5, megabytes_out=1.0, storage_megabytes_per_second=storage, **options)
    outcome = simulator.simulate(load)
    assert outcome.written == load.shards
    parts = ("loading", "computing", "writing", "wasted", "waiting", "missing")
    assert all(getattr(outcome, name) >= -1e-6 for name in parts)
    assert sum(getattr(outcome, name) for name in parts) == pytest.approx(load.workers * outcome.seconds)
    assert (outcome.wasted > 0) <= (outcome.losses > 0)


def test_lost_machines_cost_what_they_had_in_hand_and_their_successors_start() -> None:
    calm = simulator.Workload(images=64_000, workers=16, seconds_per_image=0.5, load_seconds=60.0)
    stormy = simulator.simulate(replace(calm, losses_per_hour=2.0))
    quiet = simulator.simulate(calm)
    # An exponential lifetime has no memory: on average half a shard is lost, and a minute for the next model.
    expected = stormy.losses * (32 / 2)
    assert stormy.losses == pytest.approx(2.0 * 16 * stormy.seconds / 3600, rel=0.4)
    assert stormy.wasted == pytest.approx(expected, rel=0.5)
    assert stormy.worker_hours > quiet.worker_hours
    assert stormy.seconds > quiet.seconds


def test_same_seed_same_outcome() -> None:
    load = simulator.Workload(images=10_000, workers=7, seconds_per_image=0.3, losses_per_hour=1.0)
    assert simulator.simulate(load) == simulator.simulate(load)
    assert simulator.simulate(load) != simulator.simulate(replace(load, seed=1))


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"losses_per_hour": -1.0}, {"straggler_rate": 1.5}])
def test_impossible_workloads_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        simulator.Workload(**{"images": 1, "workers": 1, "seconds_per_image": 1.0} | wrong)


def test_the_tables_of_the_page_are_what_the_script_prints() -> None:
    page = (ROOT / "cluster" / "SIZING.md").read_text(encoding="utf-8")
    for table in simulator.tables():
        assert table in page
