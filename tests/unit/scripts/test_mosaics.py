"""Mosaics: objects of the sizes asked for, with their masks where they are seen."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from tests.scripts import load_script
from tinysam.lake.rle import decode_rle, encode_rle
from tinysam.synthetic.sa1b import sidecar


@pytest.fixture(scope="module")
def mosaics() -> ModuleType:
    return load_script("mosaics")


def write_image(folder: Path, name: str, side: int, size: int = 96) -> None:
    """Four white squares of ``side`` pixels on grey."""
    pixels = np.full((size, size, 3), 90, np.uint8)
    rles = []
    for y, x in ((8, 8), (8, 60), (60, 8), (60, 60)):
        mask = np.zeros((size, size), bool)
        mask[y : y + side, x : x + side] = True
        pixels[mask] = 255
        rles.append(encode_rle(mask))
    folder.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / f"{name}.json").write_bytes(sidecar(f"{name}.png", 1, (size, size), rles))


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    for number in range(3):
        write_image(tmp_path / "lake", f"usual{number}", side=24 + number)
    write_image(tmp_path / "lake", "small", side=4, size=400)
    return tmp_path / "lake"


def read(folder: Path, name: str) -> tuple[np.ndarray, list[np.ndarray]]:
    annotations = json.loads((folder / f"{name}.json").read_bytes())["annotations"]
    return np.array(Image.open(folder / f"{name}.png")), [decode_rle(a["segmentation"]) for a in annotations]


def build(mosaics: ModuleType, lake: Path, output: Path, **options: object) -> None:
    config = mosaics.Mosaics(lake=str(lake), output=str(output), image_size=128, **options)
    mosaics.build(config, Console(quiet=True))


def test_objects_lie_where_their_masks_say_and_have_the_sizes_asked_for(
    mosaics: ModuleType, lake: Path, tmp_path: Path
) -> None:
    build(mosaics, lake, tmp_path / "out", count=2, shapes=((256, 160), (200, 200)), sizes=(6.0, 9.0), copies=())
    for number, shape in enumerate([(160, 256), (200, 200)]):
        image, masks = read(tmp_path / "out", f"mosaic{number:04d}")
        assert image.shape[:2] == shape
        everything = np.any(masks, 0)
        white = image[..., 0] > 180
        assert (everything & white).sum() > 0.9 * max(everything.sum(), white.sum())
        sides = np.sqrt([mask.sum() for mask in masks]) * 128 / max(shape)
        assert 5 < np.median(sides) < 10
        assert len(masks) > 20


def test_images_of_tiny_objects_are_copied_smaller_and_are_no_tiles(
    mosaics: ModuleType, lake: Path, tmp_path: Path
) -> None:
    build(mosaics, lake, tmp_path / "out", count=1, shapes=((64, 64),), tiny=5.0, copies=(0.75,))
    original, masks = read(tmp_path / "out", "tiny00_0")
    np.testing.assert_array_equal(original, np.array(Image.open(lake / "small.png")))
    smaller, fewer = read(tmp_path / "out", "tiny00_1")
    assert smaller.shape == original.shape
    assert smaller[:49].max() == 0
    assert smaller[50:-50, 50:-50].min() > 0
    assert [mask.sum() for mask in masks] == [16] * 4
    assert [mask.sum() for mask in fewer] == [9] * 4
    assert not list((tmp_path / "out").glob("tiny01*"))


def test_the_same_seed_gives_the_same_bytes(mosaics: ModuleType, lake: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build(mosaics, lake, tmp_path / name, count=2, max_objects=5, shapes=((96, 96),), seed=seed)
    first, again, other = (
        [file.read_bytes() for file in sorted((tmp_path / name).iterdir())] for name in ("a", "b", "c")
    )
    assert first == again != other
    assert len(read(tmp_path / "a", "mosaic0000")[1]) <= 5


def test_a_lake_without_usual_images_is_refused(mosaics: ModuleType, lake: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no image with objects to tile with"):
        build(mosaics, lake, tmp_path / "out", tiny=1000.0)
    with pytest.raises(ValueError, match="copies"):
        mosaics.Mosaics(lake="x", output="y", copies=(1.5,))
