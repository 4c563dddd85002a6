"""What lies in a lake: its images, tars and parquet files, in the order of their ids, a folder at a time.

A lake can hold a hundred million files, so nothing here keeps more than one folder's listing in memory. (A lake that is
given as a list of URIs is read whole.)
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import fsspec

from tinysam.lake.filesystem import (
    LakeError,
    MissingError,
    explained,
    join,
    open_filesystem,
    read_bytes,
    redact_url,
    url_of,
)

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".jp2", ".j2k", ".ppm", ".pgm", ".avif"
)  # fmt: skip
LIST_SUFFIX = ".txt"
COMPRESSED_TAR_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")

Kind = Literal["image", "tar", "compressed_tar", "parquet"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LakeFile:
    """An image, or a file that holds images."""

    name: str
    """Path relative to the lake's root, with ``/``."""
    url: str
    """What opens it."""
    size: int
    """Bytes, -1 where the listing does not tell."""
    kind: Kind
    """What it is, judged by its name."""
    sidecar: str | None = None
    """URL of the JSON file of the same stem in the same folder."""


def kind_of(name: str) -> Kind | None:
    """Judges a file by its name; None for what holds no images."""
    lower = name.lower()
    if lower.endswith(IMAGE_SUFFIXES):
        return "image"
    if lower.endswith(".tar"):
        return "tar"
    if lower.endswith(COMPRESSED_TAR_SUFFIXES):
        return "compressed_tar"
    return "parquet" if lower.endswith(".parquet") else None


def is_hidden(name: str) -> bool:
    """Tells whether a component of a relative path starts with a dot (``.git``, macOS's ``._a.jpg``)."""
    return any(part.startswith(".") for part in name.split("/"))


def list_lake(url: str) -> Iterator[LakeFile]:
    """Lists a lake in an order that, containers expanded in place, is that of the image ids.

    Args:
        url: A folder or bucket, a single file, or a text file (``.txt``) with a URI or path a line. Paths in it are
            relative to its folder; empty lines and those that begin with ``#`` are skipped.

    Yields:
        Images, tars and parquet files; hidden files and folders are left out.

    Raises:
        MissingError: If there is nothing at ``url``.
        LakeError: If it cannot be listed.
    """
    fs, root = open_filesystem(url)
    with explained(url):
        info = fs.info(root)
    if info["type"] == "file":
        name = root.rstrip("/").rsplit("/", 1)[-1]
        if name.lower().endswith(LIST_SUFFIX):
            yield from _read_list(url)
            return
        kind = kind_of(name)
        if kind is None:
            raise LakeError(
                f"{redact_url(url)} is neither a folder nor an image, tar or parquet file. Lakes are: a folder or "
                "bucket of images, tars (uncompressed) and parquet files with an image column; or a .txt with a URI a "
                "line."
            )
        sidecar = _lone_sidecar(fs, url, root) if kind == "image" else None
        yield LakeFile(name=name, url=url_of(url, root), size=_size(info), kind=kind, sidecar=sidecar)
        return
    yield from _list_folder(fs, url, root, "")


def _read_list(url: str) -> Iterator[LakeFile]:
    """The files that a list names; ids are their URIs without scheme, and sizes are not known."""
    try:
        lines = read_bytes(url).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise LakeError(f"{redact_url(url)} is not UTF-8 text ({error}). Save it as UTF-8.") from error
    folder = url.rpartition("/")[0] or "."
    found: dict[str, LakeFile] = {}
    for number, line in enumerate(lines, start=1):
        uri = line.strip()
        if not uri or uri.startswith("#"):
            continue
        if redact_url(uri) != uri:
            raise LakeError(
                f"{redact_url(url)}, line {number}: {redact_url(uri)} holds a password or signature, which would end "
                "up in every output. Give plain URIs, and credentials in the environment."
            )
        where = uri if "://" in uri or uri.startswith("/") else join(folder, uri)
        name = safe_name(uri.split("://", 1)[-1])
        kind = kind_of(name) or ("image" if "://" in uri or uri.startswith("/") else None)
        if kind is None:
            raise LakeError(
                f"{redact_url(url)}, line {number}: {uri!r} is neither a URI nor the path of an image, tar or "
                "parquet file."
            )
        if found.setdefault(name, LakeFile(name=name, url=where, size=-1, kind=kind)).url != where:
            raise LakeError(f"{redact_url(url)}, line {number}: {uri} and {found[name].url} would have the same id.")
    yield from (found[name] for name in sorted(found, key=lambda name: _sort_key(name, found[name].kind)))


def _sort_key(name: str, kind: Kind) -> str:
    """Where the ids of what is inside will sort: "a.tar/x.jpg", "a.parquet#7"."""
    return name + {"tar": "/", "parquet": "#"}.get(kind, "")


def safe_name(name: str) -> str:
    """Drops what could lead out of a folder ("/", "..") or is not UTF-8: ids become file names elsewhere."""
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def _list_folder(fs: fsspec.AbstractFileSystem, url: str, root: str, prefix: str) -> Iterator[LakeFile]:
    folder = f"{root.rstrip('/')}/{prefix}".rstrip("/") or "/"
    with explained(url_of(url, folder)):
        entries = fs.ls(folder, detail=True)
    listed: list[tuple[str, str, Kind | None, dict[str, Any]]] = []
    sidecars = {}
    for entry in entries:
        name = entry["name"].rstrip("/").rsplit("/", 1)[-1]
        # Object stores list a folder's own marker object among its contents.
        if entry["name"].rstrip("/") == folder.rstrip("/") or is_hidden(name) or not _encodable(prefix + name):
            continue
        entry_type = _type_behind(entry)
        kind = kind_of(name)
        if entry_type == "directory":
            listed.append((name + "/", name, None, entry))
        elif entry_type != "file":
            continue
        elif kind is not None:
            listed.append((_sort_key(name, kind), name, kind, entry))
        elif name.lower().endswith(".json"):
            sidecars[name.rsplit(".", 1)[0]] = url_of(url, entry["name"])
    del entries
    # A bucket can hold "a.tar" and "a.tar/1.png", so keys may tie.
    for key, name, kind, entry in sorted(listed, key=lambda found: found[0]):
        if kind is None:
            yield from _list_folder(fs, url, root, prefix + key)
            continue
        yield LakeFile(
            name=prefix + name,
            url=url_of(url, entry["name"]),
            size=_size(entry),
            kind=kind,
            sidecar=sidecars.get(name.rsplit(".", 1)[0]),
        )


def _lone_sidecar(fs: fsspec.AbstractFileSystem, url: str, path: str) -> str | None:
    sidecar = path.rsplit(".", 1)[0] + ".json"
    try:
        with explained(url_of(url, sidecar)):
            fs.info(sidecar)
    except MissingError:
        return None
    return url_of(url, sidecar)


def _size(entry: dict[str, Any]) -> int:
    size = entry.get("size")
    return -1 if size is None else int(size)


def _encodable(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        logger.warning("left out %r: its name is not UTF-8, and parquet has no other strings; rename it", name)
        return False
    return True


def _type_behind(entry: dict[str, Any]) -> str:
    """Tells what an entry is, links of a local disk followed; ``other`` for what is not to be opened."""
    if not entry.get("islink"):
        return entry["type"]
    path = Path(entry["name"])
    if path.is_file():
        return "file"
    # A link to a folder that it lies in would be listed without end.
    folder = path.parent.resolve()
    leads_back = path.is_dir() and path.resolve() in (folder, *folder.parents)
    return "directory" if path.is_dir() and not leads_back else "other"
