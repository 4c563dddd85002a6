"""Writes scenes as a lake in SA-1B's layout: ``scene-00000.jpg`` beside ``scene-00000.json``."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

from tinysam.lake.filesystem import join, write_once
from tinysam.lake.images import encode_jpeg
from tinysam.lake.rle import encode_rle
from tinysam.synthetic.sa1b import sidecar
from tinysam.synthetic.scene import Style, scene


@dataclass(frozen=True, kw_only=True)
class SceneSet:
    """A numbered set of scenes: number ``i`` depends on nothing but ``seed`` and ``i``."""

    output: str
    """Folder or URL that receives the files."""
    count: int
    """How many scenes."""
    seed: int = 0
    """Sets of different seeds have nothing in common."""
    height: int = 512
    """Pixels."""
    width: int = 512
    """Pixels."""
    style: Style | None = None
    """Paint every scene in one style; by default one in three is microscopy."""
    workers: int = 1
    """Processes that paint at the same time. The files do not depend on it."""

    def __post_init__(self) -> None:
        if self.count < 0 or self.workers < 1:
            raise ValueError(f"count must be at least 0 and workers at least 1, got {self.count} and {self.workers}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")


def _write_one(config: SceneSet, number: int) -> int:
    """Writes scene ``number`` and returns how many objects it has."""
    painted = scene((config.seed, number), (config.height, config.width), config.style)
    name = f"scene-{number:05d}"
    rles = [encode_rle(mask) for mask in painted.masks]
    # The image comes last: a lake that is listed meanwhile never shows one without its ground truth.
    write_once(join(config.output, f"{name}.json"), sidecar(f"{name}.jpg", number, painted.labels.shape, rles))
    write_once(join(config.output, f"{name}.jpg"), encode_jpeg(painted.pixels))
    return len(rles)


def iter_write(config: SceneSet) -> Iterator[int]:
    """Writes a set and yields the number of objects of each scene in order, so that a caller can show progress.

    Raises LakeError where the folder cannot be written to.
    """
    write = partial(_write_one, config)
    if config.workers == 1:
        yield from map(write, range(config.count))
        return
    # Forking a process that runs threads (torch, an open S3 session) can deadlock; a spawned one starts clean.
    with ProcessPoolExecutor(config.workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(write, range(config.count), chunksize=4)


def write_scenes(folder_url: str, count: int, seed: int = 0, *, style: Style | None = None, workers: int = 1) -> int:
    """Writes ``count`` 512x512 scenes to a folder or URL in SA-1B's layout and returns how many objects they show.

    Raises LakeError where the folder cannot be written to.
    """
    return sum(iter_write(SceneSet(output=folder_url, count=count, seed=seed, style=style, workers=workers)))
