from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from segment_anything.modeling import Sam

from tinysam.distill import validation
from tinysam.distill.cache import Cache
from tinysam.distill.decoding import Decoded
from tinysam.distill.prompts import BACKGROUND, FOREGROUND, NO_POINT, Prompts
from tinysam.distill.validation import SCORES, centres, validate, validation_batches

PLAIN = torch.autocast("cpu", enabled=False)


def test_scores_are_shares_and_the_best_of_three_is_best(make_cache: Callable[..., str], tiny_sam: Sam) -> None:
    batches = validation_batches([make_cache("c", embeddings=False)], images=4, image_size=128)
    scores = validate(tiny_sam, batches, PLAIN)
    assert tuple(scores) == SCORES
    assert all(0 <= value <= 1 for value in scores.values())
    assert scores["click_best"] >= scores["click"]


def test_corrections_say_what_was_wrong_and_see_the_logits_before(
    make_cache: Callable[..., str], tiny_sam: Sam, monkeypatch: pytest.MonkeyPatch
) -> None:
    [batch] = validation_batches([make_cache("c", embeddings=False)], images=1, image_size=128)
    asked: list[tuple[Prompts, torch.Tensor | None]] = []
    sure = 10.0

    def perfect(
        sam: Sam, embeddings: torch.Tensor, positions: torch.Tensor, prompts: Prompts, before: torch.Tensor | None
    ) -> Decoded:
        """Misses everything at first, and is right once it is corrected."""
        asked.append((prompts, before))
        truth = torch.nn.functional.avg_pool2d(batch.targets.flatten(0, 1)[:, None], 2) * 2 * sure - sure
        logits = truth.expand(-1, 4, -1, -1) if before is not None else torch.full_like(truth, -sure)
        nothing = torch.zeros(0)
        return Decoded(nothing, logits.expand(-1, 4, -1, -1), torch.ones(len(truth), 4), nothing, nothing)

    monkeypatch.setattr(validation, "decode", perfect)
    scores = validate(tiny_sam, [batch], PLAIN)
    assert scores["click"] == 0
    assert scores["click_3"] > 0.8
    (_, none), (first, none_either), (second, logits), (third, more) = asked
    assert none is None
    assert none_either is None
    assert logits is not None
    assert more is not None
    assert [len(prompts.labels[0]) for prompts in (first, second, third)] == [2, 3, 4]
    assert (second.labels[:, 2] == FOREGROUND).all()
    assert set(third.labels[:, 3].tolist()) <= {FOREGROUND, BACKGROUND, NO_POINT}


def test_prompts_of_a_crop_are_told_in_the_models_frame(
    make_cache: Callable[..., str], tiny_sam: Sam, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = validation_batches([make_cache("c", embeddings=False)], images=8, image_size=128, crop_size=64)
    batch = next(one for one in batches if one.origin.sum() > 0)
    asked: list[Prompts] = []

    def remember(
        sam: Sam, embeddings: torch.Tensor, positions: torch.Tensor, prompts: Prompts, before: torch.Tensor | None
    ) -> Decoded:
        asked.append(prompts)
        count = len(prompts.points)
        nothing = torch.zeros(0)
        return Decoded(nothing, torch.full((count, 4, 16, 16), -1.0), torch.ones(count, 4), nothing, nothing)

    monkeypatch.setattr(validation, "decode", remember)
    validate(tiny_sam, [batch], PLAIN)
    assert batch.image.shape[-2:] == (64, 64)
    corners = batch.boxes.flatten(0, 1).reshape(-1, 2, 2) + batch.origin[0] * 16
    assert torch.equal(asked[0].points, corners)


def test_of_a_large_cache_only_a_choice_of_shards_is_read(
    make_cache: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    of_cache = Cache.read

    def noted(cache: Cache, shard: int) -> Any:
        read.append(shard)
        return of_cache(cache, shard)

    monkeypatch.setattr(Cache, "read", noted)
    folder = make_cache("c", shards=12, images=1, embeddings=False)  # a good and a bad row in each
    assert len(validation_batches([folder], images=1, image_size=128)) == 1
    assert sorted(read) == [0, 6]  # 24 rows, of which four are wanted
    read.clear()
    validation_batches([folder], images=6, image_size=128)
    assert sorted(read) == list(range(12))


def test_a_centre_is_the_regions_pixel_nearest_to_its_centroid() -> None:
    regions = torch.zeros(2, 9, 9, dtype=torch.bool)
    regions[0, 2:5, 3:6] = True
    regions[1, 0, :] = regions[1, 8, :] = regions[1, :, 0] = True  # a C, whose centroid lies outside
    points = centres(regions)
    assert points[0].tolist() == [9.0, 7.0]
    x, y = (points[1] / 2).long().tolist()
    assert regions[1, y, x]
