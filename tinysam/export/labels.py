"""Reading a label job's output image by image, in the order of its plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tinysam.lake import schema
from tinysam.lake.filesystem import LakeError, join, list_files, redact_url
from tinysam.lake.parquet_file import open_parquet
from tinysam.lake.rle import run_lengths
from tinysam.lake.shards import SHARDS_FOLDER, ShardError

_REMEDY = "Run `tinysam verify --repair` and then the job again: it makes what is missing."


class ExportError(Exception):
    """The masks cannot be exported; the message says why."""


@dataclass(frozen=True, kw_only=True)
class LabelledImage:
    """An image with its masks, a row of ``schema.MASKS`` whose status is ok."""

    number: int
    """1 for the first image of the output."""
    image_id: str
    """As in the index: the path relative to the lake."""
    uri: str
    """Where the image, or the file that holds it, lies; user, password and query blanked."""
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    masks: list[dict[str, Any]]
    """``schema.MASK``."""


@dataclass
class LabelReader:
    """Iterates over the images of an output, once or several times; memory is that of one row group."""

    output_url: str
    """Output of ``label_images``."""
    shards: list[str] = field(init=False)
    """URLs of its shards, in order."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Images of the last iteration that have no masks, by status."""

    def __post_init__(self) -> None:
        self.shards = list_files(join(self.output_url, SHARDS_FOLDER), "*.parquet")
        if not self.shards:
            raise ExportError(f"{redact_url(self.output_url)} holds no shards; give the output of label_images.")

    def __iter__(self) -> Iterator[LabelledImage]:
        self.left_out = Counter()
        number = 0
        for url in self.shards:
            for row in _rows(url, list(schema.MASKS.names)):
                if row["status"] != schema.OK:
                    self.left_out[row["status"]] += 1
                    continue
                number += 1
                _check_masks(row)
                yield LabelledImage(
                    number=number,
                    image_id=row["image_id"],
                    uri=redact_url(row["uri"]),
                    height=row["height"],
                    width=row["width"],
                    masks=row["masks"],
                )

    def image_ids(self) -> Iterator[str]:
        """Ids of all images whose status is ok, without reading their masks."""
        for url in self.shards:
            for row in _rows(url, ["image_id", "status"]):
                if row["status"] == schema.OK:
                    yield row["image_id"]


def _check_masks(row: dict[str, Any]) -> None:
    """Makes sure that all masks can be decoded, so that no format has to think of those which cannot."""
    for number, mask in enumerate(row["masks"]):
        try:
            filled = int(run_lengths(mask["counts"]).sum())
        except ValueError as error:
            raise ExportError(f"{row['image_id']}: mask {number} is damaged: {error}. {_REMEDY}") from error
        if filled != row["height"] * row["width"] or mask["size"] != [row["height"], row["width"]]:
            raise ExportError(f"{row['image_id']}: mask {number} does not have the image's size. {_REMEDY}")


def _rows(url: str, columns: list[str]) -> Iterator[dict[str, Any]]:
    with open_parquet(url, remedy=_REMEDY, error_type=ShardError) as parquet:
        if not parquet.schema_arrow.equals(schema.MASKS):
            raise LakeError(f"{redact_url(url)} holds no masks; give the output of label_images.")
        for group in range(parquet.num_row_groups):
            yield from parquet.read_row_group(group, columns=columns).to_pylist()
