"""Scenes on disk: SA-1B's layout, readable by the lake, independent of the number of workers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tinysam.lake.annotations import read_annotations
from tinysam.lake.images import decode_image
from tinysam.lake.index import IndexConfig, build_index
from tinysam.lake.rle import decode_rle, encode_rle
from tinysam.synthetic import scene, write_scenes
from tinysam.synthetic.sa1b import annotation
from tinysam.synthetic.write import SceneSet, iter_write


def test_written_scenes_are_a_lake_with_the_exact_masks(tmp_path: Path) -> None:
    config = SceneSet(output=str(tmp_path), count=3, seed=5, height=96, width=128)
    counts = list(iter_write(config))
    rows = build_index(IndexConfig(lake=str(tmp_path))).to_pylist()
    assert [row["image_id"] for row in rows] == [f"scene-{number:05d}.jpg" for number in range(3)]
    for number, row in enumerate(rows):
        painted = scene((5, number), (96, 128))
        pixels = decode_image((tmp_path / row["image_id"]).read_bytes())
        assert np.abs(pixels.astype(int) - painted.pixels).mean() < 4
        rles = read_annotations(row, 96, 128)
        assert rles is not None
        assert len(rles) == counts[number] == len(painted.masks)
        assert all((decode_rle(rle) == mask).all() for rle, mask in zip(rles, painted.masks, strict=True))


def test_number_of_workers_changes_no_byte(tmp_path: Path) -> None:
    for workers in (1, 2):
        config = SceneSet(output=str(tmp_path / str(workers)), count=3, height=64, width=64, workers=workers)
        assert len(list(iter_write(config))) == 3
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert len(names) == 6
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_write_scenes_counts_objects(tmp_path: Path) -> None:
    objects = write_scenes(str(tmp_path), 1, seed=1, style="photo")
    assert len(json.loads((tmp_path / "scene-00000.json").read_bytes())["annotations"]) == objects > 0


def test_annotation_point_is_the_deepest_pixel_and_the_box_is_tight() -> None:
    mask = np.zeros((30, 40), bool)
    mask[5:16, 8:19] = True
    mask[10, 19:30] = True
    record = annotation(encode_rle(mask), 7)
    assert record["bbox"] == [8, 5, 22, 11]
    assert record["area"] == mask.sum()
    assert record["point_coords"] == [[13, 10]]
    assert record["id"] == 7


@pytest.mark.parametrize("wrong", [{"count": -1}, {"count": 1, "workers": 0}, {"count": 1, "seed": -2}])
def test_impossible_sets_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must"):
        SceneSet(output="x", **wrong)  # type: ignore[arg-type]
