"""Families of outlines, and how one becomes an anti-aliased coverage map. Our own recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tinysam.synthetic.noise import Floats

Points = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Ink:
    """One stroke of a drawing in arbitrary units."""

    points: Points
    """(N, 2) x and y: a closed contour, or the course of a line."""
    kind: Literal["fill", "cut", "line"] = "fill"
    """Fill the contour, cut it out of what was drawn before, or draw along the points."""
    width: float = 0.0
    """Width of a line, in the units of ``points``."""


def _circle(count: int = 48) -> Points:
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def ellipse(rng: np.random.Generator) -> list[Ink]:
    """An ellipse, or a superellipse on the way to a rounded rectangle."""
    unit = _circle(64)
    power = rng.choice([1.0, rng.uniform(0.35, 0.9)])
    stretch = np.array([1, rng.uniform(0.35, 1)])
    return [Ink(points=np.sign(unit) * np.abs(unit) ** power * stretch)]


def blob(rng: np.random.Generator, roughness: float | None = None, slimmest: float = 0.5) -> list[Ink]:
    """A closed Fourier contour, smooth to ragged; ``slimmest`` bounds the shorter side relative to the longer."""
    orders = np.arange(2, 14)
    decay = rng.uniform(1.1, 2.4)
    strength = rng.uniform(0.15, 0.6) if roughness is None else roughness
    amplitude = strength * rng.standard_normal(len(orders)) / orders**decay
    phase = rng.uniform(0, 2 * np.pi, len(orders))
    angle = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    radius = 1 + (amplitude * np.cos(orders * angle[:, None] + phase)).sum(axis=1)
    return [Ink(points=np.maximum(radius, 0.15)[:, None] * _circle(96) * [1, rng.uniform(slimmest, 1)])]


def polygon(rng: np.random.Generator) -> list[Ink]:
    """An irregular polygon of three to nine corners; a rectangle now and then."""
    if rng.random() < 0.35:
        half = rng.uniform(0.2, 1)
        return [Ink(points=np.array([[-1, -half], [1, -half], [1, half], [-1, half]]))]
    corners = int(rng.integers(3, 10))
    angle = 2 * np.pi * (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) / corners
    radius = rng.uniform(0.55, 1, corners)
    return [Ink(points=np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1))]


def star(rng: np.random.Generator) -> list[Ink]:
    """A star or a gear: the radius jumps between two values."""
    rays = int(rng.integers(4, 13))
    angle = np.pi * np.arange(2 * rays) / rays
    radius = np.where(np.arange(2 * rays) % 2, rng.uniform(0.3, 0.75), 1.0)
    return [Ink(points=radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1))]


def ring(rng: np.random.Generator) -> list[Ink]:
    """Any closed contour with one to three holes, through which one sees what lies below."""
    outer = rng.choice(np.array([ellipse, blob, polygon], dtype=object))(rng)[0]
    if rng.random() < 0.6:
        return [outer, Ink(points=outer.points * rng.uniform(0.4, 0.8), kind="cut")]
    holes = [
        Ink(points=_circle(24) * rng.uniform(0.08, 0.22) + rng.uniform(-0.35, 0.35, 2), kind="cut")
        for _ in range(int(rng.integers(1, 4)))
    ]
    return [outer, *holes]


def curve(rng: np.random.Generator) -> list[Ink]:
    """A long bent band: cables, twigs, worms."""
    steps = 40
    turn = np.cumsum(rng.normal(0, 1, steps)) * rng.uniform(0.01, 0.05) + rng.uniform(-0.06, 0.06)
    heading = np.cumsum(turn) + rng.uniform(0, 2 * np.pi)
    course = np.cumsum(np.stack([np.cos(heading), np.sin(heading)], axis=1), axis=0)
    return [Ink(points=course, kind="line", width=steps * rng.uniform(0.05, 0.18))]


def composite(rng: np.random.Generator) -> list[Ink]:
    """A body with limbs, handles or lobes: several contours that count as one object."""
    body = rng.choice(np.array([ellipse, blob, polygon], dtype=object))(rng)[0]
    parts = [body]
    for _ in range(int(rng.integers(1, 5))):
        anchor = body.points[rng.integers(len(body.points))]
        if rng.random() < 0.5:
            reach = anchor * rng.uniform(1.2, 2.2) + rng.normal(0, 0.25, 2)
            parts.append(Ink(points=np.stack([anchor * 0.5, anchor, reach]), kind="line", width=rng.uniform(0.12, 0.4)))
        else:
            lobe = rng.choice(np.array([ellipse, blob], dtype=object))(rng)[0]
            parts.append(Ink(points=lobe.points * rng.uniform(0.25, 0.7) + anchor))
    return parts


FAMILIES: dict[str, Callable[[np.random.Generator], list[Ink]]] = {
    "ellipse": ellipse,
    "blob": blob,
    "polygon": polygon,
    "star": star,
    "ring": ring,
    "curve": curve,
    "composite": composite,
}


def _bend(rng: np.random.Generator, inks: list[Ink], distortion: float) -> list[Ink]:
    """Turns, shears and slightly bends a drawing, so that no family keeps its perfect form."""
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shear = np.array([[1, distortion * rng.uniform(-0.3, 0.3)], [0, 1 - distortion * rng.uniform(0, 0.4)]])
    reach = max(float(np.abs(ink.points).max()) for ink in inks)
    waves = rng.normal(0, 1.5 / reach, (3, 2))
    offset, strength = rng.uniform(0, 2 * np.pi, (3, 2)), reach * distortion * rng.uniform(0, 0.06)

    def bend(points: Points) -> Points:
        phase = points @ waves.T
        return (points + strength * np.sin(phase[:, :, None] + offset).sum(axis=1)) @ (shear @ turn)

    return [Ink(points=bend(ink.points), kind=ink.kind, width=ink.width) for ink in inks]


def rasterise(rng: np.random.Generator, inks: list[Ink], size: float, distortion: float = 1.0) -> Floats:
    """Coverage (h, w) in 0..1 of a drawing turned at random, whose longest side measures ``size`` pixels.

    A border of one empty pixel surrounds the drawing. ``distortion`` 0 only turns it, 1 shears and bends it too.
    """
    inks = _bend(rng, inks, distortion)
    margins = np.array([[ink.width / 2] * 2 for ink in inks if ink.kind != "cut"])
    drawn = [ink.points for ink in inks if ink.kind != "cut"]
    low = np.min([p.min(axis=0) - m for p, m in zip(drawn, margins, strict=True)], axis=0)
    high = np.max([p.max(axis=0) + m for p, m in zip(drawn, margins, strict=True)], axis=0)
    samples = 4 if size < 128 else 2
    scale = size / float((high - low).max())
    width, height = (np.ceil((high - low) * scale).astype(int) + 2).tolist()
    image = Image.new("L", (width * samples, height * samples))
    draw = ImageDraw.Draw(image)
    for ink in inks:
        points = (((ink.points - low) * scale + 1) * samples).astype(np.float32)
        flat = [tuple(point) for point in points.tolist()]
        if ink.kind == "line":
            thickness = max(round(ink.width * scale * samples), samples)
            draw.line(flat, fill=255, width=thickness, joint="curve")
            radius = thickness / 2
            for x, y in (flat[0], flat[-1]):
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        else:
            draw.polygon(flat, fill=255 if ink.kind == "fill" else 0)
    return np.asarray(image.reduce(samples), np.float32) / 255
