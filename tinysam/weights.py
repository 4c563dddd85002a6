"""Public checkpoints: their names, where they lie, and how to get them here whole.

Sizes and SHA-256 are those of the published files. The eight characters in the names of SAM's files are the start of
their MD5, not of their SHA-256.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import IO

from tinysam.lake.filesystem import explained, open_filesystem

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, the bytes done, and the bytes in all where that is known."""

_CHUNK = 1 << 20
_TIMEOUT_SECONDS = 30.0
_ATTEMPTS = 5
_BACKOFF_SECONDS = 1.0
# After these the same request may well succeed; after any other answer it will not.
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_OWN_WEIGHTS = "Weights of your own need no fetching: give their path wherever a model's name is asked for."


SHIPPED = ("demo_teacher", "demo_student")
"""Models whose weights come with the package."""


class WeightsError(Exception):
    """A checkpoint could not be had; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class PublicFile:
    """A checkpoint that its authors publish."""

    name: str
    """What :func:`fetch` and the command line call it."""
    url: str
    """Where its authors publish it."""
    size: int | None
    """Bytes, where known."""
    sha256: str | None
    """Digest of the file, in hex, where known; otherwise the file's own checksums are checked."""
    about: str
    """One line for people."""

    @property
    def filename(self) -> str:
        """The name that its authors gave the file."""
        return self.url.rsplit("/", 1)[-1]


PUBLIC_FILES: dict[str, PublicFile] = {
    file.name: file
    for file in (
        PublicFile(
            name="sam_vit_h",
            url="https://dl.fbaipublicfiles.com/segment_anything/sam_vit_h_4b8939.pth",
            size=2_564_550_879,
            sha256="a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
            about="Segment Anything, ViT-H: the teacher",
        ),
        PublicFile(
            name="sam_vit_l",
            url="https://dl.fbaipublicfiles.com/segment_anything/sam_vit_l_0b3195.pth",
            size=1_249_524_607,
            sha256="3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
            about="Segment Anything, ViT-L",
        ),
        PublicFile(
            name="sam_vit_b",
            url="https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth",
            size=375_042_383,
            sha256="ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
            about="Segment Anything, ViT-B",
        ),
        PublicFile(
            name="tinysam",
            url="https://github.com/xinghaochen/TinySAM/releases/download/3.0/tinysam_42.3.pth",
            size=None,
            sha256=None,
            about="TinySAM, distilled from ViT-H (COCO AP 42.3)",
        ),
        PublicFile(
            name="mobile_sam",
            # A commit rather than a branch, so that the file cannot change under its checksum.
            url="https://github.com/ChaoningZhang/MobileSAM/raw/f706ad9c4eb7f219c00d9050e46328518ffb65d2/weights/mobile_sam.pt",
            size=40_728_226,
            sha256="6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
            about="MobileSAM, TinySAM's architecture",
        ),
    )
}


def weights_folder() -> Path:
    """Where downloads lie: ``TINYSAM_HOME``, or ``tinysam`` in the user's cache folder."""
    if home := os.environ.get("TINYSAM_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tinysam"


def shipped_path(name: str) -> Path:
    """Where the weights of one of ``SHIPPED`` lie in the installed package."""
    return Path(str(resources.files("tinysam"))) / "checkpoints" / f"{name}.safetensors"


def resolve(path_or_name: str) -> str:
    """The path of a shipped model, or of a public checkpoint that was fetched; anything else is returned as it is.

    Raises:
        WeightsError: for a public checkpoint that was not fetched.
    """
    if path_or_name in SHIPPED:
        return str(shipped_path(path_or_name))
    if path_or_name not in PUBLIC_FILES:
        return path_or_name
    path = locate(path_or_name)
    if path is None:
        raise WeightsError(f"the weights of {path_or_name} are not here: run `tinysam weights {path_or_name}`")
    return str(path)


def locate(name: str, folder: Path | None = None) -> Path | None:
    """The file of a public checkpoint, if it was fetched before; its contents are not checked again."""
    path = (folder or weights_folder()) / PUBLIC_FILES[name].filename
    return path if path.is_file() else None


def fetch(
    file: PublicFile, *, source: str | None = None, folder: Path | None = None, progress: Progress | None = None
) -> Path:
    """Brings a checkpoint into the weights folder and checks it; a file that is already there is only checked.

    A download that was interrupted goes on where it stopped. The file gets its name when it is whole and checked.

    Args:
        source: path or URL of a copy to take instead of downloading.
        folder: another folder than :func:`weights_folder`.
        progress: told about the bytes read.

    Returns:
        Path of the checkpoint.

    Raises:
        WeightsError: if the file cannot be had or is not the published one.
        LakeError: if ``source`` cannot be read, or the folder cannot be made.
    """
    folder = folder or weights_folder()
    with explained(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
    target = folder / file.filename
    report = progress or (lambda _what, _done, _total: None)
    if target.is_file():
        if complaint := _complaint(target, file, report):
            raise WeightsError(f"{target} {complaint}. Remove it and fetch it again. {_OWN_WEIGHTS}")
        return target
    part = target.with_name(target.name + ".part")
    _check_space(file, part)
    if source is None:
        _download(file, part, target, report)
    else:
        _copy(source, part, report)
    _validator_file(part).unlink(missing_ok=True)
    if complaint := _complaint(part, file, report):
        # Kept, it would be taken for the start of a download for ever.
        part.unlink()
        raise WeightsError(
            f"the file from {source or file.url} {complaint}: it is not the published {file.filename}, "
            f"or was damaged on the way. {_OWN_WEIGHTS if source else by_hand(file, folder)}"
        )
    part.rename(target)
    return target


def by_hand(file: PublicFile, folder: Path | None = None) -> str:
    """How to put a checkpoint in place without this machine downloading it."""
    return (
        f"Without a connection: get {file.url} elsewhere and run `tinysam weights {file.name} --from PATH`, "
        f"or place it at {(folder or weights_folder()) / file.filename}."
    )


def _copy(source: str, part: Path, report: Progress) -> None:
    filesystem, path = open_filesystem(source)
    with explained(source):
        total = filesystem.size(path)
        with filesystem.open(path, "rb") as reader, part.open("wb") as writer:
            _pump(reader, writer, 0, total, report)


def _download(file: PublicFile, part: Path, target: Path, report: Progress) -> None:
    hint = by_hand(file, target.parent)
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _request(file.url, part, report):
                return
            reason = "the connection closed before the end"
        except urllib.error.HTTPError as error:
            if error.code not in _TRANSIENT_STATUS:
                raise WeightsError(f"{file.url} answered {error.code} {error.reason}. {hint}") from error
            reason = f"the server answered {error.code} {error.reason}"
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        grown = part.exists() and part.stat().st_size > before
        failures = 0 if grown else failures + 1
        if failures >= _ATTEMPTS:
            raise WeightsError(
                f"cannot download {file.url}: {reason}. What has arrived is kept: run the command again to go on. "
                + hint
            )
        time.sleep(_BACKOFF_SECONDS * 2 ** (failures - 1) if failures else 0)


def _check_space(file: PublicFile, part: Path) -> None:
    have = part.stat().st_size if part.exists() else 0
    free = shutil.disk_usage(part.parent).free
    if file.size is not None and file.size - have > free:
        raise WeightsError(
            f"{file.filename} needs {file.size - have:,} bytes and {part.parent} has {free:,} left: make room there, "
            "or set TINYSAM_HOME to a folder on another disk"
        )


def _request(url: str, part: Path, report: Progress) -> bool:
    """One request for what ``part`` lacks; returns whether the file is complete."""
    validator_file = _validator_file(part)
    # Without the validator of the version that the first bytes came from, two versions could be glued together.
    validator = validator_file.read_text() if validator_file.exists() else ""
    have = part.stat().st_size if part.exists() and validator else 0
    request = urllib.request.Request(url, headers={"User-Agent": "tinysam"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", validator)
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
            return True
        if error.code == 416:
            part.unlink()
            return False
        raise
    with response:
        resumed = response.status == 206
        if resumed and not str(response.headers.get("Content-Range", "")).startswith(f"bytes {have}-"):
            raise http.client.HTTPException(f"asked for bytes from {have}, got {response.headers.get('Content-Range')}")
        start = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length is not None else None
        if not resumed:
            tag = response.headers.get("ETag", "")
            # If-Range takes strong validators only.
            validator_file.write_text(tag if tag.startswith('"') else response.headers.get("Last-Modified", ""))
        with part.open("ab" if resumed else "wb") as writer:
            done = _pump(response, writer, start, total, report)
    return total is None or done == total


def _validator_file(part: Path) -> Path:
    return part.with_name(part.name + ".version")


def _pump(reader: IO[bytes], writer: IO[bytes], done: int, total: int | None, report: Progress) -> int:
    while chunk := reader.read(_CHUNK):
        writer.write(chunk)
        done += len(chunk)
        report("downloading", done, total)
    return done


def _complaint(path: Path, file: PublicFile, report: Progress) -> str | None:
    """What tells the file at ``path`` from the published one, if anything does."""
    if file.sha256 is None:
        # torch's files are zip archives, and those carry a checksum for each member.
        if not zipfile.is_zipfile(path):
            return "is not a checkpoint file"
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        return None if damaged is None else f"is damaged ({damaged} fails its checksum)"
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return f"has {size:,} bytes and not {file.size:,}"
    digest = hashlib.sha256()
    with path.open("rb") as reader:
        done = 0
        while chunk := reader.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            report("checking", done, size)
    if digest.hexdigest() != file.sha256:
        return f"has SHA-256 {digest.hexdigest()} and not {file.sha256}"
    return None
