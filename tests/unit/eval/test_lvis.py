"""LVIS's AP by lvis-api, where it is installed: it is an extra."""

from __future__ import annotations

import builtins
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinysam.eval.lvis import LvisError, lvis_average_precision, read_lvis, require_lvis
from tinysam.lake.coco import CocoFile
from tinysam.lake.filesystem import LakeError
from tinysam.lake.rle import encode_rle

SIZE = (60, 80)


def box(left: int, right: int) -> dict[str, Any]:
    mask = np.zeros(SIZE, bool)
    mask[10:50, left:right] = True
    return encode_rle(mask)


def dataset() -> dict[str, Any]:
    """Two images; category 3 was not looked for in the first, and is exhaustively marked in the second."""
    image = {"height": SIZE[0], "width": SIZE[1], "not_exhaustive_category_ids": []}
    annotations = [(7, 1, box(5, 45)), (7, 2, box(50, 75)), (9, 1, box(20, 60))]
    return {
        "images": [
            {"id": 7, "neg_category_ids": [], "coco_url": "http://images.example/val2017/000000000007.jpg", **image},
            {"id": 9, "neg_category_ids": [3], "coco_url": "http://images.example/train2017/000000000009.jpg", **image},
        ],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "segmentation": rle, "area": 1600.0, "bbox": [0, 0, 1, 1]}
            for n, (i, c, rle) in enumerate(annotations, start=1)
        ],
        "categories": [{"id": 1, "frequency": "f"}, {"id": 2, "frequency": "r"}, {"id": 3, "frequency": "c"}],
    }


def result(image: int, category: int, segmentation: dict[str, Any], score: float = 0.9) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "segmentation": segmentation, "score": score}


PERFECT = [result(7, 1, box(5, 45)), result(7, 2, box(50, 75)), result(9, 1, box(20, 60))]


class TestAveragePrecision:
    @pytest.fixture(autouse=True)
    def _needs_lvis(self) -> None:
        pytest.importorskip("lvis")

    def test_perfect_masks_score_one(self) -> None:
        found = lvis_average_precision(dataset(), PERFECT, image_ids={7, 9})
        assert {name: found[name].value for name in ("ap", "ap_50", "ap_rare", "ap_frequent")} == pytest.approx(
            {"ap": 1.0, "ap_50": 1.0, "ap_rare": 1.0, "ap_frequent": 1.0}
        )
        assert math.isnan(found["ap_common"].value)
        assert (found["ap"].n, found["ap"].images) == (3, 2)

    def test_a_category_that_an_image_was_not_checked_for_costs_nothing(self) -> None:
        known = [*PERFECT, result(7, 3, box(0, 9), 0.99)]
        assert lvis_average_precision(dataset(), known, image_ids={7, 9})["ap"].value == pytest.approx(1.0)

    def test_only_the_images_asked_for_count(self) -> None:
        found = lvis_average_precision(dataset(), PERFECT[:2], image_ids={7})
        assert (found["ap"].value, found["ap"].images) == (pytest.approx(1.0), 1)

    def test_no_masks_at_all_score_nothing(self) -> None:
        assert lvis_average_precision(dataset(), [], image_ids={7, 9})["ap"].value == 0


def test_without_lvis_api_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "lvis":
            raise ImportError("No module named 'lvis'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(LvisError, match=r"pip install 'tinysam\[lvis\]'"):
        require_lvis()


def test_cocos_file_is_not_taken_for_lviss(tmp_path: Path) -> None:
    (tmp_path / "coco.json").write_text(json.dumps({"images": [{"id": 1}], "annotations": [], "categories": []}))
    with pytest.raises(LakeError, match="not LVIS's"):
        read_lvis(str(tmp_path / "coco.json"))


def test_lvis_names_images_by_their_url(tmp_path: Path) -> None:
    (tmp_path / "lvis.json").write_text(json.dumps(dataset()))
    coco = CocoFile.read(str(tmp_path / "lvis.json"))
    assert list(coco.images) == ["val2017/000000000007.jpg", "train2017/000000000009.jpg"]
    assert read_lvis(str(tmp_path / "lvis.json"))["images"][0]["id"] == 7
