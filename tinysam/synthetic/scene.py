"""One synthetic scene: pixels with the exact mask of every object. Deterministic by seed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tinysam.synthetic import microscopy, photo
from tinysam.synthetic.noise import Floats, blur, octaves, ramp, smooth_noise

Style = Literal["photo", "microscopy"]

MICROSCOPY_SHARE = 1 / 3
"""Share of microscopy among the scenes of no chosen style."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture and its ground truth."""

    pixels: NDArray[np.uint8]
    """(H, W, 3) RGB."""
    labels: NDArray[np.int32]
    """(H, W): 0 where no object is, 1..N for the front-most object; each of at least 16 pixels."""
    style: Style
    """How it was painted."""

    @property
    def masks(self) -> NDArray[np.bool_]:
        """(N, H, W): the visible part of each object."""
        return self.labels[None] == np.arange(1, int(self.labels.max(initial=0)) + 1)[:, None, None]


def scene(seed: int | Sequence[int], size: tuple[int, int] = (512, 512), style: Style | None = None) -> Scene:
    """The scene of a seed, the same on every machine with the same numpy and Pillow.

    ``size`` is (height, width), at least 32 each. ``style`` None draws it: microscopy for one scene in three.
    Raises ValueError for a smaller size. Recipe: our choice, measured by the models trained on it.
    """
    if min(size) < 32:
        raise ValueError(f"a scene needs at least 32x32 pixels, got {size[0]}x{size[1]}")
    rng = np.random.default_rng(seed)
    drawn: Style = "microscopy" if rng.random() < MICROSCOPY_SHARE else "photo"
    style = style or drawn
    canvas = (microscopy if style == "microscopy" else photo).paint(rng, size)
    pixels = _sensor(rng, _lens(rng, canvas.pixels, style), style)
    return Scene(pixels=_compress(rng, pixels, style), labels=canvas.visible_labels(), style=style)


def _lens(rng: np.random.Generator, pixels: Floats, style: Style) -> Floats:
    """Uneven light, vignetting and a slight lack of focus."""
    shape = pixels.shape[:2]
    strength = np.float32(rng.uniform(0, 0.5 if style == "photo" else 0.3))
    light = 1 + strength * (ramp(rng, shape) - np.float32(0.5))
    if rng.random() < 0.3:
        y, x = np.linspace(-1, 1, shape[0], dtype=np.float32), np.linspace(-1, 1, shape[1], dtype=np.float32)
        light = light * (1 - np.float32(rng.uniform(0.05, 0.25)) * (y[:, None] ** 2 + x**2))
    if style == "photo" and rng.random() < 0.25:  # the shadow of something outside the picture
        shadow = np.clip(12 * (octaves(rng, shape, max(shape) / 2, 2) - np.float32(0.5)), 0, 1)
        light = light * (1 - np.float32(rng.uniform(0.2, 0.5)) * shadow)
    pixels = np.clip(pixels * light[..., None], 0, 255)
    sigma = rng.choice([0.0, rng.uniform(0.3, 1.0), rng.uniform(1.0, 2.0)], p=[0.4, 0.4, 0.2])
    if sigma > 0.3:
        pixels = blur(pixels / 255, sigma) * 255
    return pixels


def _sensor(rng: np.random.Generator, pixels: Floats, style: Style) -> Floats:
    """Exposure, colour cast, sometimes black and white; then shot and read noise."""
    if style == "photo":
        gamma = rng.uniform(0.75, 1.35)
        pixels = 255 * (pixels / 255) ** np.float32(gamma)
        pixels = pixels * rng.uniform(0.9, 1.1, 3).astype(np.float32)
        if rng.random() < 0.3:  # haze or a flat film: the range shrinks
            low, span = rng.uniform(0, 70), rng.uniform(0.45, 0.9)
            pixels = low + pixels * np.float32(span)
        if rng.random() < 0.1:
            pixels = np.broadcast_to(np.asarray(pixels.mean(axis=2, keepdims=True), np.float32), pixels.shape)
    shape = pixels.shape[:2]
    read = np.float32(np.exp(rng.uniform(np.log(0.3), np.log(9 if style == "photo" else 4))))
    grain: Floats = rng.standard_normal(shape, dtype=np.float32)
    if rng.random() < 0.3:
        grain = grain * np.float32(0.5) + smooth_noise(rng, shape, 2.0)
    shot = 1 + np.float32(rng.uniform(0, 0.05)) * np.sqrt(np.maximum(pixels, 0))
    return pixels + read * grain[..., None] * shot


def _compress(rng: np.random.Generator, pixels: Floats, style: Style) -> NDArray[np.uint8]:
    """Rounds to 8 bits; photographs go through JPEG of a random quality, as real ones have."""
    rounded = np.clip(pixels + np.float32(0.5), 0, 255).astype(np.uint8)
    if style == "microscopy" and rng.random() < 0.7:
        return rounded
    buffer = io.BytesIO()
    Image.fromarray(rounded).save(buffer, "JPEG", quality=int(rng.integers(50, 97)))
    return np.array(Image.open(buffer).convert("RGB"))
