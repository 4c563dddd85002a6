"""Scenes in the manner of microscopy: fluorescent nuclei, stained tissue, and smears of whole cells.

Our own recipe; only the nuclei are ground truth, as in the public nucleus data sets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from tinysam.synthetic.canvas import Canvas, soften, window
from tinysam.synthetic.noise import Floats, blur, near, octaves, smooth_noise
from tinysam.synthetic.shapes import blob, rasterise


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Where one nucleus goes."""

    size: float
    """Longest side, pixels."""
    centre: tuple[float, float]
    """y and x, pixels."""


def _cells(rng: np.random.Generator, shape: tuple[int, int], spacing: float = 1.0) -> list[Cell]:
    """Nuclei of about one size, scattered or in clusters whose members touch, or keep ``spacing`` times that apart."""
    side = min(shape)
    size = float(np.exp(rng.uniform(np.log(side / 50), np.log(side / 5))))
    room = shape[0] * shape[1] / (spacing * size) ** 2
    count = int(np.clip(room * np.exp(rng.uniform(np.log(0.04), np.log(0.7))), 4, 160))
    clustered = rng.random() < 0.5
    hubs = rng.uniform(0, shape, (max(count // int(rng.integers(3, 15)), 1), 2))
    cells: list[Cell] = []
    for _ in range(count):
        extent = size * float(np.exp(rng.normal(0, 0.22)))
        for _attempt in range(6):
            centre = rng.uniform(0, shape)
            if clustered:
                centre = hubs[rng.integers(len(hubs))] + rng.normal(0, 1.4 * spacing * size, 2)
            gap = min((np.hypot(*(centre - c.centre)) / (extent + c.size) for c in cells), default=1.0)
            if gap > 0.38 * spacing:  # centres nearer than that would hide one nucleus under the other
                cells.append(Cell(size=extent, centre=(float(centre[0]), float(centre[1]))))
                break
    return cells


def _stamp(rng: np.random.Generator, size: float, roughness: float) -> Floats:
    return rasterise(rng, blob(rng, roughness, rng.uniform(0.6, 1)), size, distortion=0.4)


def _profile(rng: np.random.Generator, coverage: Floats, size: float) -> Floats:
    """Brightness (h, w) around 1 within a nucleus: domed or flat, granular, with nucleoli."""
    dome = np.sqrt(ndimage.distance_transform_edt(coverage >= 0.5)).astype(np.float32)
    dome /= max(float(dome.max()), 1e-6)
    level = 1 + np.float32(rng.uniform(-0.3, 0.6)) * (dome - np.float32(0.7))
    if size > 10:
        grain = smooth_noise(rng, coverage.shape, max(size / rng.uniform(4, 12), 1.0))
        level = level * (1 + np.float32(rng.uniform(0.02, 0.25)) * grain)
    if size > 18 and rng.random() < 0.4:
        spots = np.clip(3 * (smooth_noise(rng, coverage.shape, size / rng.uniform(3, 6)) - 1.0), 0, 1)
        level = level * (1 + np.float32(rng.uniform(-0.6, 0.8)) * spots)
    return np.clip(level, 0.15, 2)


def _corner(cell: Cell, coverage: Floats) -> tuple[int, int]:
    return int(cell.centre[0] - coverage.shape[0] / 2), int(cell.centre[1] - coverage.shape[1] / 2)


def _fluorescence(rng: np.random.Generator, shape: tuple[int, int]) -> Canvas:
    """Bright nuclei on black, grey or in one dye's colour, often very dim."""
    dye = np.array([1, 1, 1] if rng.random() < 0.75 else rng.dirichlet([0.5, 0.7, 1.0]) * 2, np.float32)
    peak = float(np.exp(rng.uniform(np.log(28), np.log(235))))
    floor = rng.uniform(0.01, 0.25) * peak
    light = floor * (0.6 + 0.8 * octaves(rng, shape, max(shape) / 2, 2))
    canvas = Canvas(np.repeat(light[..., None], 3, axis=2))
    haze = np.zeros(shape, np.float32)
    uneven = rng.uniform(0.05, 0.6)
    roughness, edge = rng.uniform(0.05, 0.35), rng.uniform(0, 0.06)
    for cell in _cells(rng, shape):
        coverage = np.pad(_stamp(rng, cell.size, roughness), 3)
        top, left = _corner(cell, coverage)
        place = window(shape, coverage.shape, top, left)
        if place is None:
            continue
        level = peak * float(np.exp(rng.normal(0, uneven))) * _profile(rng, coverage, cell.size)
        alpha = soften(coverage, min(edge * cell.size, 2.5))[place.stamp]
        through = rng.uniform(0, 0.5)  # light adds up: a nucleus does not hide the one below completely
        glow = level[place.stamp] + np.float32(through) * canvas.pixels[place.canvas][..., 0]
        canvas.blend(np.repeat(glow[..., None], 3, axis=2), alpha, place.canvas)
        canvas.claim(coverage[place.stamp], place.canvas)
        haze[place.canvas] += alpha * level[place.stamp]
    scattered = blur(np.clip(haze / 255, 0, 1), max(shape) * rng.uniform(0.01, 0.05)) * 255
    canvas.pixels += (np.float32(rng.uniform(0, 0.35)) * scattered)[..., None]
    canvas.pixels *= dye
    return canvas


def _stained(rng: np.random.Generator, shape: tuple[int, int]) -> Canvas:
    """Purple nuclei on white or pink, with fibres and nuclei out of focus between them."""
    pink = np.array([rng.uniform(200, 245), rng.uniform(150, 225), rng.uniform(200, 240)], np.float32)
    pale = np.array([rng.uniform(205, 248), rng.uniform(200, 245), rng.uniform(205, 248)], np.float32)
    tissue = octaves(rng, shape, max(shape) / rng.uniform(3, 20), 5)
    strength = np.float32(rng.uniform(0.1, 1.2))
    ground = pale + np.clip(strength * tissue, 0, 1)[..., None] * (pink * np.float32(rng.uniform(0.75, 1)) - pale)
    canvas = Canvas(np.asarray(ground, np.float32))
    purple = np.array([rng.uniform(60, 150), rng.uniform(30, 100), rng.uniform(110, 190)], np.float32)
    roughness = rng.uniform(0.08, 0.45)
    cells = _cells(rng, shape)
    for index, cell in enumerate(cells):
        distractor = index < len(cells) * 0.2  # painted first, out of focus, not ground truth
        coverage = np.pad(_stamp(rng, cell.size, roughness), 4)
        top, left = _corner(cell, coverage)
        place = window(shape, coverage.shape, top, left)
        if place is None:
            continue
        tint = near(rng, purple, 0.15) if not distractor else (purple + pink) / 2
        surface = tint * (2 - _profile(rng, coverage, cell.size))[..., None]
        if rng.random() < 0.5:  # the membrane takes more stain than the inside
            inside = blur(coverage, cell.size * 0.05) ** 2
            surface = surface + inside[..., None] * (pink - surface) * np.float32(rng.uniform(0, 0.5))
        alpha = soften(coverage, cell.size * 0.08 if distractor else rng.uniform(0.3, 1.0))
        opacity = np.float32(rng.uniform(0.3, 0.6) if distractor else rng.uniform(0.75, 1))
        canvas.blend(np.clip(surface, 0, 255)[place.stamp], opacity * alpha[place.stamp], place.canvas)
        if not distractor:
            canvas.claim(coverage[place.stamp], place.canvas)
    return canvas


def _smear(rng: np.random.Generator, shape: tuple[int, int]) -> Canvas:
    """Translucent cells on a bright ground, each with a dark nucleus; the cells themselves are not ground truth."""
    tint = np.array([1, 1, 1] if rng.random() < 0.6 else rng.uniform(0.8, 1, 3), np.float32)
    ground = rng.uniform(200, 250) * (0.92 + 0.1 * octaves(rng, shape, max(shape) / 2, 2))
    canvas = Canvas(ground[..., None] * tint)
    for cell in _cells(rng, shape, spacing=rng.uniform(1.2, 2.5)):
        body = _stamp(rng, cell.size * rng.uniform(1.8, 3.2), rng.uniform(0.2, 0.6))
        place = window(shape, body.shape, *_corner(cell, body))
        if place is not None:
            grain = 1 + np.float32(0.12) * smooth_noise(rng, body.shape, max(cell.size / 4, 1.5))
            veil = np.float32(rng.uniform(0.05, 0.3)) * body * grain
            canvas.pixels[place.canvas] *= 1 - veil[place.stamp][..., None]
        core = np.pad(_stamp(rng, cell.size, 0.15), 3)
        place = window(shape, core.shape, *_corner(cell, core))
        if place is None:
            continue
        dark = np.float32(rng.uniform(50, 130)) * _profile(rng, core, cell.size)[..., None] * tint
        alpha = np.float32(rng.uniform(0.7, 1)) * soften(core, rng.uniform(0.3, 1.2))
        canvas.blend(np.asarray(dark[place.stamp], np.float32), alpha[place.stamp], place.canvas)
        canvas.claim(core[place.stamp], place.canvas)
    return canvas


def paint(rng: np.random.Generator, shape: tuple[int, int]) -> Canvas:
    """A microscopy scene on a canvas of ``shape`` (H, W), before lens and sensor."""
    kind = rng.choice(["fluorescence", "stained", "smear"], p=[0.6, 0.27, 0.13])
    return {"fluorescence": _fluorescence, "stained": _stained, "smear": _smear}[str(kind)](rng, shape)
