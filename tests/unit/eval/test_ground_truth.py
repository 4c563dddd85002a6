from __future__ import annotations

import json

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from tinysam.eval.ground_truth import NO_CATEGORY, coco_image_ids, read_objects
from tinysam.lake.coco import CocoFile
from tinysam.lake.images import ImageError
from tinysam.lake.index import IndexConfig, build_index

SQUARE = [[1, 1, 6, 1, 6, 6, 1, 6]]


def row(annotations) -> dict:
    return {"annotations": json.dumps(annotations).encode()}


def test_categories_stay_with_their_masks_when_crowds_and_empty_masks_are_left_out():
    annotations = [
        {"category_id": 4, "segmentation": SQUARE, "iscrowd": 1},
        {"category_id": 5, "segmentation": []},
        {"category_id": 6, "segmentation": SQUARE},
        {"category_id": 7, "segmentation": {"size": [10, 12], "counts": [0, 30, 90]}},
    ]
    objects = read_objects(row(annotations), 10, 12)
    assert objects.categories == [6, 7]
    assert [int(mask_utils.area(rle)) for rle in objects.rles] == [25, 30]


def test_no_objects_differ_from_no_ground_truth():
    assert read_objects(row([]), 10, 12).rles == []
    assert read_objects({"annotations": None, "annotations_uri": None}, 10, 12) is None


def test_objects_of_a_sidecar_have_one_category(tmp_path):
    rle = mask_utils.encode(np.asfortranarray(np.ones((3, 4), np.uint8)))
    content = {"annotations": [{"segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}}] * 2}
    (tmp_path / "x.json").write_text(json.dumps(content))
    objects = read_objects({"annotations": None, "annotations_uri": str(tmp_path / "x.json")}, 3, 4)
    assert objects.categories == [NO_CATEGORY] * 2


def test_damaged_annotations_are_an_image_error():
    with pytest.raises(ImageError):
        read_objects(row([{"category_id": 1, "segmentation": "?"}]), 10, 12)


def test_images_without_objects_have_a_coco_id_too(tmp_path):
    for name in ("train/a.jpg", "b.jpg", "unlisted.jpg"):
        (tmp_path / "lake" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lake" / name).write_bytes(b"?")
    coco = {
        "images": [{"id": 11, "file_name": "a.jpg"}, {"id": 12, "file_name": "b.jpg"}],
        "annotations": [{"id": 1, "image_id": 11, "category_id": 1, "segmentation": SQUARE}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(coco))
    index = build_index(IndexConfig(lake=str(tmp_path / "lake")))
    found = coco_image_ids(CocoFile.read(str(tmp_path / "instances.json")), index)
    assert found == {"train/a.jpg": 11, "b.jpg": 12}
