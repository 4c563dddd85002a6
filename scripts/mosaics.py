"""Writes mosaics of small objects, for models that shall find what is tiny in a large image.

    python scripts/mosaics.py --lake LAKE/train/nuclei --output LAKE/train/nuclei_mosaics --count 150

The lake is a folder in SA-1B's layout, ``x.png`` beside ``x.json``. Each mosaic is tiled with the lake's images, shrunk
until their objects are of ``--sizes`` pixels in the model's frame. An image whose objects are tiny already is no tile;
it is written as it is and in smaller copies, on black.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tyro
from PIL import Image
from rich.console import Console
from rich.progress import track

from tinysam.lake.annotations import read_annotations
from tinysam.lake.filesystem import LakeError, list_files, read_bytes
from tinysam.lake.images import ImageError, decode_image
from tinysam.lake.rle import decode_rle, encode_rle, rle_bbox
from tinysam.synthetic.sa1b import write_png

MIN_AREA = 6
"""Pixels of an object that is still worth showing."""


@dataclass(frozen=True, kw_only=True)
class Mosaics:
    """What is written."""

    lake: str
    """Folder or URL of the images, in SA-1B's layout."""
    output: str
    """Folder or URL of the mosaics, in SA-1B's layout."""
    count: int = 150
    """Mosaics."""
    shapes: tuple[tuple[int, int], ...] = ((1280, 608), (1024, 1024), (1152, 768))
    """Widths and heights of mosaics, in turn."""
    image_size: int = 768
    """Side of the model's frame."""
    sizes: tuple[float, float] = (5.0, 14.0)
    """Least and greatest median side of a tile's objects, in pixels of the model's frame."""
    tiny: float = 20.0
    """Median side of its objects, in pixels of the model's frame, below which an image is no tile."""
    copies: tuple[float, ...] = (0.8, 0.65)
    """Sizes of the copies of an image of tiny objects, as shares of its own."""
    max_objects: int = 300
    """Objects of a mosaic, chosen by chance."""
    seed: int = 0
    """Of tiles, sizes and objects."""

    def __post_init__(self) -> None:
        if self.count < 0 or self.max_objects < 1 or not self.shapes:
            raise ValueError("count must not be negative, max_objects at least 1, and shapes not empty")
        if not 0 < self.sizes[0] <= self.sizes[1]:
            raise ValueError(f"sizes needs 0 < least <= greatest, got {self.sizes}")
        if not all(0 < share < 1 for share in self.copies):
            raise ValueError(f"copies must lie between 0 and 1, got {self.copies}")


@dataclass(frozen=True)
class Patch:
    """One object's mask, cut out."""

    top: int
    left: int
    inside: np.ndarray
    """(h, w) bool."""


@dataclass(frozen=True)
class Tile:
    """An image of the lake."""

    image: Image.Image
    masks: list[dict[str, Any]]
    """COCO's run lengths, as all of a lake's masks in pixels would not fit."""
    side: float
    """The median of its objects' sides, in pixels."""

    def scaled(self, ratio: float) -> tuple[Image.Image, list[Patch]]:
        """The image in another size, and what is left of its objects."""
        size = max(8, round(self.image.width * ratio)), max(8, round(self.image.height * ratio))
        found = []
        for mask in self.masks:
            pixels = Image.fromarray(decode_rle(mask).astype(np.uint8) * 255)
            resized = pixels.resize(size, Image.Resampling.BILINEAR)
            inside = np.array(resized) > 127
            if inside.sum() >= MIN_AREA:
                ys, xs = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
                found.append(Patch(int(ys[0]), int(xs[0]), inside[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]))
        return self.image.resize(size, Image.Resampling.BILINEAR), found


def read_tiles(folder: str, console: Console) -> list[Tile]:
    """All images of a folder that have objects, in order of their names.

    Raises:
        LakeError: if the folder cannot be read.
        ImageError: if one of the images cannot.
    """
    tiles = []
    for url in track([u for u in list_files(folder) if not u.endswith(".json")], "reading", console=console):
        pixels = decode_image(read_bytes(url))
        row = {"annotations_uri": url.rsplit(".", 1)[0] + ".json"}
        rles = read_annotations(row, *pixels.shape[:2]) or []
        if rles:
            sides = [np.sqrt(width * height) for _, _, width, height in map(rle_bbox, rles)]
            tiles.append(Tile(Image.fromarray(pixels), rles, float(np.median(sides))))
    return tiles


def mosaic(
    tiles: Sequence[Tile], shape: tuple[int, int], config: Mosaics, rng: np.random.Generator
) -> tuple[Image.Image, list[Patch]]:
    """Columns of tiles, filled from the top: an image of ``shape`` (width, height), and its objects."""
    width, height = shape
    frame = config.image_size / max(width, height)
    canvas, patches, x = Image.new("RGB", shape), [], 0
    while x < width:
        y, column = 0, 0
        while y < height:
            tile = tiles[int(rng.integers(len(tiles)))]
            wanted = float(np.exp(rng.uniform(*np.log(config.sizes)))) / frame
            image, found = tile.scaled(min(1.0, wanted / tile.side))
            column = column or min(image.width, width - x)
            shown = min(column, image.width), min(height - y, image.height)
            canvas.paste(image.crop((0, 0, *shown)), (x, y))
            for patch in found:
                inside = patch.inside[: max(0, shown[1] - patch.top), : max(0, shown[0] - patch.left)]
                if inside.sum() >= MIN_AREA:
                    patches.append(Patch(y + patch.top, x + patch.left, inside))
            y += image.height
        x += column
    return canvas, [patches[i] for i in rng.permutation(len(patches))[: config.max_objects]]


def smaller(tile: Tile, share: float) -> tuple[Image.Image, list[Patch]]:
    """A copy of an image of tiny objects in the middle of a black one of its size."""
    image, found = tile.scaled(share)
    left, top = (tile.image.width - image.width) // 2, (tile.image.height - image.height) // 2
    canvas = Image.new("RGB", tile.image.size)
    canvas.paste(image, (left, top))
    return canvas, [Patch(top + patch.top, left + patch.left, patch.inside) for patch in found]


def write(folder: str, name: str, number: int, image: Image.Image, patches: Sequence[Patch]) -> None:
    """Writes an image and its masks."""
    rles = []
    for patch in patches:
        mask = np.zeros((image.height, image.width), bool)
        height, width = patch.inside.shape
        mask[patch.top : patch.top + height, patch.left : patch.left + width] = patch.inside
        rles.append(encode_rle(mask))
    write_png(folder, name, number, np.array(image), rles)


def build(config: Mosaics, console: Console) -> None:
    """Writes all; files of an earlier run of the same configuration are replaced by the same bytes.

    Raises:
        ValueError: if the lake has no image to tile with.
    """
    tiles = read_tiles(config.lake, console)
    small = [tile.side * config.image_size / max(tile.image.size) < config.tiny for tile in tiles]
    usual = [tile for tile, is_tiny in zip(tiles, small, strict=True) if not is_tiny]
    tiny = [tile for tile, is_tiny in zip(tiles, small, strict=True) if is_tiny]
    if config.count and not usual:
        raise ValueError(f"{config.lake} has no image with objects to tile with; look at --lake and --tiny")
    rng = np.random.default_rng(config.seed)
    for number in track(range(config.count), "mosaics", console=console):
        shape = config.shapes[number % len(config.shapes)]
        write(config.output, f"mosaic{number:04d}", number, *mosaic(usual, shape, config, rng))
    for number, tile in enumerate(track(tiny, "tiny objects", console=console)):
        for copy, share in enumerate((1.0, *config.copies)):
            image_id = config.count + number * (1 + len(config.copies)) + copy
            write(config.output, f"tiny{number:02d}_{copy}", image_id, *smaller(tile, share))
    console.print(f"{config.output}: {config.count} mosaics, {len(tiny)} images of tiny objects", highlight=False)


def main() -> int:
    """Runs the command line and returns its exit code."""
    console = Console(stderr=True)
    try:
        build(tyro.cli(Mosaics, description=__doc__), console)
    except (LakeError, ImageError, ValueError) as error:
        console.print(f"[red]error:[/red] {error}", highlight=False)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
