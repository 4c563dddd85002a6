"""Short names for configurations and files that change when, and only when, their content does."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np

from tinysam.lake.filesystem import explained, open_filesystem

_CHUNK_BYTES = 8 << 20


def fingerprint(obj: Any) -> str:
    """Hashes a dataclass instance or mapping of plain values.

    Returns:
        16 hexadecimal digits of the SHA-256 of its canonical JSON (keys sorted, tuples as lists, defaults included).

    Raises:
        TypeError: If a value has no canonical form (a function, an open file).
        ValueError: If a number is NaN or infinite.
    """
    return hashlib.sha256(canonical_json(obj).encode()).hexdigest()[:16]


def canonical_json(obj: Any) -> str:
    """Writes a dataclass instance or mapping as JSON that depends on its values alone."""
    return json.dumps(to_plain(obj), sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def to_plain(obj: Any) -> Any:
    """Turns dataclasses, mappings, tuples, paths, enums and numpy scalars into what JSON has."""
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {field.name: to_plain(getattr(obj, field.name)) for field in dataclasses.fields(obj)}
    if isinstance(obj, Mapping):
        return {str(key): to_plain(value) for key, value in obj.items()}
    if isinstance(obj, enum.Enum):
        return to_plain(obj.value)
    if isinstance(obj, list | tuple):
        return [to_plain(value) for value in obj]
    if isinstance(obj, set | frozenset):
        return sorted((to_plain(value) for value in obj), key=str)
    if isinstance(obj, PurePath):
        return obj.as_posix()
    if isinstance(obj, np.generic):
        return obj.item()
    if obj is None or isinstance(obj, str | bool | int | float):
        return obj
    raise TypeError(f"{type(obj).__name__} has no canonical form")


def file_sha256(url: str) -> str:
    """Hashes a file without holding all of it in memory.

    Returns:
        64 hexadecimal digits.

    Raises:
        LakeError: If the file cannot be read.
    """
    digest = hashlib.sha256()
    fs, path = open_filesystem(url)
    with explained(url), fs.open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
