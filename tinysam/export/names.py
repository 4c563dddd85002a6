"""File names for images, from ids that strangers chose."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

import numpy as np

MAX_PART_BYTES = 200
"""Of one part of a path; file systems end at 255, and suffixes are still to come."""

# What Windows, shells and URLs cannot have in a name, and what encodes those.
_UNSAFE = re.compile(r'[\x00-\x1f\x7f<>:"|?*\\%]')
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)


def safe_path(image_id: str) -> str:
    """A relative path below which no ``..``, drive or device hides, and that differs for different ids.

    Ordinary ids stay what they are. Odd characters become ``%`` and their code, as in URLs; parts that are too long are
    cut and end in a hash of the whole.
    """
    return "/".join(_safe_part(part) for part in image_id.split("/"))


def _safe_part(part: str) -> str:
    safe = _UNSAFE.sub(lambda match: f"%{ord(match[0]):02X}", part)
    if safe in ("", ".", ".."):
        safe = {"": "%", ".": "%2E", "..": "%2E%2E"}[safe]
    elif _DEVICES.match(safe) or safe.startswith("."):
        safe = f"%{ord(safe[0]):02X}{safe[1:]}"
    if safe[-1] in " .":  # Windows drops them
        safe = f"{safe[:-1]}%{ord(safe[-1]):02X}"
    data = safe.encode("utf-8", "backslashreplace")
    if len(data) > MAX_PART_BYTES:
        digest = hashlib.sha256(part.encode("utf-8", "backslashreplace")).hexdigest()[:16]
        safe = f"{data[: MAX_PART_BYTES - 17].decode('utf-8', 'ignore')}%{digest}"
    return safe


class FileNames:
    """Paths without suffix for the images of one export, all different.

    An image's path is its id without the suffix, so that ``a/b.jpg`` has its masks beside it in ``a/b.json``; images
    of which another has the same path but for the suffix keep theirs (``a/b.jpg.json``).
    """

    def __init__(self, image_ids: Iterable[str]) -> None:
        """Goes through all ids once; keeps 16 bytes of each until it knows which share a path."""
        paths = (safe_path(image_id) for image_id in image_ids)
        hashes = np.fromiter((_hash(name) for path in paths for name in {path, _without_suffix(path)}), np.uint64)
        hashes.sort()
        self._shared = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())

    def path_of(self, image_id: str) -> str:
        """The path, relative and without suffix."""
        path = safe_path(image_id)
        short = _without_suffix(path)
        return path if _hash(short) in self._shared else short


def _without_suffix(path: str) -> str:
    folder, slash, name = path.rpartition("/")
    stem = name.rpartition(".")[0]
    return folder + slash + (stem or name)


def _hash(text: str) -> int:
    # Windows and macOS take names that differ in case for the same.
    return int.from_bytes(hashlib.sha256(text.casefold().encode("utf-8", "backslashreplace")).digest()[:8], "little")
