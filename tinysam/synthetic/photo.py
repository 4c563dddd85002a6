"""Scenes in the manner of photographs: a textured ground and objects that cover one another. Our own recipe."""

from __future__ import annotations

import numpy as np

from tinysam.synthetic.canvas import Canvas, relief, soften, window
from tinysam.synthetic.noise import Floats, blur, colour, near, octaves, ramp, smooth_noise, texture
from tinysam.synthetic.shapes import FAMILIES, rasterise

_FAMILY_ODDS = {"ellipse": 4, "blob": 6, "polygon": 4, "star": 1, "ring": 2, "curve": 2, "composite": 5}


def _ground(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """One surface, or two that meet along a horizon, a wall or a ragged border."""
    base = colour(rng)
    ground = texture(rng, shape, base, rng.uniform(0.1, 0.9))
    if rng.random() < 0.45:
        border = ramp(rng, shape) + np.float32(rng.choice([0.0, 0.1])) * smooth_noise(rng, shape, max(shape) / 8)
        sharpness = np.float32(rng.choice([300, 60, 6]))
        mix = np.clip((border - np.float32(rng.uniform(0.3, 0.7))) * sharpness + 0.5, 0, 1)
        ground += mix[..., None] * (texture(rng, shape, colour(rng), rng.uniform(0.1, 0.8)) - ground)
    relight = 1 + np.float32(rng.uniform(0, 0.7)) * (octaves(rng, shape, max(shape) / 1.5, 3) - 0.5)
    return ground * relight[..., None]


def _sizes(rng: np.random.Generator, count: int, side: int) -> list[float]:
    """Longest sides in pixels from 6 to half the image, at every scale, the larger ones mostly first (behind)."""
    largest = side / 2 * min(30 / count, 1) ** 0.5
    sizes = 6 * (max(largest, 8) / 6) ** rng.random(count) ** rng.uniform(0.4, 1.0)
    if rng.random() < 0.3:  # a shelf of pebbles, coins, fruit: all about the same
        sizes = np.exp(rng.uniform(np.log(15), np.log(max(largest / 1.5, 18)))) * rng.uniform(0.7, 1.3, count)
    order = np.argsort(-sizes * np.exp(rng.normal(0, 0.5, count)))
    return sizes[order].tolist()


def _object(rng: np.random.Generator, canvas: Canvas, family: str, size: float, base: Floats) -> None:
    coverage = rasterise(rng, FAMILIES[family](rng), size)
    height, width = canvas.labels.shape
    top = int(rng.uniform(0, height) - coverage.shape[0] / 2)
    left = int(rng.uniform(0, width) - coverage.shape[1] / 2)
    place = window((height, width), coverage.shape, top, left)
    if place is None:
        return
    if rng.random() < 0.5 and size > 10:
        margin = int(size * 0.12) + 2
        shadow = blur(np.pad(coverage, margin), max(size * rng.uniform(0.01, 0.05), 0.5))
        shift_y, shift_x = rng.uniform(-0.1, 0.1, 2) * size
        canvas.shade(shadow, top - margin + int(shift_y), left - margin + int(shift_x), rng.uniform(0.2, 0.7))
    surface = texture(rng, coverage.shape, base, rng.uniform(0, 0.8))
    if size > 24 and rng.random() < 0.3:  # a patch of another kind: a seam of colour that is no border of the object
        patch = np.clip(3 * smooth_noise(rng, coverage.shape, size / rng.uniform(1.5, 4)), 0, 1)
        surface = surface + patch[..., None] * (texture(rng, coverage.shape, colour(rng), 0.3) - surface)
    if rng.random() < 0.6 and size > 8:
        surface = surface * relief(rng, coverage)[..., None]
    if rng.random() < 0.2 and size > 12:  # a dark or bright rim
        rim = np.clip(1 - np.abs(blur(coverage, size * 0.03) - 0.6) * 4, 0, 1)
        surface = surface * (1 + np.float32(rng.uniform(-0.7, 0.5)) * rim[..., None])
    sigma = rng.choice([0.0, rng.uniform(0.4, 1.0), min(rng.uniform(1.0, 2.5), size / 15)], p=[0.5, 0.35, 0.15])
    alpha = soften(coverage, sigma)
    canvas.blend(np.clip(surface, 0, 255)[place.stamp], alpha[place.stamp], place.canvas)
    canvas.claim(coverage[place.stamp], place.canvas)


def paint(rng: np.random.Generator, shape: tuple[int, int]) -> Canvas:
    """A scene of 5 to 60 objects on a canvas of ``shape`` (H, W), before lens and sensor."""
    canvas = Canvas(_ground(rng, shape))
    count = int(np.exp(rng.uniform(np.log(5), np.log(61))))
    odds = np.array(list(_FAMILY_ODDS.values()), float)
    few = rng.random() < 0.35  # one or two kinds of thing in one palette, so that colour alone separates nothing
    kinds = rng.choice(list(_FAMILY_ODDS), 2 if few else count, p=odds / odds.sum())
    if rng.random() < 0.15:  # camouflage: objects in the colour of the ground
        palette = [np.asarray(canvas.pixels.reshape(-1, 3).mean(axis=0), np.float32)]
    else:
        palette = [colour(rng) for _ in range(2 if few else count)]
    for size in _sizes(rng, count, min(shape)):
        base = near(rng, palette[rng.integers(len(palette))], 0.25)
        _object(rng, canvas, str(kinds[rng.integers(len(kinds))]), size, base)
    return canvas
