from __future__ import annotations

import math
from pathlib import Path

import pytest

from tinysam.distill.difficulty import Difficulty, MiningConfig, load_difficulty, save_difficulty


def test_difficulty_is_a_running_mean_that_ignores_images_without_masks() -> None:
    difficulty = Difficulty()
    difficulty.update(["a", "b"], [0.4, math.nan], step=1)
    difficulty.update(["a"], [0.2], step=2)
    difficulty.update(["a"], [math.nan], step=3)
    assert difficulty.values == {"a": (pytest.approx(0.3), 2)}


def test_the_hardest_image_is_drawn_most_often() -> None:
    difficulty = Difficulty({"easy": (-0.1, 1), "hard": (0.9, 1), "middle": (0.1, 1)})
    assert difficulty.weights(2.0) == {"easy": 1.0, "middle": 2.0, "hard": 3.0}
    assert difficulty.weights(0.0) == {}
    assert Difficulty().weights(2.0) == {}


def test_workers_take_over_what_others_saw_later() -> None:
    mine = Difficulty({"a": (0.1, 5), "b": (0.2, 1)})
    mine.merge([{"a": (0.9, 4), "b": (0.3, 2), "c": (0.4, 1)}, mine.values.copy()])
    assert mine.values == {"a": (0.1, 5), "b": (0.3, 2), "c": (0.4, 1)}


def test_difficulties_survive_a_restart(tmp_path: Path) -> None:
    url = str(tmp_path / "difficulty.parquet")
    assert load_difficulty(url) == (Difficulty(), {})
    difficulty = Difficulty({"a": (0.1, 5), "b": (0.2, 1)})
    save_difficulty(url, difficulty, {"b": 1.5})
    assert load_difficulty(url) == (difficulty, {"b": 1.5})


def test_a_negative_strength_is_refused() -> None:
    with pytest.raises(ValueError, match="strength"):
        MiningConfig(strength=-1)
