"""The canvas on which a scene is painted back to front, with the label of the front-most object at each pixel."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from tinysam.synthetic.noise import Floats, blur, resize

MIN_AREA = 16
"""Pixels: fewer are no object that a segmenter could be asked for."""
MIN_VISIBLE = 0.3
"""An object of which less is visible is not ground truth. Our choice."""

Region = tuple[slice, slice]


@dataclass(frozen=True, kw_only=True)
class Window:
    """A bounding box in the canvas and the part of a stamp that falls inside."""

    canvas: Region
    stamp: Region


def window(shape: tuple[int, int], stamp: tuple[int, int], top: int, left: int) -> Window | None:
    """Where a stamp of size ``stamp`` with its corner at (``top``, ``left``) meets the canvas; None if nowhere."""
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + stamp[0], shape[0]), min(left + stamp[1], shape[1])
    if y0 >= y1 or x0 >= x1:
        return None
    return Window(
        canvas=(slice(y0, y1), slice(x0, x1)),
        stamp=(slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)),
    )


@dataclass
class Canvas:
    """Pixels (H, W, 3) float32 in 0..255 and labels (H, W) int32, 0 where no object is."""

    pixels: Floats
    labels: NDArray[np.int32] = field(init=False)
    areas: list[int] = field(default_factory=list, init=False)
    """Area within the canvas of each object, as if nothing covered it; label ``n`` is at ``n - 1``."""

    def __post_init__(self) -> None:
        self.labels = np.zeros(self.pixels.shape[:2], np.int32)

    def claim(self, coverage: Floats, where: Region) -> None:
        """Makes the pixels of region ``where`` that ``coverage`` (h, w) covers by half a new object's."""
        solid = coverage >= 0.5
        self.areas.append(int(np.count_nonzero(solid)))
        self.labels[where][solid] = len(self.areas)

    def blend(self, colour: Floats, alpha: Floats, where: Region) -> None:
        """Lays ``colour`` (h, w, 3) over region ``where`` with opacity ``alpha`` (h, w) in 0..1."""
        target = self.pixels[where]
        target += alpha[..., None] * (colour - target)

    def shade(self, alpha: Floats, top: int, left: int, strength: float) -> None:
        """Darkens what lies under a shadow ``alpha`` (h, w) in 0..1 whose corner is at (``top``, ``left``)."""
        place = window(self.labels.shape, alpha.shape, top, left)
        if place is not None:
            self.pixels[place.canvas] *= 1 - np.float32(strength) * alpha[place.stamp][..., None]

    def visible_labels(self) -> NDArray[np.int32]:
        """Labels (H, W) 1..N without the objects that are hidden or tiny, numbered in order of painting."""
        seen = np.bincount(self.labels.ravel(), minlength=len(self.areas) + 1)[1:]
        keep = (seen >= MIN_AREA) & (seen >= MIN_VISIBLE * np.array(self.areas, np.int64))
        renumbered = np.zeros(len(self.areas) + 1, np.int32)
        renumbered[1:][keep] = np.arange(1, np.count_nonzero(keep) + 1)
        return renumbered[self.labels]


def relief(rng: np.random.Generator, coverage: Floats) -> Floats:
    """Shading factor (h, w) around 1 that makes a flat stamp look like a rounded body lit from one side.

    The height of the body is the root of the distance to its outline, found on a small copy: light varies slowly.
    """
    small = tuple(min(extent, 40) for extent in coverage.shape)
    height = np.sqrt(ndimage.distance_transform_edt(resize(coverage, small) >= 0.5)).astype(np.float32)
    height = ndimage.gaussian_filter(height, 1.0)
    rows, columns = np.gradient(height) if min(small) > 1 else (height * 0, height * 0)
    angle = rng.uniform(0, 2 * np.pi)
    light = np.float32(np.cos(angle)) * columns + np.float32(np.sin(angle)) * rows
    strength = np.float32(rng.uniform(0.2, 1.0))
    return np.clip(1 + strength * resize(np.asarray(light, np.float32), coverage.shape), 0.3, 1.8)


def soften(coverage: Floats, sigma: float) -> Floats:
    """``coverage`` (h, w) with its outline out of focus by ``sigma`` pixels."""
    return blur(coverage, sigma) if sigma > 0.3 else coverage
