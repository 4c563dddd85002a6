from __future__ import annotations

import io
import tarfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def png() -> Callable[[int], bytes]:
    """Makes a small PNG whose pixels all have one value, to tell images apart by."""

    def make(value: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.full((4, 6, 3), value, dtype=np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    return make


@pytest.fixture
def tar() -> Callable[[Mapping[str, bytes]], bytes]:
    """Makes an uncompressed tar of files."""

    def make(files: Mapping[str, bytes], mode: str = "w") -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode=mode) as archive:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return buffer.getvalue()

    return make


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of an empty folder, on disk and in fsspec's memory filesystem in turn."""
    if request.param == "local":
        yield str(tmp_path)
        return
    name = f"/{uuid.uuid4().hex}"
    fs = fsspec.filesystem("memory")
    fs.makedirs(name)
    yield f"memory:/{name}"
    fs.rm(name, recursive=True)
