"""Smooth random fields and textures, the raw material of synthetic scenes. Our own recipe."""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Floats = NDArray[np.floating]


def resize(field: Floats, shape: tuple[int, int]) -> Floats:
    """``field`` (h, w) interpolated bicubically to ``shape`` (H, W)."""
    return np.asarray(Image.fromarray(field).resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


def blur(pixels: Floats, sigma: float) -> Floats:
    """Gaussian blur of values in 0..1, (H, W) or (H, W, 3), with 8 bits of precision: enough here, and fast."""
    image = Image.fromarray(np.uint8(np.clip(pixels, 0, 1) * 255))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(float(sigma))), np.float32) / 255


def _from_grid(grid: Floats, shape: tuple[int, int], scale: float) -> Floats:
    """Interpolates a grid of cells ``scale`` pixels apart; the outermost cells only feed the interpolation."""
    box = (1.0, 1.0, 1.0 + shape[1] / scale, 1.0 + shape[0] / scale)
    return np.asarray(Image.fromarray(grid).resize((shape[1], shape[0]), Image.Resampling.BICUBIC, box=box))


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], scale: float) -> Floats:
    """A random field (H, W) of mean 0 and deviation about 1 whose features are ``scale`` pixels wide, at least 1."""
    cells = (int(np.ceil(shape[0] / scale)) + 3, int(np.ceil(shape[1] / scale)) + 3)
    return _from_grid(rng.standard_normal(cells, dtype=np.float32), shape, scale)


def octaves(rng: np.random.Generator, shape: tuple[int, int], coarsest: float, count: int = 4) -> Floats:
    """Fractal noise (H, W) in 0..1: ``count`` octaves from features of ``coarsest`` (>= 1) pixels down."""
    persistence = rng.uniform(0.3, 0.7)
    grid = np.zeros((2, 2), np.float32)
    weight, scale, energy = 1.0, float(coarsest), 0.0
    for _ in range(count):
        # Each octave doubles the grid of the one before, so that only the last step touches every pixel.
        cells = (int(np.ceil(shape[0] / scale)) + 3, int(np.ceil(shape[1] / scale)) + 3)
        grid = resize(grid, cells) + np.float32(weight) * rng.standard_normal(cells, dtype=np.float32)
        finest = scale
        energy += weight**2
        weight, scale = weight * persistence, scale / 2
        if scale < 1:
            break
    return np.clip(0.5 + _from_grid(grid, shape, finest) / np.float32(4 * np.sqrt(energy)), 0, 1)


def ramp(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """A linear gradient (H, W) from 0 to 1 in a random direction."""
    angle = rng.uniform(0, 2 * np.pi)
    y = np.linspace(-1, 1, shape[0], dtype=np.float32)[:, None] * np.float32(np.sin(angle))
    x = np.linspace(-1, 1, shape[1], dtype=np.float32)[None, :] * np.float32(np.cos(angle))
    reach = np.float32(abs(np.sin(angle)) + abs(np.cos(angle)))
    return (x + y) / (2 * reach) + np.float32(0.5)


def colour(rng: np.random.Generator) -> Floats:
    """A random RGB colour (3,) in 0..255. Mostly muted, as in photographs; sometimes vivid."""
    saturation = rng.beta(1.2, 3.5) if rng.random() < 0.85 else rng.uniform(0.5, 1)
    return 255 * np.array(colorsys.hsv_to_rgb(rng.random(), saturation, rng.beta(1.6, 1.3)), np.float32)


def near(rng: np.random.Generator, base: Floats, spread: float) -> Floats:
    """A colour (3,) near ``base``: the same hue in another light, with a little cast."""
    shifted = base * rng.uniform(1 - spread, 1 + spread) + rng.normal(0, 60 * spread, 3)
    return np.clip(shifted, 0, 255).astype(np.float32)


def _waves(rng: np.random.Generator, shape: tuple[int, int], period: float) -> Floats:
    angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
    y = np.arange(shape[0], dtype=np.float32)[:, None] * np.float32(np.sin(angle))
    x = np.arange(shape[1], dtype=np.float32)[None, :] * np.float32(np.cos(angle))
    warp = smooth_noise(rng, shape, max(shape) / 3) * np.float32(rng.uniform(0, 1.5))
    return np.sin((x + y) * np.float32(2 * np.pi / period) + warp + np.float32(phase))


def _pattern(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """A field (H, W) in 0..1 that mixes two colours."""
    extent = max(shape)
    kind = rng.choice(["noise", "fine", "stripes", "check", "spots", "ramp"], p=[0.28, 0.16, 0.18, 0.08, 0.12, 0.18])
    if extent < 24 or kind == "ramp":
        return ramp(rng, shape)
    if kind == "noise":
        return octaves(rng, shape, extent / rng.uniform(1, 4))
    if kind == "fine":
        return octaves(rng, shape, rng.uniform(3, 10), 3)
    sharpness = rng.uniform(0.7, 8)
    if kind == "spots":
        return np.clip(0.5 + sharpness * (smooth_noise(rng, shape, rng.uniform(4, max(extent / 4, 5))) - 0.8), 0, 1)
    period = rng.uniform(5, max(extent / 2, 6))
    field = _waves(rng, shape, period)
    if kind == "check":
        field = field * _waves(rng, shape, period)
    return np.clip(0.5 + sharpness * field / 2, 0, 1)


def texture(rng: np.random.Generator, shape: tuple[int, int], base: Floats, contrast: float) -> Floats:
    """A textured surface (H, W, 3) in 0..255 around the colour ``base``.

    ``contrast`` in 0..1 says how far the second colour strays: 0 is a plain surface.
    """
    if contrast < 0.03:
        return np.broadcast_to(base, (*shape, 3)).astype(np.float32)
    second = near(rng, base, contrast) if rng.random() < 0.75 else base + (colour(rng) - base) * np.float32(contrast)
    surface = base + _pattern(rng, shape)[..., None] * (second - base)
    if rng.random() < 0.5 and min(shape) >= 8:
        grain = octaves(rng, shape, rng.uniform(2, 12), 3) - 0.5
        surface = surface * (1 + np.float32(rng.uniform(0.1, 0.8)) * grain[..., None])
    return np.asarray(surface, np.float32)
