"""What a synthetic scene promises: exact, disjoint, visible masks, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from tinysam.synthetic import Style, scene
from tinysam.synthetic.canvas import MIN_AREA, Canvas, window
from tinysam.synthetic.noise import octaves, smooth_noise
from tinysam.synthetic.shapes import FAMILIES, rasterise


@pytest.mark.parametrize("style", ["photo", "microscopy"])
def test_scene_has_pixels_and_consecutive_labels_of_visible_size(style: Style) -> None:
    for seed in range(6):
        painted = scene(seed, (160, 224), style)
        assert painted.pixels.shape == (160, 224, 3)
        assert painted.pixels.dtype == np.uint8
        count = int(painted.labels.max())
        areas = np.bincount(painted.labels.ravel(), minlength=count + 1)[1:]
        assert (areas >= MIN_AREA).all()
        assert painted.masks.shape == (count, 160, 224)
        assert (painted.masks.sum(axis=0) == (painted.labels > 0)).all()


def test_same_seed_gives_same_scene_and_another_seed_another() -> None:
    first, again, other = scene((3, 1), (96, 96)), scene((3, 1), (96, 96)), scene((3, 2), (96, 96))
    assert (first.pixels == again.pixels).all()
    assert (first.labels == again.labels).all()
    assert (first.pixels != other.pixels).any()


def test_a_third_of_the_scenes_is_microscopy() -> None:
    share = np.mean([scene(seed, (32, 32)).style == "microscopy" for seed in range(120)])
    assert 0.2 < share < 0.47


def test_objects_differ_from_what_surrounds_them() -> None:
    """Masks would be useless if they did not lie where the picture changes."""
    inside, across = [], []
    for seed in range(12):
        painted = scene(seed, (192, 192))
        pixels, labels = painted.pixels.astype(float).mean(axis=2), painted.labels
        step = np.abs(np.diff(pixels, axis=1)) / (pixels.std() + 1)
        border = labels[:, 1:] != labels[:, :-1]
        across.append(step[border].mean())
        inside.append(step[~border].mean())
    assert np.mean(across) > 1.5 * np.mean(inside)


def test_scene_below_32_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="32x32"):
        scene(0, (31, 100))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.floats(6, 200))
def test_drawing_measures_its_size_and_leaves_a_border(family: str, seed: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    coverage = rasterise(rng, FAMILIES[family](rng), size)
    assert abs(max(coverage.shape) - (size + 2)) <= 1
    assert coverage.min() >= 0
    assert coverage.max() <= 1
    assert (coverage >= 0.5).any()
    if size >= 32:  # below, the softened edge of one stroke is a large part of a side
        assert np.count_nonzero(coverage[0]) + np.count_nonzero(coverage[:, 0]) <= 0.2 * sum(coverage.shape)


def test_ring_has_a_hole() -> None:
    rng = np.random.default_rng(1)
    coverages = [rasterise(rng, FAMILIES["ring"](rng), 80) for _ in range(5)]
    assert all((ndimage.binary_fill_holes(c >= 0.5) & (c < 0.5)).any() for c in coverages)


@settings(deadline=None)
@given(top=st.integers(-30, 40), left=st.integers(-30, 40), height=st.integers(1, 25), width=st.integers(1, 25))
def test_window_is_the_intersection_of_stamp_and_canvas(top: int, left: int, height: int, width: int) -> None:
    full = np.zeros((100, 100), int)
    full[top + 35 : top + 35 + height, left + 35 : left + 35 + width] = np.arange(height * width).reshape(height, width)
    place = window((30, 30), (height, width), top, left)
    if place is None:
        assert not full[35:65, 35:65].any()
        return
    painted = np.zeros((30, 30), int)
    painted[place.canvas] = np.arange(height * width).reshape(height, width)[place.stamp]
    assert (painted == full[35:65, 35:65]).all()


def test_hidden_and_tiny_objects_are_no_ground_truth() -> None:
    canvas = Canvas(np.zeros((40, 40, 3), np.float32))
    whole = (slice(0, 20), slice(0, 20))
    canvas.claim(np.ones((20, 20), np.float32), whole)  # of which the next leaves 25 %
    canvas.claim(np.ones((20, 15), np.float32), (slice(0, 20), slice(0, 15)))
    canvas.claim(np.ones((3, 5), np.float32), (slice(30, 33), slice(30, 35)))  # 15 pixels
    canvas.claim(np.full((8, 8), 0.4, np.float32), (slice(22, 30), slice(0, 8)))  # covers no pixel by half
    labels = canvas.visible_labels()
    assert set(np.unique(labels)) == {0, 1}
    assert (labels[:20, :15] == 1).all()
    assert np.count_nonzero(labels) == 300


@given(height=st.integers(1, 40), width=st.integers(1, 40), scale=st.floats(1, 30), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_noise_fills_any_shape_within_its_range(height: int, width: int, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert smooth_noise(rng, (height, width), scale).shape == (height, width)
    fractal = octaves(rng, (height, width), scale)
    assert fractal.shape == (height, width)
    assert fractal.min() >= 0
    assert fractal.max() <= 1
