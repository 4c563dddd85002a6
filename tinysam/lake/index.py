"""The index: every image of a lake with its stable id and where its bytes lie, listed once before any work starts."""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import itertools
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tinysam.lake import schema
from tinysam.lake.coco import CocoFile
from tinysam.lake.containers import parquet_rows, read_parquet_image, tar_rows
from tinysam.lake.filesystem import LakeError, MissingError, ShortReadError, is_local, read_bytes, redact_url
from tinysam.lake.images import ImageError
from tinysam.lake.listing import LakeFile, kind_of, list_lake
from tinysam.lake.patience import patiently

_READERS = 16  # containers opened at a time: object storage takes tens of milliseconds for each request
_LOOKAHEAD = 64
_BATCH_ROWS = 65_536

_Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Which images a job works on."""

    lake: str
    """Folder, bucket or file: images, tars and parquet files, in any mixture; or a .txt with a URI a line. A path or an
    s3://, gs:// … URL."""
    annotations: str | None = None
    """COCO instances.json with the ground truth of the images."""
    include: tuple[str, ...] = ()
    """Shell patterns on image ids (paths relative to the lake); only what matches one is taken. ``*`` crosses folders;
    a tar or parquet file that matches is taken whole."""
    exclude: tuple[str, ...] = ()
    """Shell patterns likewise; what matches one is left out."""
    limit: int | None = None
    """Only the first so many images, in the order of their ids."""

    def __post_init__(self) -> None:
        if not self.lake:
            raise ValueError("lake is empty; give a folder or URL")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; it must be at least 1")


def iter_index(config: IndexConfig) -> Iterator[pa.RecordBatch]:
    """Lists a lake, and keeps no more in memory than the listing of a folder: a hundred million images are no burden.

    Nothing but listings, tar headers, parquet footers and the annotation file is read; with a ``limit`` the listing
    stops there. An annotation file is matched to all ids at once, so with one the index is built whole.

    Yields:
        ``schema.INDEX`` sorted by ``image_id``, ``shard_id`` null; at least one row in all.

    Raises:
        LakeError: If the lake is missing, holds no images, holds a compressed or damaged container, or names an image
            twice; or if the annotation file cannot be read or names none of the images.
    """
    if config.annotations:
        yield from build_index(config).to_batches(max_chunksize=_BATCH_ROWS)
    else:
        yield from _listed(config, config.limit)


def build_index(config: IndexConfig) -> pa.Table:
    """``iter_index`` as one table, which takes about 120 bytes of memory for each image.

    Raises:
        LakeError: As ``iter_index``.
    """
    # File names in the annotations are told apart by all ids of the lake, so a limit cannot stop the listing then.
    index = pa.Table.from_batches(_listed(config, None if config.annotations else config.limit))
    if config.annotations:
        index = CocoFile.read(config.annotations).attach_to(index)
    return index if config.limit is None else index.slice(0, config.limit)


def read_image_bytes(row: Mapping[str, Any]) -> bytes:
    """Reads the file of one image; what fails for a moment is tried again (:mod:`tinysam.lake.patience`).

    Args:
        row: A row of the index.

    Returns:
        The bytes of the image file, for ``decode_image``.

    Raises:
        ImageError: ``missing``, ``truncated`` or ``unreadable``, where this image alone is at fault.
        LakeError: If the storage is (credentials, network): to try again rather than to record.
    """
    uri, offset, size = row["uri"], row["offset"], row["size"]
    try:
        if kind_of(uri) == "parquet":
            return patiently(lambda: read_parquet_image(uri, offset))
        if kind_of(uri) == "tar":
            return patiently(lambda: read_bytes(uri, offset, size))
        return patiently(lambda: read_bytes(uri))
    except MissingError as error:
        raise ImageError("missing", f"{redact_url(uri)} is gone since the lake was indexed") from error
    except ShortReadError as error:
        raise ImageError("truncated", str(error)) from error
    except LakeError as error:
        if is_local(uri):
            raise ImageError("unreadable", str(error)) from error
        raise


def _rows(config: IndexConfig) -> Iterator[dict[str, Any]]:
    with ThreadPoolExecutor(_READERS) as pool:
        pending: collections.deque[tuple[bool, Future[_Rows] | _Rows]] = collections.deque()
        try:
            for file in list_lake(config.lake):
                if _matches(file.name, config.exclude):
                    continue
                whole = not config.include or _matches(file.name, config.include)
                if file.kind != "image":
                    pending.append((whole, pool.submit(_container_rows, file)))
                elif whole:
                    pending.append((whole, [_image_row(file)]))
                while len(pending) > _LOOKAHEAD:
                    yield from _chosen(*pending.popleft(), config)
            while pending:
                yield from _chosen(*pending.popleft(), config)
        finally:
            pool.shutdown(cancel_futures=True)


def _chosen(whole: bool, found: Future[_Rows] | _Rows, config: IndexConfig) -> Iterator[dict[str, Any]]:
    for row in found.result() if isinstance(found, Future) else found:
        name = row["image_id"]
        if not _matches(name, config.exclude) and (whole or _matches(name, config.include)):
            yield row


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _image_row(file: LakeFile) -> dict[str, Any]:
    return {
        "image_id": file.name,
        "uri": file.url,
        "offset": 0,
        "size": file.size,
        "annotations_uri": file.sidecar,
    }


def _container_rows(file: LakeFile) -> _Rows:
    return parquet_rows(file) if file.kind == "parquet" else tar_rows(file)


def _listed(config: IndexConfig, limit: int | None) -> Iterator[pa.RecordBatch]:
    rows = itertools.islice(_rows(config), limit)
    last = pa.array([], pa.string())
    while batch := list(itertools.islice(rows, _BATCH_ROWS)):
        records = pa.RecordBatch.from_pylist(batch, schema=schema.INDEX)
        ids = pa.concat_arrays([last, records.column("image_id")])
        _check_order(ids, config.lake)
        last = ids[-1:]
        yield records
    if not len(last):
        chosen = " that --include and --exclude let through" if config.include or config.exclude else ""
        raise LakeError(
            f"{redact_url(config.lake)} holds no images{chosen}. A lake is a folder or bucket of image files, tars "
            "(uncompressed) and parquet files with an image column."
        )


def _check_order(ids: pa.Array, lake: str) -> None:
    """Ids in order are all different, and a listing is in order but for one case."""
    in_order = pc.less(ids[:-1], ids[1:])
    if pc.all(in_order, min_count=0).as_py():
        return
    place = pc.index(in_order, False).as_py()
    first, second = ids[place].as_py(), ids[place + 1].as_py()
    what = f"two images called {first!r}" if first == second else f"{second!r} behind {first!r}"
    raise LakeError(
        f"{redact_url(lake)} has {what}: a folder and a container (tar, parquet) of one name. Rename one, or leave it "
        "out with --exclude."
    )
