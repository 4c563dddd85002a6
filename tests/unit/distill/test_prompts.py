from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segment_anything.modeling import Sam

from tinysam.distill.frame import TARGET_STRIDE
from tinysam.distill.prompts import (
    BACKGROUND,
    BOTTOM_RIGHT,
    FOREGROUND,
    NO_POINT,
    TOP_LEFT,
    PromptConfig,
    Prompts,
    draw_refinements,
    embed_prompts,
    first_prompts,
    jitter_boxes,
    next_points,
    sample_points,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hit(points: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
    """Which points lie in their region."""
    x, y = (points / TARGET_STRIDE).long().unbind(1)
    return regions[torch.arange(len(points)), y, x]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), height=st.integers(1, 20), width=st.integers(1, 20))
def test_points_fall_into_their_region(seed: int, height: int, width: int) -> None:
    regions = torch.rand(16, height, width, generator=seeded(seed)) < 0.2
    points = sample_points(regions, seeded(seed))
    occupied = regions.flatten(1).any(1)
    assert hit(points, regions)[occupied].all()
    assert (points >= 0).all()
    assert (points < torch.tensor([width, height]) * TARGET_STRIDE).all()


def test_every_pixel_of_a_region_can_be_drawn() -> None:
    region = torch.zeros(1, 4, 4, dtype=torch.bool)
    region[0, 1, 2] = region[0, 3, 0] = True
    points = sample_points(region.expand(500, -1, -1), seeded())
    drawn = {tuple(p) for p in (points / TARGET_STRIDE).long().tolist()}
    assert drawn == {(2, 1), (0, 3)}


def test_the_last_pixel_is_not_rounded_out_of_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    almost_one = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    monkeypatch.setattr(torch, "rand", lambda size, generator, device: almost_one.expand(size))
    region = torch.zeros(1, 256, 256, dtype=torch.bool)
    region[0, 255, 255] = True
    assert hit(sample_points(region, seeded()), region).all()


def test_prompts_repeat_under_a_seed() -> None:
    targets, boxes = torch.rand(20, 8, 8), torch.tensor([[4.0, 4, 20, 28]]).expand(20, 4)
    a, b = (first_prompts(targets, boxes, PromptConfig(), seeded(3)) for _ in range(2))
    assert torch.equal(a.points, b.points)
    assert torch.equal(a.labels, b.labels)


def test_the_share_of_boxes_is_what_was_asked_for() -> None:
    targets, boxes = torch.ones(600, 8, 8), torch.tensor([[4.0, 4, 20, 28]]).expand(600, 4)
    for share in (0.0, 0.5, 1.0):
        labels = first_prompts(targets, boxes, PromptConfig(box_probability=share), seeded()).labels
        is_box = (labels == torch.tensor([TOP_LEFT, BOTTOM_RIGHT])).all(1)
        assert abs(is_box.float().mean().item() - share) < 0.08
        assert (labels[~is_box] == torch.tensor([FOREGROUND, NO_POINT])).all()


def test_jitter_stays_within_its_share_of_the_sides() -> None:
    boxes = torch.tensor([[10.0, 20, 30, 120]]).expand(200, 4)
    moved = jitter_boxes(boxes, 0.1, seeded()) - boxes
    assert (moved.abs() <= torch.tensor([2.0, 10, 2, 10]) + 1e-4).all()
    assert moved.abs().max() > 5


def test_tinysam_clicks_what_is_missed_and_falls_back_to_false_positives() -> None:
    target = torch.zeros(3, 4, 4, dtype=torch.bool)
    target[:, :2] = True
    predicted = target.clone()
    predicted[0, 0] = False  # misses a row
    predicted[0, 3] = True  # and covers another wrongly
    predicted[1, 3] = True  # only covers wrongly
    points, labels = next_points(target, predicted, "tinysam", seeded())
    assert labels.tolist() == [FOREGROUND, BACKGROUND, NO_POINT]
    assert (points[:2, 1] / TARGET_STRIDE).long().tolist() == [0, 3]


def test_sam_clicks_any_error_with_the_label_it_needs() -> None:
    target = torch.zeros(1, 4, 4, dtype=torch.bool)
    target[:, :2] = True
    predicted = torch.zeros_like(target)
    predicted[:, 1:3] = True  # misses row 0, covers row 2 wrongly
    points, labels = next_points(target.expand(200, -1, -1), predicted.expand(200, -1, -1), "sam", seeded())
    rows = (points[:, 1] / TARGET_STRIDE).long()
    assert set(rows.tolist()) == {0, 2}
    assert torch.equal(labels, torch.where(rows == 0, FOREGROUND, BACKGROUND))


def test_nothing_to_correct_gives_a_blank_and_an_empty_target_a_background_click() -> None:
    target = torch.zeros(2, 4, 4, dtype=torch.bool)
    predicted = target.clone()
    predicted[1, 2, 3] = True
    for policy in ("tinysam", "sam"):
        points, labels = next_points(target, predicted, policy, seeded())
        assert labels.tolist() == [NO_POINT, BACKGROUND]
        assert (points[1] / TARGET_STRIDE).long().tolist() == [3, 2]


def test_refinements_are_uniform_in_number_and_repeat_under_a_seed() -> None:
    config, generator = PromptConfig(mask_prompt_probability=0.25), seeded()
    drawn = [draw_refinements(config, generator) for _ in range(2000)]
    counts = torch.bincount(torch.tensor([len(rounds) for rounds in drawn]), minlength=10)
    assert len(counts) == 10  # 0 to 9, as in the paper
    assert (counts / 2000 - 0.1).abs().max() < 0.03
    with_mask = [feeds for rounds in drawn for feeds in rounds]
    assert sum(with_mask) / len(with_mask) == pytest.approx(0.25, abs=0.02)
    assert draw_refinements(config, seeded(5)) == draw_refinements(config, seeded(5))
    assert draw_refinements(PromptConfig(max_rounds=0), seeded()) == []


def test_embeddings_of_mixed_prompts_equal_sams_own(tiny_sam: Sam) -> None:
    encoder = tiny_sam.prompt_encoder
    points, labels = torch.rand(5, 3, 2) * 128, torch.randint(0, 2, (5, 3))
    boxes = torch.rand(5, 4) * 128
    with torch.no_grad():
        # SAM pads lone points with a blank one, which is our label -1.
        padded = Prompts(torch.cat([points, torch.zeros(5, 1, 2)], 1), torch.cat([labels, -torch.ones(5, 1)], 1).long())
        expected, _ = encoder(points=(points, labels), boxes=None, masks=None)
        torch.testing.assert_close(embed_prompts(encoder, padded), expected)
        corners = Prompts(boxes.view(5, 2, 2), torch.tensor([[TOP_LEFT, BOTTOM_RIGHT]]).expand(5, 2))
        expected, _ = encoder(points=None, boxes=boxes, masks=None)
        torch.testing.assert_close(embed_prompts(encoder, corners), expected)
