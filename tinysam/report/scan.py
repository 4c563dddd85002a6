"""The first pass over a label job's shards: figures of all images, and which images to show.

Reads the scores of the masks and not their run lengths, which are most of the bytes. What is kept is bounded whatever
the size of the lake.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tinysam.lake import schema
from tinysam.lake.filesystem import redact_url
from tinysam.lake.parquet_file import open_parquet
from tinysam.lake.shards import ShardError
from tinysam.report.histogram import Histogram

REMEDY = "Delete it and run the job again: it makes what is missing."
READERS = 8
"""Shards read at a time; each is a few small requests."""

_COLUMNS = ("image_id", "uri", "height", "width", "status", "error")
_SCORES = ("area", "predicted_iou", "stability_score")
# COCO's bounds of small and of medium masks, in pixels.
_SMALL, _MEDIUM = 32**2, 96**2
MOST_MASKS = 5000
MOST_STATUSES = 50
"""Statuses counted by name; a healthy output has a handful."""


@dataclass(frozen=True, kw_only=True)
class ImageRef:
    """An image that the report may show, and where its row lies."""

    image_id: str
    uri: str
    status: str
    error: str | None
    height: int
    width: int
    masks: int
    mean_iou: float | None
    """Mean predicted IoU of its masks; None without masks."""
    shard: str
    """URL of the shard."""
    row_group: int
    row: int
    """Within the row group."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The images of smallest key: with a hash as the key, a random sample that no order of shards can change."""

    size: int
    kept: tuple[tuple[float, str, ImageRef], ...] = ()
    """Key, then a hash that breaks ties, then the image; sorted."""

    def offer(self, candidates: Iterable[tuple[float, str, ImageRef]]) -> Selection:
        """The selection from what was kept and ``candidates``."""
        kept = heapq.nsmallest(self.size, (*self.kept, *candidates), key=lambda item: item[:2])
        return replace(self, kept=tuple(kept))

    @property
    def images(self) -> list[ImageRef]:
        """What was selected, smallest key first."""
        return [image for _, _, image in self.kept]


@dataclass(frozen=True, kw_only=True)
class SampleSizes:
    """How many images of each kind the report shows."""

    random: int = 24
    lowest: int = 12
    empty: int = 6
    failed: int = 36


def _masks_per_image() -> Histogram:
    return Histogram(edges=np.arange(MOST_MASKS + 1) - 0.5, counts=np.zeros(MOST_MASKS, np.int64))


@dataclass(frozen=True, kw_only=True)
class LabelFigures:
    """What the report says about all images of a label job, and the images that it shows."""

    statuses: Mapping[str, int] = field(default_factory=Counter)
    """Images by status."""
    pixels: int = 0
    """Of the images that were labelled."""
    masks_per_image: Histogram = field(default_factory=_masks_per_image)
    """Of the images that were labelled."""
    area_share: Histogram = field(default_factory=lambda: Histogram.logarithmic(1e-6, 1, 240))
    """Area of a mask as a part of its image."""
    predicted_iou: Histogram = field(default_factory=lambda: Histogram.linear(0, 1.1, 440))
    stability_score: Histogram = field(default_factory=lambda: Histogram.linear(0, 1.1, 440))
    sizes: Mapping[str, int] = field(default_factory=Counter)
    """Masks by COCO's ranges of area: small, medium, large."""
    random: Selection = Selection(size=0)
    lowest: Selection = Selection(size=0)
    empty: Selection = Selection(size=0)
    failed: Mapping[str, Selection] = field(default_factory=dict)
    """By status."""

    @property
    def images(self) -> int:
        """Images with a row, whatever their status."""
        return sum(self.statuses.values())

    @property
    def labelled(self) -> int:
        """Images whose status is ok."""
        return self.statuses.get(schema.OK, 0)

    @property
    def masks(self) -> int:
        """Masks of all images."""
        return self.area_share.size

    def merge(self, other: LabelFigures) -> LabelFigures:
        """The figures of both."""
        failed = dict(self.failed)
        for status, selection in other.failed.items():
            if status in failed or len(failed) < MOST_STATUSES:
                failed[status] = failed.get(status, Selection(size=selection.size)).offer(selection.kept)
        return LabelFigures(
            statuses=Counter(self.statuses) + Counter(other.statuses),
            pixels=self.pixels + other.pixels,
            masks_per_image=self.masks_per_image.merge(other.masks_per_image),
            area_share=self.area_share.merge(other.area_share),
            predicted_iou=self.predicted_iou.merge(other.predicted_iou),
            stability_score=self.stability_score.merge(other.stability_score),
            sizes=Counter(self.sizes) + Counter(other.sizes),
            random=self.random.offer(other.random.kept),
            lowest=self.lowest.offer(other.lowest.kept),
            empty=self.empty.offer(other.empty.kept),
            failed=failed,
        )


def scan(
    shards: Sequence[str], *, sizes: SampleSizes, seed: int, progress: Callable[[int, int], None] | None = None
) -> LabelFigures:
    """Reads the scores of every mask once.

    Args:
        shards: URLs of mask shards.
        sizes: how many images to select.
        seed: decides which images are the random ones; the order of ``shards`` does not.
        progress: told how many shards have been read, and of how many.

    Raises:
        LakeError: if a shard cannot be read or is not a mask shard.
    """
    figures = LabelFigures(
        random=Selection(size=sizes.random), lowest=Selection(size=sizes.lowest), empty=Selection(size=sizes.empty)
    )
    with ThreadPoolExecutor(READERS) as pool:
        parts = pool.map(lambda url: scan_shard(url, sizes=sizes, seed=seed), shards)
        for done, part in enumerate(parts, start=1):
            figures = figures.merge(part)
            if progress is not None:
                progress(done, len(shards))
    return figures


def scan_shard(url: str, *, sizes: SampleSizes, seed: int) -> LabelFigures:
    """The figures of one shard; see :func:`scan`."""
    table, row_group_sizes = _read_scores(url)
    status = table["status"].to_pylist()
    labelled = np.array([value == schema.OK for value in status], bool)
    counts = pc.fill_null(pc.list_value_length(table["masks"]), 0).to_numpy()
    parents = pc.list_parent_indices(table["masks"]).to_numpy()
    scores = {name: _flat(table["masks"], name) for name in _SCORES}
    pixels = np.array([(h or 0) * (w or 0) for h, w in zip(*_sides(table), strict=True)], np.int64)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_iou = np.bincount(parents, scores["predicted_iou"], len(table)) / counts
        share = scores["area"] / pixels[parents]

    failures: list[tuple[str, ImageRef]] = []
    empty: list[tuple[str, ImageRef]] = []
    filled: list[tuple[str, ImageRef]] = []
    for item in _images(table, url, row_group_sizes, counts, mean_iou, seed):
        image = item[1]
        (failures if image.status != schema.OK else filled if image.masks else empty).append(item)
    random_items = [(0.0, tie, image) for tie, image in (*filled, *empty)]
    failed = {
        name: Selection(size=sizes.failed).offer((0.0, tie, image) for tie, image in failures if image.status == name)
        for name in {image.status for _, image in failures}
    }
    start = LabelFigures()
    return LabelFigures(
        statuses=Counter(status),
        pixels=int(pixels[labelled].sum()),
        masks_per_image=start.masks_per_image.add(counts[labelled]),
        area_share=start.area_share.add(share),
        predicted_iou=start.predicted_iou.add(scores["predicted_iou"]),
        stability_score=start.stability_score.add(scores["stability_score"]),
        sizes=_size_counts(scores["area"]),
        random=Selection(size=sizes.random).offer(random_items),
        lowest=Selection(size=sizes.lowest).offer((image.mean_iou or 0.0, tie, image) for tie, image in filled),
        empty=Selection(size=sizes.empty).offer((0.0, tie, image) for tie, image in empty),
        failed=failed,
    )


def read_masks(image: ImageRef) -> list[dict[str, Any]]:
    """The masks of one image: the second pass, which opens no more rows than the report shows.

    Raises:
        LakeError: if the shard cannot be read.
    """
    with open_parquet(image.shard, remedy=REMEDY, error_type=ShardError) as parquet:
        masks = parquet.read_row_group(image.row_group, columns=["masks"])["masks"]
    return masks[image.row].as_py() or []


def _read_scores(url: str) -> tuple[pa.Table, list[int]]:
    with open_parquet(url, remedy=REMEDY, error_type=ShardError) as parquet:
        missing = sorted({*_COLUMNS, "masks"} - set(parquet.schema_arrow.names))
        if missing:
            raise ShardError(f"{redact_url(url)} has no column {', '.join(missing)}: did label_images.py write it?")
        leaves = [parquet.schema.column(i).path for i in range(len(parquet.schema))]
        scores = [leaf for leaf in leaves if leaf.startswith("masks.") and leaf.rsplit(".", 1)[1] in _SCORES]
        if len(scores) != len(_SCORES):
            raise ShardError(f"{redact_url(url)} holds masks without scores: did label_images.py write it?")
        groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)]
        return parquet.read(columns=[*_COLUMNS, *scores], use_threads=False).combine_chunks(), groups


def _flat(masks: pa.ChunkedArray, name: str) -> np.ndarray:
    values = pc.struct_field(pc.list_flatten(masks), name)
    return pc.cast(values, pa.float64()).to_numpy(zero_copy_only=False)


def _sides(table: pa.Table) -> tuple[list[int | None], list[int | None]]:
    return table["height"].to_pylist(), table["width"].to_pylist()


def _images(
    table: pa.Table, url: str, row_group_sizes: list[int], counts: np.ndarray, mean_iou: np.ndarray, seed: int
) -> Iterable[tuple[str, ImageRef]]:
    """Every image of a shard with the hash that decides about its place in a random order."""
    starts = np.cumsum([0, *row_group_sizes])
    columns = table.select(_COLUMNS).to_pydict()
    for row, image_id in enumerate(columns["image_id"]):
        group = int(np.searchsorted(starts, row, side="right")) - 1
        yield (
            hashlib.blake2b(f"{seed}/{image_id}".encode(), digest_size=8).hexdigest(),
            ImageRef(
                image_id=image_id,
                uri=columns["uri"][row],
                status=columns["status"][row],
                error=columns["error"][row],
                height=columns["height"][row] or 0,
                width=columns["width"][row] or 0,
                masks=int(counts[row]),
                mean_iou=float(mean_iou[row]) if counts[row] else None,
                shard=url,
                row_group=group,
                row=row - int(starts[group]),
            ),
        )


def _size_counts(area: np.ndarray) -> Counter[str]:
    small, medium = int((area < _SMALL).sum()), int((area < _MEDIUM).sum())
    return Counter(small=small, medium=medium - small, large=len(area) - medium)
