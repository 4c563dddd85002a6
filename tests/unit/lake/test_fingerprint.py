from __future__ import annotations

import dataclasses
import enum
import hashlib
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest

from tinysam.lake.filesystem import MissingError, join, write_once
from tinysam.lake.fingerprint import canonical_json, file_sha256, fingerprint


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    sizes: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    name: str = "ü"
    inner: Inner = Inner()
    colour: Colour = Colour.RED
    folder: PurePosixPath | None = None


def test_it_is_16_digits_and_stable_across_versions() -> None:
    assert fingerprint({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()[:16]
    assert canonical_json(Outer()) == (
        '{"colour":"red","folder":null,"inner":{"rate":0.5,"sizes":[1,2]},"name":"\\u00fc"}'
    )


def test_order_and_container_types_do_not_matter() -> None:
    assert fingerprint({"a": 1, "b": (1, 2)}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint(Inner()) == fingerprint({"rate": 0.5, "sizes": [1, 2]})
    assert fingerprint({"x": np.float64(0.5), "y": np.int64(3)}) == fingerprint({"x": 0.5, "y": 3})
    assert fingerprint({"x": {"b", "a"}}) == fingerprint({"x": ["a", "b"]})


@pytest.mark.parametrize(
    "changed",
    [Outer(name="u"), Outer(inner=Inner(rate=0.6)), Outer(inner=Inner(sizes=(2, 1))), Outer(folder=PurePosixPath("a"))],
)
def test_every_value_matters(changed: Outer) -> None:
    assert fingerprint(changed) != fingerprint(Outer())


@pytest.mark.parametrize(("value", "error"), [(print, TypeError), (float("nan"), ValueError), (b"x", TypeError)])
def test_what_has_no_canonical_form_is_refused(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        fingerprint({"a": value})


def test_files_are_hashed(storage: str) -> None:
    data = np.random.default_rng(0).bytes(100_000)
    write_once(join(storage, "x"), data)
    assert file_sha256(join(storage, "x")) == hashlib.sha256(data).hexdigest()


def test_a_missing_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="does not exist"):
        file_sha256(str(tmp_path / "none"))
