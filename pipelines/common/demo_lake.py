"""The image lake of ``make demo``: photographs that came with packages, synthetic scenes, and two broken files."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tinysam.lake.filesystem import join, write_once
from tinysam.synthetic.sa1b import write_instances
from tinysam.synthetic.write import SceneSet, iter_write

PHOTOGRAPHS = {
    "skimage": (
        *("data/astronaut.png", "data/brick.png", "data/camera.png", "data/cell.png", "data/chelsea.png"),
        *("data/clock_motion.png", "data/coffee.png", "data/coins.png", "data/grass.png", "data/gravel.png"),
        *("data/hubble_deep_field.jpg", "data/ihc.png", "data/moon.png", "data/motorcycle_left.png"),
        *("data/retina.jpg", "data/rocket.jpg"),
    ),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
}
"""Files that lie in the packages as installed, so nothing is downloaded. Their licences are named beside them."""

BROKEN = ("broken/cut short.jpg", "broken/not an image.jpg")
"""Every real lake has some: names of the two files that no job can read."""


class DemoLakeError(Exception):
    """The demo's images cannot be found; the message says what to install."""


@dataclass(frozen=True, kw_only=True)
class DemoLake:
    """What the demo's storage holds before the first job runs."""

    images: str
    """The lake: ``photos/``, ``synthetic/`` (with SA-1B masks) and ``broken/``."""
    held_out: str
    """Synthetic scenes of another seed, to measure on."""
    instances: str
    """The held-out scenes' masks in COCO's form."""


def photographs() -> list[Path]:
    """The packages' photographs.

    Raises:
        DemoLakeError: If a package or one of its photographs is missing.
    """
    found: list[Path] = []
    for package, names in PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise DemoLakeError(f"the demo's photographs come with {package}, which is not installed: run `make demo`")
        found += [Path(spec.origin).parent / name for name in names]
    missing = [str(path) for path in found if not path.is_file()]
    if missing:
        raise DemoLakeError(
            f"this version of the package no longer has {', '.join(missing)}: install requirements.lock"
        )
    return found


def build_demo_lake(
    url: str, *, scenes: int, held_out: int, seed: int, on_image: Callable[[], None] = lambda: None
) -> DemoLake:
    """Writes the lake below ``url``, and calls ``on_image`` after each image.

    Raises:
        DemoLakeError: If the photographs are not there.
        LakeError: If the storage refuses.
    """
    lake = DemoLake(
        images=join(url, "lake"),
        held_out=join(url, "held-out"),
        instances=join(url, "held-out", "instances.json"),
    )
    pictures = photographs()
    for path in pictures:
        write_once(join(lake.images, "photos", path.name), path.read_bytes())
        on_image()
    whole = next(path for path in pictures if path.suffix == ".jpg").read_bytes()
    for name, data in zip(BROKEN, (whole[: len(whole) // 3], b"<html>404 Not Found</html>"), strict=True):
        write_once(join(lake.images, name), data)
        on_image()
    sets = (
        SceneSet(output=join(lake.images, "synthetic"), count=scenes, seed=seed),
        SceneSet(output=lake.held_out, count=held_out, seed=seed + 1),
    )
    for scene_set in sets:
        for _ in iter_write(scene_set):
            on_image()
    write_instances(lake.held_out)
    return lake
