"""Images inside tars and parquet files: where each lies, and how to read one of them."""

from __future__ import annotations

import functools
import logging
import tarfile
from typing import Any

import pyarrow as pa

from tinysam.lake.filesystem import LakeError, explained, is_local, open_filesystem, read_bytes, redact_url
from tinysam.lake.images import ImageError
from tinysam.lake.listing import LakeFile, is_hidden, kind_of, safe_name
from tinysam.lake.parquet_file import open_parquet

logger = logging.getLogger(__name__)

_TAR_HEADER_READ = 32 << 10  # what a seek to the next header fetches from object storage
_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "content", "data")
_REMEDY = "Copy it again, or leave it out with --exclude."
_COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


def tar_rows(file: LakeFile) -> list[dict[str, Any]]:
    """Finds the images in an uncompressed tar by reading its headers alone.

    Returns:
        Rows of ``schema.INDEX`` sorted by ``image_id``, ``offset`` and ``size`` being the member's bytes in the tar.
        A JSON member of the same stem becomes ``annotations_uri``, as ``<tar>#bytes=<first>-<past the last>``.
        Of several members of one name the last counts, as it does for ``tar``.

    Raises:
        LakeError: If the tar is compressed, cut short, or not a tar.
    """
    start = read_bytes(file.url, 0, min(6, max(file.size, 0)))
    if file.kind == "compressed_tar" or start.startswith(_COMPRESSED_MAGIC):
        raise LakeError(
            f"{redact_url(file.url)} is a compressed tar: an image in it cannot be read without all that is before it. "
            "Images are compressed already, so unpack it once (gunzip, unxz, zstd -d), or leave it out with --exclude."
        )
    fs, path = open_filesystem(file.url)
    options = {} if is_local(file.url) else {"block_size": _TAR_HEADER_READ, "cache_type": "readahead"}
    images: dict[str, tuple[int, int]] = {}
    sidecars: dict[str, tuple[int, int]] = {}
    try:
        with (
            explained(file.url),
            fs.open(path, "rb", **options) as stream,
            tarfile.open(fileobj=stream, mode="r:") as tar,
        ):
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it keeps every header: gigabytes for a large tar
                name = safe_name(member.name)
                if not member.isreg() or member.issparse() or is_hidden(name):
                    continue
                if kind_of(name) == "image":
                    images[name] = (member.offset_data, member.size)
                elif name.lower().endswith(".json"):
                    sidecars[name.rsplit(".", 1)[0]] = (member.offset_data, member.size)
            # The module takes a damaged header for the end, and would lose what follows without a word.
            stream.seek(tar.offset)
            if any(stream.read(tarfile.BLOCKSIZE)):
                raise tarfile.ReadError(f"damaged at byte {tar.offset}")
    except tarfile.TarError as error:
        raise LakeError(f"{redact_url(file.url)} is not a whole tar ({error}). {_REMEDY}") from error
    rows = []
    for name in sorted(images):
        offset, size = images[name]
        if file.size >= 0 and offset + size > file.size:
            raise LakeError(f"{redact_url(file.url)} ends inside its member {name!r}. {_REMEDY}")
        sidecar = sidecars.get(name.rsplit(".", 1)[0])
        location = f"{file.url}#bytes={sidecar[0]}-{sum(sidecar)}" if sidecar else None
        rows.append(
            {
                "image_id": f"{file.name}/{name}",
                "uri": file.url,
                "offset": offset,
                "size": size,
                "annotations_uri": location,
            }
        )
    return rows


def parquet_rows(file: LakeFile) -> list[dict[str, Any]]:
    """Finds the images in a parquet file by reading its footer alone.

    The image column holds bytes, or Hugging Face's ``struct<bytes, path>``: the one named ``image`` (or another
    customary name), else the only one of such a type.

    Returns:
        Rows of ``schema.INDEX`` in the file's order, ``offset`` being the row. The number in the id is padded with
        zeros, so that ids sort in this order too. Empty if the file has no image column.

    Raises:
        LakeError: If the file is not parquet, or several columns could be meant.
    """
    with open_parquet(file.url, remedy=_REMEDY) as parquet:
        rows = parquet.metadata.num_rows
        column = image_column(parquet.schema_arrow, file.url)
    if column is None:
        logger.warning("left out %s: it has no column of image bytes", redact_url(file.url))
        return []
    digits = len(str(max(rows - 1, 0)))
    return [
        {"image_id": f"{file.name}#{row:0{digits}d}", "uri": file.url, "offset": row, "size": -1} for row in range(rows)
    ]


def image_column(columns: pa.Schema, url: str) -> str | None:
    """Chooses the column of a parquet file that holds images; None if there is none.

    Raises:
        LakeError: If several columns hold bytes and none has a customary name.
    """
    candidates = [field.name for field in columns if _holds_bytes(field.type)]
    for name in _IMAGE_COLUMNS:
        if name in candidates:
            return name
    if len(candidates) > 1:
        raise LakeError(
            f"{redact_url(url)} has several columns of bytes ({', '.join(candidates)}): rename the one with the images "
            "to 'image'."
        )
    return candidates[0] if candidates else None


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        position = kind.get_field_index("bytes")
        return position >= 0 and _holds_bytes(kind.field(position).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def read_parquet_image(url: str, row: int) -> bytes:
    """Reads one image of a parquet file.

    The row group around it stays in memory, as its neighbours are usually asked for next.

    Raises:
        ImageError: ``missing`` if the row holds no bytes (a mere path is never followed).
        LakeError: If the file is gone or damaged, or has fewer rows than the index says.
    """
    version = _version(url)
    first = 0
    for group, rows in enumerate(_row_group_sizes(url, version)):
        if row < first + rows:
            value = _read_row_group(url, version, group)[row - first].as_py()
            data = value.get("bytes") if isinstance(value, dict) else value
            if data is None:
                raise ImageError("missing", "the row holds no image bytes")
            return data
        first += rows
    raise LakeError(f"{redact_url(url)} has {first} rows, not {row + 1}: it changed. Index the lake again.")


def _version(url: str) -> str:
    fs, path = open_filesystem(url)
    with explained(url):
        return str(fs.ukey(path))


@functools.lru_cache(maxsize=64)
def _row_group_sizes(url: str, version: str) -> tuple[int, ...]:
    with open_parquet(url, remedy=_REMEDY) as parquet:
        return tuple(parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups))


@functools.lru_cache(maxsize=2)
def _read_row_group(url: str, version: str, group: int) -> pa.ChunkedArray:
    with open_parquet(url, remedy=_REMEDY) as parquet:
        column = image_column(parquet.schema_arrow, url)
        if column is None:
            raise LakeError(f"{redact_url(url)} has no column of image bytes any more. Index the lake again.")
        return parquet.read_row_group(group, columns=[column]).column(column)
