from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from tinysam.lake import schema
from tinysam.lake.annotations import read_annotations, to_training_masks
from tinysam.lake.images import ImageError
from tinysam.lake.index import IndexConfig, build_index
from tinysam.lake.rle import decode_rle, encode_rle, rle_to_uncompressed


def inlined(*annotations: Mapping[str, Any], height: int | None = None, width: int | None = None) -> dict[str, Any]:
    return {"annotations": json.dumps(annotations).encode(), "annotations_uri": None, "height": height, "width": width}


def disc(height: int, width: int, y: float, x: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    return (rows + 0.5 - y) ** 2 + (columns + 0.5 - x) ** 2 < radius**2


class TestReading:
    def test_an_image_without_ground_truth_has_none(self) -> None:
        assert read_annotations({"annotations": None, "annotations_uri": None}, 4, 4) is None

    def test_an_image_with_nothing_in_it_has_an_empty_list(self) -> None:
        assert read_annotations(inlined(), 4, 4) == []

    def test_three_forms_of_segmentation_give_one_mask(self) -> None:
        mask = np.zeros((10, 12), dtype=bool)
        mask[2:7, 3:9] = True
        rle = encode_rle(mask)
        polygon = [[3, 2, 9, 2, 9, 7, 3, 7]]
        row = inlined(*({"segmentation": form} for form in (rle, rle_to_uncompressed(rle), polygon)))
        read = read_annotations(row, 10, 12)
        assert read is not None
        assert [np.array_equal(decode_rle(item), mask) for item in read] == [True] * 3

    def test_polygons_of_one_object_are_united(self) -> None:
        row = inlined({"segmentation": [[0, 0, 4, 0, 4, 4, 0, 4], [6, 6, 8, 6, 8, 8, 6, 8]]})
        (rle,) = read_annotations(row, 10, 10) or []
        assert coco_mask.area(rle) == 16 + 4

    def test_long_runs_do_not_overflow_pycocotools_buffer(self) -> None:
        height, width = 1 << 13, 1 << 13
        runs = [1 << 24] * 4
        (rle,) = (
            read_annotations(inlined({"segmentation": {"size": [height, width], "counts": runs}}), height, width) or []
        )
        assert len(rle["counts"]) + 1 <= 6 * (len(runs) + 2)
        assert coco_mask.area(rle) == 2 << 24

    def test_crowds_and_empty_masks_are_left_out(self) -> None:
        full = encode_rle(np.ones((4, 4), dtype=bool))
        row = inlined(
            {"segmentation": full, "iscrowd": 1},
            {"segmentation": encode_rle(np.zeros((4, 4), dtype=bool)), "iscrowd": 0},
            {"segmentation": [[1, 1, 2, 2]]},
            {"segmentation": []},
            {"segmentation": full, "iscrowd": 0},
        )
        assert len(read_annotations(row, 4, 4) or []) == 1

    def test_sa1b_sidecar_beside_a_file(self, tmp_path: Path, png: Callable[[int], bytes]) -> None:
        (tmp_path / "sa_1.png").write_bytes(png(1))
        sidecar = {"image": {"width": 6, "height": 4}, "annotations": [{"segmentation": encode_rle(np.eye(4, 6) > 0)}]}
        (tmp_path / "sa_1.json").write_text(json.dumps(sidecar))
        (row,) = build_index(IndexConfig(lake=str(tmp_path))).to_pylist()
        (rle,) = read_annotations(row, 4, 6) or []
        assert np.array_equal(decode_rle(rle), np.eye(4, 6) > 0)

    def test_sa1b_sidecar_inside_a_tar(
        self, tmp_path: Path, png: Callable[[int], bytes], tar: Callable[[Mapping[str, bytes]], bytes]
    ) -> None:
        sidecar = {"annotations": [{"segmentation": encode_rle(np.eye(4, 6) > 0)}]}
        files = {"./sa_1.png": png(1), "./sa_1.json": json.dumps(sidecar).encode(), "./sa_2.png": png(2)}
        (tmp_path / "sa#000.tar").write_bytes(tar(files))
        first, second = build_index(IndexConfig(lake=str(tmp_path))).to_pylist()
        (rle,) = read_annotations(first, 4, 6) or []
        assert np.array_equal(decode_rle(rle), np.eye(4, 6) > 0)
        assert read_annotations(second, 4, 6) is None

    @pytest.mark.parametrize(
        "segmentation",
        [
            None,
            7,
            {"size": [4, 4], "counts": "rubbish\x7f"},
            {"size": [4, 4], "counts": [3, 3]},
            {"size": [4, 4], "counts": [20, -4]},
            {"size": [4, 4], "counts": None},
            {"size": [5, 5], "counts": [25]},
            {"size": [2**40, 2**40], "counts": [1]},
            {"size": "4x4", "counts": [16]},
            {"size": [None, 4], "counts": [16]},
            {"counts": [16]},
            [[0, 0, 4, 0, 4]],
            [["a", "b", "c", "d", "e", "f"]],
            [[0, 0, 1e300, 0, 4, 4]],
            [[0, 0, float("nan"), 0, 4, 4]],
            [3, 4, 5, 6, 7, 8],
        ],
    )
    def test_damaged_masks_are_reported(self, segmentation: Any) -> None:
        with pytest.raises(ImageError) as caught:
            read_annotations(inlined({"segmentation": segmentation}), 4, 4)
        assert caught.value.status == "bad_annotations"

    @pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b'{"annotations": 5}', b"[" * 100_000, b"\xff\xfe"])
    def test_damaged_files_are_reported(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(ImageError) as caught:
            read_annotations({"annotations_uri": str(tmp_path / "a.json")}, 4, 4)
        assert caught.value.status == "bad_annotations"

    def test_a_sidecar_that_vanished_is_reported(self, tmp_path: Path) -> None:
        with pytest.raises(ImageError, match="gone since the lake was indexed"):
            read_annotations({"annotations_uri": str(tmp_path / "a.json")}, 4, 4)

    def test_ground_truth_of_another_size_is_reported(self) -> None:
        row = inlined({"segmentation": [[0, 0, 4, 0, 4, 4]]}, height=10, width=20)
        with pytest.raises(ImageError, match="for 20 x 10 pixels, the image has 10 x 20"):
            read_annotations(row, 20, 10)


class TestTrainingMasks:
    @pytest.mark.parametrize("size", [(100, 100), (77, 133), (301, 40), (1, 64), (640, 480)])
    def test_masks_stay_where_they_are(self, size: tuple[int, int]) -> None:
        height, width = size
        scale = 128 / max(size)
        input_size = (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)))
        mask = np.zeros(size, dtype=bool)
        mask[height // 4 : height // 4 + max(1, height // 2), width // 4 : width // 4 + width // 2] = True
        (stored,) = to_training_masks([encode_rle(mask)], input_size=input_size, image_size=128, min_area=1)
        x, y, w, h = stored["bbox"]
        scale_x, scale_y = input_size[1] / width, input_size[0] / height
        assert x == pytest.approx(width // 4 * scale_x)
        assert y == pytest.approx(height // 4 * scale_y)
        assert w * h == pytest.approx(mask.sum() * scale_x * scale_y)
        assert stored["area"] == pytest.approx(mask.sum() * scale_x * scale_y)
        decoded = decode_rle(stored)
        assert decoded.shape == (64, 64)
        rows, columns = np.flatnonzero(decoded.any(1)) * 2, np.flatnonzero(decoded.any(0)) * 2
        assert abs(rows[0] - y) <= 2
        assert abs(rows[-1] + 2 - (y + h)) <= 2
        assert abs(columns[0] - x) <= 2
        assert abs(columns[-1] + 2 - (x + w)) <= 2

    @settings(max_examples=40, deadline=None)
    @given(
        size=st.tuples(st.integers(8, 90), st.integers(8, 90)),
        centre=st.tuples(st.floats(0, 1), st.floats(0, 1)),
        radius=st.floats(2, 40),
    )
    def test_points_lie_inside_and_areas_agree(
        self, size: tuple[int, int], centre: tuple[float, float], radius: float
    ) -> None:
        height, width = size
        mask = disc(height, width, centre[0] * height, centre[1] * width, radius)
        scale = 128 / max(size)
        input_size = (int(height * scale + 0.5), int(width * scale + 0.5))
        for stored in to_training_masks([encode_rle(mask)], input_size=input_size, image_size=128):
            decoded = decode_rle(stored)
            ((x, y),) = stored["point_coords"]
            assert decoded[int(y // 2), int(x // 2)]
            assert 0 <= x < input_size[1] + 1
            assert 0 <= y < input_size[0] + 1
            # Rounding moves at most half of each boundary pixel.
            boundary = 2 * (decoded.any(0).sum() + decoded.any(1).sum() + 4)
            assert abs(decoded.sum() * 4 - stored["area"]) <= 4 * boundary

    def test_the_point_is_the_deepest_inside(self) -> None:
        # A dumbbell: a large disc, a small one, and a thin bar between them.
        mask = disc(200, 200, 60, 60, 40) | disc(200, 200, 160, 160, 15)
        mask[60:160, 58:62] = True
        (stored,) = to_training_masks([encode_rle(mask)], input_size=(200, 200), image_size=200)
        assert np.allclose(stored["point_coords"][0], (60, 60), atol=3)

    def test_the_image_border_counts_as_background(self) -> None:
        mask = np.ones((64, 64), dtype=bool)
        (stored,) = to_training_masks([encode_rle(mask)], input_size=(64, 64), image_size=64)
        assert np.allclose(stored["point_coords"][0], (32, 32), atol=2)

    def test_small_masks_are_left_out(self) -> None:
        masks = [encode_rle(disc(64, 64, 32, 32, radius)) for radius in (1.5, 3, 10)]
        kept = to_training_masks(masks, input_size=(64, 64), image_size=64, min_area=20)
        assert [stored["area"] > 20 for stored in kept] == [True, True]
        speck = np.zeros((64, 64), dtype=bool)
        speck[5, 5] = True
        assert to_training_masks([encode_rle(speck)], input_size=(64, 64), image_size=64, min_area=0) == []

    def test_masks_of_all_sizes_are_kept_where_there_are_too_many(self) -> None:
        masks = [encode_rle(disc(64, 64, 32, 32, 3 + 0.25 * i)) for i in range(100)]
        kept = to_training_masks(masks, input_size=(64, 64), image_size=64, max_masks=5)
        areas = [stored["area"] for stored in kept]
        every = [coco_mask.area(rle) for rle in masks]
        assert len(areas) == 5
        assert (areas[0], areas[-1]) == (every[0], every[-1])
        assert areas == sorted(areas)
        one = to_training_masks(masks, input_size=(64, 64), image_size=64, max_masks=1)
        assert len(one) == 1

    def test_rows_fit_the_schema(self) -> None:
        stored = to_training_masks([encode_rle(disc(50, 70, 20, 30, 12))], input_size=(91, 128), image_size=128)
        column = pa.array([stored], schema.EMBEDDING.field("masks").type)
        assert column.to_pylist()[0][0]["counts"] == stored[0]["counts"]
