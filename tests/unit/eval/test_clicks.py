from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from segment_anything import SamPredictor

from tinysam.eval.clicks import ClickConfig, click_ious, deepest_point, first_click, next_click
from tinysam.eval.masks import to_rles
from tinysam.everything.decoding import encode

REGIONS = arrays.arrays(bool, st.tuples(st.integers(1, 15), st.integers(1, 15)))


def brute_force_depth(region: np.ndarray) -> np.ndarray:
    """Distance of every pixel to the nearest pixel outside, the image being surrounded by outside."""
    padded = np.pad(region, 1)
    outside = np.argwhere(~padded)
    depth = np.zeros(padded.shape)
    for y, x in np.argwhere(padded):
        depth[y, x] = np.sqrt(((outside - (y, x)) ** 2).sum(axis=1).min())
    return depth[1:-1, 1:-1]


@given(REGIONS)
def test_deepest_point_is_farthest_from_the_outside(region):
    assume(region.any())
    (x, y), depth = deepest_point(region)
    expected = brute_force_depth(region)
    assert depth == pytest.approx(expected.max())
    assert expected[y, x] == pytest.approx(depth)


def test_an_empty_region_has_no_deepest_point():
    with pytest.raises(ValueError, match="empty"):
        deepest_point(np.zeros((3, 3), bool))


def test_centre_of_an_odd_square_at_the_image_edge():
    region = np.zeros((20, 30), bool)
    region[0:7, 23:30] = True
    assert deepest_point(region) == ((26, 3), 4.0)


@given(st.data(), REGIONS)
def test_a_click_lies_in_the_error_and_its_label_says_which(data, truth):
    prediction = data.draw(arrays.arrays(bool, truth.shape))
    click = next_click(truth, prediction)
    if click is None:
        assert (truth == prediction).all()
    else:
        x, y, label = click
        assert truth[y, x] == bool(label)
        assert prediction[y, x] != bool(label)


def test_the_deeper_error_region_is_clicked_though_the_other_has_more_pixels():
    truth, prediction = np.zeros((40, 200), bool), np.zeros((40, 200), bool)
    truth[10:21, 10:21] = True  # missed: 121 pixels, 6 deep
    prediction[30:32, 0:200] = True  # spilled: 400 pixels, 1 deep
    assert next_click(truth, prediction) == (15, 15, 1)
    prediction[25:39, 100:114] = True
    assert next_click(truth, prediction)[2] == 0
    assert next_click(truth, prediction, "missed") == (15, 15, 1)


def test_the_missed_policy_clicks_the_spill_once_nothing_is_missed():
    truth, prediction = np.zeros((9, 9), bool), np.zeros((9, 9), bool)
    truth[:3, :3] = prediction[:3, :] = True
    x, y, label = next_click(truth, prediction, "missed")
    assert (label, truth[y, x], prediction[y, x]) == (0, False, True)


@given(REGIONS, st.integers(0, 5))
def test_a_random_first_click_is_inside_and_repeatable(region, seed):
    assume(region.any())
    x, y = first_click(region, "random", seed)
    assert region[y, x]
    assert (x, y) == first_click(region, "random", seed)


def test_no_clicks_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        ClickConfig(clicks=0)


def squares(height: int, width: int) -> np.ndarray:
    masks = np.zeros((5, height, width), bool)
    for i in range(5):
        masks[i, 3 * i : 3 * i + 9 + i, 5 * i : 5 * i + 7 + 2 * i] = True
    return masks


def reference_ious(sam, image: np.ndarray, truth: np.ndarray, clicks: int, feed: bool) -> list[float]:
    """The protocol written down plainly, one object at a time, with segment-anything's own predictor."""
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    points, labels, low_res, ious = [deepest_point(truth)[0]], [1], None, []
    for step in range(clicks):
        masks, scores, logits = predictor.predict(
            np.array(points, dtype=float), np.array(labels), mask_input=low_res, multimask_output=step == 0
        )
        best = int(scores.argmax())
        low_res = logits[best : best + 1] if feed else None
        ious.append((masks[best] & truth).sum() / (masks[best] | truth).sum())
        click = next_click(truth, masks[best])
        assert click is not None
        points.append(click[:2])
        labels.append(click[2])
    return ious


@pytest.mark.parametrize("feed", [True, False])
def test_batched_clicks_equal_one_object_at_a_time(tiny_sam, rng, feed):
    image = rng.integers(0, 256, (70, 93, 3), dtype=np.uint8)
    truths = squares(70, 93)
    embedded = encode(tiny_sam, [image])[0]
    config = ClickConfig(clicks=3, feed_logits=feed)
    found = click_ious(tiny_sam, embedded, to_rles(truths), config, prompts_per_batch=2)
    expected = [reference_ious(tiny_sam, image, truth, 3, feed) for truth in truths]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.fixture
def obedient(monkeypatch) -> Callable[[np.ndarray], None]:
    """Makes the decoder answer with given masks: (steps, S/4, S/4) bool, one per step for every object."""

    def install(masks: np.ndarray) -> None:
        steps = iter(masks)

        def decode(sam, image, *, points, **_):
            logits = torch.as_tensor(np.where(next(steps), 10.0, -10.0), dtype=torch.float32)
            return logits.expand(len(points), 4, *logits.shape), torch.ones(len(points), 4)

        monkeypatch.setattr("tinysam.eval.clicks.decode_prompts", decode)

    return install


def test_a_perfect_mask_is_left_alone(tiny_sam, obedient):
    half = np.zeros((32, 32), bool)
    half[:, :16] = True
    obedient(half[None])  # a second step would exhaust the answers
    image = encode(tiny_sam, [np.zeros((128, 128, 3), np.uint8)])[0]
    truth = np.zeros((1, 128, 128), bool)
    truth[:, :, :64] = True
    np.testing.assert_array_equal(click_ious(tiny_sam, image, to_rles(truth), ClickConfig(clicks=4)), np.ones((1, 4)))


def test_only_imperfect_objects_are_clicked_again(tiny_sam, obedient):
    left, top = np.zeros((32, 32), bool), np.zeros((32, 32), bool)
    left[:, :16], top[:16] = True, True
    obedient(np.stack([left, top, top]))
    image = encode(tiny_sam, [np.zeros((128, 128, 3), np.uint8)])[0]
    truths = np.zeros((2, 128, 128), bool)
    truths[0, :64] = True
    truths[1, :, :64] = True
    ious = click_ious(tiny_sam, image, to_rles(truths), ClickConfig(clicks=3))
    np.testing.assert_allclose(ious, [[1 / 3, 1, 1], [1, 1, 1]], atol=0.02)


@settings(max_examples=5, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_any_size_of_image_works(tiny_sam, height, width):
    image = encode(tiny_sam, [np.zeros((height, width, 3), np.uint8)])[0]
    ious = click_ious(tiny_sam, image, to_rles(np.ones((1, height, width), bool)), ClickConfig(clicks=2))
    assert ious.shape == (1, 2)
    assert ((ious >= 0) & (ious <= 1)).all()
