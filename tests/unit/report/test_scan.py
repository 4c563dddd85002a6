"""The first pass over the shards: figures and choices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tinysam.lake import schema
from tinysam.lake.filesystem import LakeError
from tinysam.lake.shards import read_shard, write_shard
from tinysam.report.scan import SampleSizes, read_masks, scan

SIZES = SampleSizes(random=6, lowest=3, empty=2, failed=2)


@pytest.fixture
def labels(make_labels: Callable[..., Path]) -> Path:
    images: dict[str, object] = {
        f"img{i:02}.png": [0.9 + 0.02 * k - 0.01 * (i % 7) for k in range(i % 4 + 1)] for i in range(20)
    }
    images |= {f"empty{i}.png": [] for i in range(4)}
    images |= {f"bad{i}.png": ("truncated", "cut short") for i in range(3)} | {"huge.png": ("too_large", "a bomb")}
    return make_labels(images)


def urls(labels: Path) -> list[str]:
    return sorted(str(path) for path in (labels / "shards").glob("*.parquet"))


def test_figures_are_those_of_all_rows(labels: Path) -> None:
    rows = [row for url in urls(labels) for row in read_shard(url).to_pylist()]
    good = [row for row in rows if row["status"] == schema.OK]
    masks = [mask for row in good for mask in row["masks"]]
    figures = scan(urls(labels), sizes=SIZES, seed=0)
    assert figures.statuses == {"ok": 24, "truncated": 3, "too_large": 1}
    assert (figures.images, figures.labelled, figures.masks) == (28, 24, len(masks))
    assert figures.pixels == 24 * 48 * 64
    assert figures.masks_per_image.mean == pytest.approx(len(masks) / 24)
    assert figures.masks_per_image.counts[0] == 4
    assert figures.predicted_iou.mean == pytest.approx(np.mean([mask["predicted_iou"] for mask in masks]), rel=1e-5)
    assert figures.area_share.mean == pytest.approx(np.mean([mask["area"] for mask in masks]) / (48 * 64), rel=1e-5)
    assert figures.sizes == {"small": len(masks)}


def test_the_least_certain_images_are_those_of_lowest_mean_predicted_iou(labels: Path) -> None:
    rows = [row for url in urls(labels) for row in read_shard(url).to_pylist() if row["masks"]]
    means = {row["image_id"]: np.mean([mask["predicted_iou"] for mask in row["masks"]]) for row in rows}
    figures = scan(urls(labels), sizes=SIZES, seed=0)
    assert [image.mean_iou for image in figures.lowest.images] == pytest.approx(sorted(means.values())[:3])
    assert {image.masks for image in figures.empty.images} == {0}
    assert len(figures.empty.images) == 2


def test_failed_images_are_kept_by_status_with_their_errors(labels: Path) -> None:
    figures = scan(urls(labels), sizes=SIZES, seed=0)
    assert {status: len(selection.images) for status, selection in figures.failed.items()} == {
        "truncated": 2,
        "too_large": 1,
    }
    assert figures.failed["too_large"].images[0].error == "a bomb"


def test_the_random_images_depend_on_the_seed_and_not_on_the_shards_order(labels: Path) -> None:
    def chosen(order: list[str], seed: int) -> list[str]:
        return [image.image_id for image in scan(order, sizes=SIZES, seed=seed).random.images]

    first = chosen(urls(labels), 0)
    assert chosen(urls(labels)[::-1], 0) == first
    assert any(chosen(urls(labels), seed) != first for seed in range(1, 4))
    assert len(set(first)) == 6


def test_every_image_is_as_likely_to_be_chosen(make_labels: Callable[..., Path]) -> None:
    labels = make_labels({f"{i:02}.png": [] for i in range(24)}, images_per_shard=24)
    sizes = SampleSizes(random=6, lowest=0, empty=0, failed=0)
    chosen = [i.image_id for seed in range(100) for i in scan(urls(labels), sizes=sizes, seed=seed).random.images]
    counts = np.unique(chosen, return_counts=True)[1]
    assert len(counts) == 24
    # 100 draws of 6 of 24: 25 of each, with a standard deviation of 4.3.
    assert np.abs(counts - 25).max() < 20


def test_what_is_kept_is_bounded(labels: Path) -> None:
    figures = scan(urls(labels) * 5, sizes=SIZES, seed=0)
    assert figures.images == 5 * 28
    kept = [*figures.random.images, *figures.lowest.images, *figures.empty.images]
    assert len(kept) == 6 + 3 + 2
    assert sum(len(selection.images) for selection in figures.failed.values()) <= 2 * 2


def test_the_second_pass_finds_the_masks_of_the_chosen_rows(make_labels: Callable[..., Path]) -> None:
    labels = make_labels({f"{i:02}.png": [0.9] * (i % 5) for i in range(40)}, images_per_shard=20)
    expected = {row["image_id"]: row["masks"] for url in urls(labels) for row in read_shard(url).to_pylist()}
    sizes = SampleSizes(random=40, lowest=0, empty=0, failed=0)
    images = scan(urls(labels), sizes=sizes, seed=0).random.images
    assert len(images) == 40
    assert any(image.row_group > 0 for image in images)
    for image in images:
        assert read_masks(image) == expected[image.image_id]


def test_progress_counts_the_shards(labels: Path) -> None:
    seen: list[tuple[int, int]] = []
    scan(urls(labels), sizes=SIZES, seed=0, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, len(urls(labels))) for i in range(len(urls(labels)))]


def test_shards_of_another_job_are_told_from_mask_shards(tmp_path: Path) -> None:
    write_shard(str(tmp_path), "shard-0", schema.INDEX.empty_table(), {})
    with pytest.raises(LakeError, match=r"has no column error, .*did label_images\.py write it"):
        scan([str(tmp_path / "shard-0.parquet")], sizes=SIZES, seed=0)
    write_shard(str(tmp_path), "shard-1", schema.EMBEDDING.empty_table(), {})
    with pytest.raises(LakeError, match="without scores"):
        scan([str(tmp_path / "shard-1.parquet")], sizes=SIZES, seed=0)


def test_a_damaged_shard_is_named(labels: Path) -> None:
    url = urls(labels)[1]
    Path(url).write_bytes(Path(url).read_bytes()[:200])
    with pytest.raises(LakeError, match=f"{Path(url).name}.*Delete it and run the job again"):
        scan(urls(labels), sizes=SIZES, seed=0)


def test_an_empty_shard_adds_nothing(tmp_path: Path, labels: Path) -> None:
    write_shard(str(tmp_path / "none"), "shard-9", pa.Table.from_pylist([], schema=schema.MASKS), {})
    figures = scan([*urls(labels), str(tmp_path / "none" / "shard-9.parquet")], sizes=SIZES, seed=0)
    assert figures.images == 28
