"""Every format is read back to the same masks, whatever the images are called."""

from __future__ import annotations

import io
import json
import tracemalloc
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from skimage.measure import points_in_poly

from tinysam.cli import EXPORT_FORMATS, main
from tinysam.export import FORMATS, ExportError, export
from tinysam.export.names import FileNames
from tinysam.lake import schema
from tinysam.lake.filesystem import LakeError
from tinysam.lake.shards import write_shard

Images = dict[str, list[np.ndarray]]
ToMask = Callable[[np.ndarray, float], dict[str, Any]]


@pytest.fixture
def exported(make_masks: Callable[..., Path], images: Images, tmp_path: Path) -> Callable[[str], Path]:
    """A function that exports the images in a format and returns the folder."""

    def run(kind: str) -> Path:
        folder = tmp_path / "exports" / kind
        result = export(str(make_masks(images)), kind, str(folder))
        assert (result.images, result.masks) == (len(images), sum(map(len, images.values())))
        assert result.left_out == {"truncated": 1}
        return folder

    return run


@pytest.mark.parametrize(("kind", "file"), [("coco", "instances.json"), ("cvat", "annotations/instances_default.json")])
def test_coco_loads_in_pycocotools_with_the_same_masks(
    kind: str, file: str, exported: Callable[[str], Path], images: Images
) -> None:
    with redirect_stdout(io.StringIO()):
        coco = COCO(exported(kind) / file)
    assert [image["file_name"] for image in coco.dataset["images"]] == list(images)
    assert [category["id"] for category in coco.dataset["categories"]] == [1]
    for image in coco.dataset["images"]:
        annotations = coco.loadAnns(coco.getAnnIds(image["id"]))
        expected = images[image["file_name"]]
        assert len(annotations) == len(expected)
        for annotation, mask in zip(annotations, expected, strict=True):
            np.testing.assert_array_equal(coco.annToMask(annotation).astype(bool), mask)
            assert annotation["area"] == mask.sum()
            assert annotation["iscrowd"] == (kind == "cvat")
    assert len({annotation["id"] for annotation in coco.dataset["annotations"]}) == sum(map(len, images.values()))


def test_sa1b_lies_where_its_image_would_with_the_same_masks(exported: Callable[[str], Path], images: Images) -> None:
    folder = exported("sa1b")
    names = FileNames(images)
    for name, masks in images.items():
        content = json.loads((folder / f"{names.path_of(name)}.json").read_text(encoding="utf-8"))
        assert len(content["annotations"]) == len(masks)
        for annotation, mask in zip(content["annotations"], masks, strict=True):
            np.testing.assert_array_equal(coco_mask.decode(annotation["segmentation"]).astype(bool), mask)
    assert (folder / "a b" / "c d.json").exists()


def test_sa1b_is_a_lake_that_this_project_reads(make_masks: Callable[..., Path], tmp_path: Path) -> None:
    from tinysam.lake.annotations import read_annotations
    from tinysam.lake.index import IndexConfig, build_index

    mask = np.eye(6, 8, dtype=bool)
    (tmp_path / "lake").mkdir()
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(tmp_path / "lake" / "a.png")
    export(str(make_masks({"a.png": [mask]})), "sa1b", str(tmp_path / "lake"))
    [row] = build_index(IndexConfig(lake=str(tmp_path / "lake"))).to_pylist()
    [found] = read_annotations(row, 6, 8) or []
    np.testing.assert_array_equal(coco_mask.decode(found).astype(bool), mask)


def test_yolo_polygons_enclose_the_same_pixels(exported: Callable[[str], Path], images: Images) -> None:
    folder = exported("yolo") / "labels"
    names = FileNames(images)
    for name, masks in images.items():
        lines = (folder / f"{names.path_of(name)}.txt").read_text().splitlines()
        drawn = [mask for mask in masks if mask.any()]  # an empty mask has no outline
        assert len(lines) == len(drawn)
        for line, mask in zip(lines, drawn, strict=True):
            category, *values = line.split(" ")
            corners = np.array(values, float).reshape(-1, 2) * mask.shape[::-1]
            assert category == "0"
            assert len(corners) >= 4
            rows, columns = np.indices(mask.shape)
            centres = np.stack([columns.ravel() + 0.5, rows.ravel() + 0.5], axis=1)
            np.testing.assert_array_equal(points_in_poly(centres, corners).reshape(mask.shape), mask)


def test_label_maps_show_the_smallest_mask_of_each_pixel(exported: Callable[[str], Path], images: Images) -> None:
    folder = exported("png")
    names = FileNames(images)
    for name, masks in images.items():
        labels = np.array(Image.open(folder / f"{names.path_of(name)}.png"))
        if not masks:
            assert labels.shape == (5, 7)
            assert not labels.any()
            continue
        areas = np.array([np.where(mask, mask.sum(), np.inf) for mask in masks])
        expected = np.where(np.isfinite(areas.min(axis=0)), areas.argmin(axis=0) + 1, 0)
        np.testing.assert_array_equal(labels, expected)


def test_masks_that_do_not_overlap_are_all_in_the_label_map(make_masks: Callable[..., Path], tmp_path: Path) -> None:
    labels = np.arange(300).reshape(15, 20)
    masks = [labels == number for number in range(300)]
    export(str(make_masks({"many.png": masks})), "png", str(tmp_path / "png"))
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "png" / "many.png")), labels + 1)


def test_label_studio_brushes_decode_to_the_same_masks(exported: Callable[[str], Path], images: Images) -> None:
    text = (exported("label-studio") / "tasks.json").read_text(encoding="utf-8")
    assert "secret" not in text
    tasks = json.loads(text)
    assert [task["data"]["image_id"] for task in tasks] == list(images)
    for task, masks in zip(tasks, images.values(), strict=True):
        assert task["data"]["image"].startswith("s3://***@lake/")
        [prediction] = task["predictions"]
        for result, mask in zip(prediction["result"], masks, strict=True):
            assert (result["original_height"], result["original_width"]) == mask.shape
            pixels = np.array(decode_rle_pack(result["value"]["rle"])).reshape(*mask.shape, 4)
            np.testing.assert_array_equal(pixels, np.where(mask, 255, 0)[..., None].repeat(4, axis=2))


def decode_rle_pack(data: list[int]) -> list[int]:
    """Label Studio's decoder (``label_studio_sdk.converter.brush.decode_rle``), written again from its description."""
    bits = "".join(format(byte, "08b") for byte in data)
    position = 0

    def read(width: int) -> int:
        nonlocal position
        position += width
        return int(bits[position - width : position], 2)

    count, word = read(32), read(5) + 1
    widths = [read(4) + 1 for _ in range(4)]
    values: list[int] = []
    while len(values) < count:
        repeated = read(1)
        length = read(widths[read(2)]) + 1
        values += [read(word)] * length if repeated else [read(word) for _ in range(length)]
    assert len(values) == count
    return values


@pytest.mark.parametrize("kind", FORMATS)
def test_no_name_leads_out_of_the_folder(kind: str, exported: Callable[[str], Path], tmp_path: Path) -> None:
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    folder = exported(kind)
    written = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    written = {path for path in written if "labels/shards" not in path.as_posix()}
    assert written
    assert all(path.resolve().is_relative_to(folder.resolve()) for path in written)


@pytest.mark.parametrize("kind", ["coco", "sa1b"])
def test_memory_does_not_grow_with_the_lake(kind: str, make_masks: Callable[..., Path], tmp_path: Path) -> None:
    def peak(count: int) -> int:
        noise = np.random.default_rng(0).random((200, 200)) < 0.5
        labels = make_masks({f"{number:04d}.png": [noise] for number in range(count)}, images_per_shard=8)
        tracemalloc.start()
        export(str(labels), kind, str(tmp_path / str(count)))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(8)  # imports
    # The masks of 90 images more take two megabytes.
    assert peak(120) < peak(30) + 500_000


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("change", [{"counts": "!!"}, {"counts": "1"}, {"size": [1, 1]}])
def test_a_damaged_mask_is_named(kind: str, change: dict[str, Any], to_mask: ToMask, tmp_path: Path) -> None:
    mask = to_mask(np.eye(4, dtype=bool), 0.5) | change
    row = {"image_id": "a.jpg", "uri": "a", "status": "ok", "height": 4, "width": 4, "masks": [mask]}
    write_shard(str(tmp_path / "shards"), "shard-0", pa.Table.from_pylist([row], schema=schema.MASKS), {})
    with pytest.raises(ExportError, match=r"a\.jpg: mask 0"):
        export(str(tmp_path), kind, str(tmp_path / "out"))
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_masks_of_training_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{"image_id": "a", "uri": "a", "status": "ok"}], schema=schema.EMBEDDING)
    write_shard(str(tmp_path / "shards"), "shard-0", table, {})
    with pytest.raises(LakeError, match="holds no masks"):
        export(str(tmp_path), "coco", str(tmp_path / "out"))


def test_an_output_of_another_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="holds no shards"):
        export(str(tmp_path), "coco", str(tmp_path / "out"))


def test_the_command_offers_every_format() -> None:
    assert sorted(EXPORT_FORMATS) == sorted(FORMATS)


def test_the_command_exports_and_says_what_it_left_out(
    make_masks: Callable[..., Path], images: Images, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = make_masks(images)
    assert main(["export", str(labels), "--format", "coco", "--to", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "18 images" in printed
    assert "1 truncated" in printed
    assert main(["export", str(tmp_path / "nowhere"), "--format", "png", "--to", str(tmp_path / "out")]) == 1
