"""The training lake: licences, crowds, the split, and images copied byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from tests.scripts import load_script
from tinysam.lake.index import IndexConfig, build_index


@pytest.fixture(scope="module")
def training_lake() -> ModuleType:
    return load_script("training_lake")


def _coco_folder(folder: Path, count: int, licenses: list[int] | None = None) -> None:
    (folder / "images").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(count):
        name = f"{number:03d}.png"
        Image.fromarray(np.full((24, 32, 3), number, np.uint8)).save(folder / "images" / name)
        images.append({"id": number + 1, "file_name": name, "width": 32, "height": 24})
        if licenses:
            images[-1]["license"] = licenses[number % len(licenses)]
        square = {"image_id": number + 1, "category_id": 3, "segmentation": [[4, 4, 14, 4, 14, 14, 4, 14]]}
        annotations.append({**square, "id": 2 * number, "iscrowd": 0, "area": 100})
        crowd = {"size": [24, 32], "counts": [0, 768]}
        annotations.append({**square, "id": 2 * number + 1, "segmentation": crowd, "iscrowd": 1})
    (folder / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))


def test_lake_holds_permitted_images_once_with_masks_and_without_crowds(
    training_lake: ModuleType, tmp_path: Path
) -> None:
    _coco_folder(tmp_path / "data" / "nuclei", 30)
    _coco_folder(tmp_path / "data" / "coco_mini_train", 24, licenses=[1, 2, 3, 4, 5, 6, 7, 8])
    config = training_lake.TrainingLake(
        data=str(tmp_path / "data"),
        output=str(tmp_path / "lake"),
        synthetic_train=1,
        synthetic_val=1,
        val_share=0.4,
        workers=1,
    )
    training_lake.build(config, Console(quiet=True))

    index = build_index(IndexConfig(lake=str(tmp_path / "lake"))).to_pylist()
    ids = [row["image_id"] for row in index]
    assert sum("nuclei" in name for name in ids) == 30
    photos = [name for name in ids if "photos" in name]
    assert {int(Path(name).stem) % 8 + 1 for name in photos} == {4, 5, 7, 8}
    assert len(photos) == 12
    for split in ("train", "val"):
        images = list((tmp_path / "lake" / split / "nuclei").glob("*.png"))
        assert 5 < len(images) < 25
        for image in images:
            assert image.read_bytes() == (tmp_path / "data" / "nuclei" / "images" / image.name).read_bytes()
    instances = json.loads((tmp_path / "lake" / "val" / "nuclei" / "instances.json").read_bytes())
    assert len(instances["images"]) == len(instances["annotations"])
    assert {record["area"] for record in instances["annotations"]} == {100}
    assert {record["image_id"] for record in instances["annotations"]} == {i["id"] for i in instances["images"]}
    assert (tmp_path / "lake" / "train" / "synthetic" / "scene-00000.jpg").exists()


def test_split_depends_on_the_name_alone_and_keeps_the_share(training_lake: ModuleType) -> None:
    splits = [training_lake.split_of("nuclei", f"{number}.png", 0.1) for number in range(2000)]
    assert 140 < splits.count("val") < 260
    assert splits == [training_lake.split_of("nuclei", f"{number}.png", 0.1) for number in range(2000)]


def test_only_jpeg_and_png_are_copied(training_lake: ModuleType, tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 255, (9, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.bmp")
    data, extension = training_lake.as_jpeg_or_png((tmp_path / "x.bmp").read_bytes())
    assert extension == ".png"
    (tmp_path / "x.png").write_bytes(data)
    assert (np.array(Image.open(tmp_path / "x.png")) == pixels).all()
    assert training_lake.as_jpeg_or_png(data) == (data, ".png")


def test_variants_show_the_same_part_of_image_and_masks(training_lake: ModuleType) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    masks = image[..., :2] > 100  # as a mask says of each pixel what its colour does
    shapes = set()
    for seed in range(20):
        pixels, cut = training_lake.altered(image, masks, (0.5, 0.8), np.random.default_rng(seed))
        np.testing.assert_array_equal(pixels[..., :2] > 100, cut)
        assert min(pixels.shape[:2]) >= 0.5 * 40
        assert max(pixels.shape[:2]) <= 0.8 * 60
        shapes.add(pixels.shape)
    assert len(shapes) > 10


def test_variants_are_of_training_images_alone(training_lake: ModuleType, tmp_path: Path) -> None:
    for name in ("nuclei", "coco_mini_train"):
        _coco_folder(tmp_path / "data" / name, 12, licenses=[4])
    output = tmp_path / "lake"
    options = {"synthetic_train": 1, "synthetic_val": 1, "val_share": 0.4, "workers": 1, "variants": 2}
    config = training_lake.TrainingLake(data=str(tmp_path / "data"), output=str(output), **options)
    training_lake.build(config, Console(quiet=True))
    stems = {path.stem for path in (output / "train" / "nuclei").glob("*.png")}
    variants = {path.stem for path in (output / "train" / "nuclei_variants").glob("*.png")}
    assert variants == {f"{stem}_{number}" for stem in stems for number in range(2)}
    index = build_index(IndexConfig(lake=str(output / "train" / "nuclei_variants")))
    assert len(index) == len(variants)
    assert not (output / "val" / "nuclei_variants").exists()
