"""Files by URL: one place that opens storage, and that turns its errors into ones which say what to do.

Plain paths, ``file://``, ``s3://``, ``gs://``, ``hf://`` and whatever else fsspec has a driver for. S3 credentials,
region and endpoint come from the ``AWS_*`` environment, as for every other tool, and never appear in a message.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

import fsspec
import pyarrow as pa
import pyarrow.fs
from fsspec.implementations.local import LocalFileSystem

_S3_SCHEMES = ("s3://", "s3a://")
_BUCKET_SCHEMES = (*_S3_SCHEMES, "gs://", "gcs://")
_DRIVERS = (
    *("aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "s3fs"),
    *("huggingface_hub", "httpcore", "httpcore2", "httpx", "httpx2"),
)
# s3fs turns S3's answers into these: InternalError and 500, SlowDown and 503, and those that it does not know.
_BUSY_ERRNOS = (getattr(errno, "EREMOTEIO", errno.EIO), errno.EBUSY, errno.EIO)
_BUSY_STATUSES = ("429", "500", "502", "503", "504")
_UNREACHABLE = (
    *("EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError"),
    *("ConnectError", "ConnectTimeout"),
)
_BROKEN_TRANSFERS = (
    *("ReadError", "ReadTimeout", "RemoteProtocolError"),
    *("ClientPayloadError", "ServerDisconnectedError", "ServerTimeoutError", "FSTimeoutError", "IncompleteRead"),
    *(
        "IncompleteReadError",
        "ResponseStreamingError",
        "ResponseParserError",
        "HTTPClientError",
        "ProxyConnectionError",
    ),
)
_SINGLE_PUT_BYTES = 1 << 30  # s3fs splits what is larger than twice its chunk size into several requests


class LakeError(Exception):
    """Storage or a table in it cannot be used; the message names the URL and the remedy."""


class TransientError(LakeError):
    """The storage failed in a way that may pass by itself: overload, a lost connection, a time-out."""


class MissingError(LakeError):
    """The file, folder or bucket is not there."""


class ShortReadError(LakeError):
    """The file ends before the bytes that were asked for."""


def is_local(url: str) -> bool:
    """Tells whether ``url`` is a plain path or a ``file://`` URL."""
    return "://" not in url or url.startswith(("file://", "local://"))


def join(url: str, *parts: str) -> str:
    """Appends path components to a URL: ``join("s3://b/a/", "c", "d.json") == "s3://b/a/c/d.json"``."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def redact_url(url: str) -> str:
    """Blanks what may be secret in a URL: user and password, and the query (signatures travel there)."""
    url = re.sub(r"(?<=://)[^/@]*@", "***@", url)
    return re.sub(r"\?(?=[^/]*=).*$", "?***", url) if "://" in url else url


def open_filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Opens the storage that a URL points into.

    Args:
        url: A plain path, or a URL of any scheme that fsspec knows. ``AWS_ENDPOINT_URL_S3`` and ``AWS_ENDPOINT_URL``
            are honoured for S3. A name is taken literally: ``%20``, ``*`` and ``::`` have no meaning.

    Returns:
        The filesystem and the path inside it. Listings are never cached, so they are never stale.

    Raises:
        LakeError: If the scheme is unknown or its driver is not installed.
    """
    if is_local(url):
        return LocalFileSystem(), LocalFileSystem._strip_protocol(url)
    with explained(url):
        if url.startswith(_S3_SCHEMES):
            # s3fs keeps its sessions for ever; the environment as key makes corrected credentials take effect.
            environment = tuple(sorted((key, value) for key, value in os.environ.items() if key.startswith("AWS_")))
            fs = _s3_filesystem(os.getpid(), environment)
        else:
            fs = fsspec.filesystem(url.split("://", 1)[0], use_listings_cache=False)
        return fs, fs._strip_protocol(url)


@functools.lru_cache(maxsize=8)
def _s3_filesystem(pid: int, environment: tuple[tuple[str, str], ...]) -> fsspec.AbstractFileSystem:
    variables = dict(environment)
    endpoint = variables.get("AWS_ENDPOINT_URL_S3") or variables.get("AWS_ENDPOINT_URL") or None
    # Stores other than AWS refuse botocore's extra checksums on uploads, or answer a range read with the checksum of
    # the whole object, which then fails to match.
    checksums = ("request_checksum_calculation", "response_checksum_validation") if endpoint else ()
    config = {name: "when_required" for name in checksums if f"AWS_{name.upper()}" not in variables}
    return fsspec.filesystem(
        "s3", endpoint_url=endpoint, config_kwargs=config, use_listings_cache=False, skip_instance_cache=True
    )


def arrow_filesystem(fs: fsspec.AbstractFileSystem) -> pyarrow.fs.FileSystem:
    """Wraps an fsspec filesystem for pyarrow and Ray; pass them paths without a scheme."""
    if isinstance(fs, LocalFileSystem):
        return pyarrow.fs.LocalFileSystem()
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))


def url_of(url: str, path: str) -> str:
    """Turns a path that the filesystem of ``url`` listed into a URL of the same scheme."""
    if is_local(url) or "://" in path:
        return path
    return f"{url.split('://', 1)[0]}://{path.lstrip('/')}"


def read_bytes(url: str, offset: int = 0, size: int = -1) -> bytes:
    """Reads a file, or ``size`` bytes of it from ``offset`` on, in one request.

    Raises:
        MissingError: If the file is not there.
        ShortReadError: If it ends before ``offset + size``.
        LakeError: If it cannot be read.
    """
    fs, path = open_filesystem(url)
    if size == 0:
        return b""
    with explained(url):
        if offset == 0 and size < 0:
            return fs.cat_file(path)
        data = fs.cat_file(path, start=offset, end=offset + size if size >= 0 else None)
    if size >= 0 and len(data) != size:
        raise _short_read(url)
    return data


def _short_read(url: str) -> ShortReadError:
    return ShortReadError(
        f"{redact_url(url)} is shorter than it was when it was indexed: it is cut short, or has changed. Restore it, "
        "or index the lake again."
    )


def write_once(url: str, data: bytes) -> None:
    """Writes a file so that readers see all of it or nothing: one PUT on object storage, a rename on a local disk.

    Missing folders are created. An existing file is replaced.

    Raises:
        LakeError: If the storage refuses.
    """
    fs, path = open_filesystem(url)
    with explained(url, writing=True):
        if isinstance(fs, LocalFileSystem):
            _write_local(Path(path), data)
        elif url.startswith(_S3_SCHEMES):
            fs.pipe_file(path, data, chunksize=_SINGLE_PUT_BYTES // 2)
        else:
            fs.makedirs(fs._parent(path), exist_ok=True)
            fs.pipe_file(path, data)


def write_stream_once(url: str, fill: Callable[[BinaryIO], None]) -> None:
    """Writes a file of any size as ``write_once`` does: readers see all of it or nothing.

    Args:
        url: The file.
        fill: Writes the content. For object storage it goes through a temporary file on the local disk.

    Raises:
        LakeError: If the storage refuses.
    """
    fs, path = open_filesystem(url)
    if isinstance(fs, LocalFileSystem):
        with explained(url, writing=True):
            _fill_local(Path(path), fill)
        return
    with tempfile.NamedTemporaryFile() as file:
        fill(cast(BinaryIO, file))
        file.flush()
        with explained(url, writing=True):
            if not url.startswith(_S3_SCHEMES):
                fs.makedirs(fs._parent(path), exist_ok=True)
            fs.put_file(file.name, path)


def _write_local(path: Path, data: bytes) -> None:
    def fill(file: BinaryIO) -> None:
        file.write(data)

    _fill_local(path, fill)


def _fill_local(path: Path, fill: Callable[[BinaryIO], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The hidden name keeps an unfinished file out of listings if the process dies here.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; give this one the permissions that open() would have.
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remove(url: str) -> None:
    """Deletes a file if it is there.

    Raises:
        LakeError: If the storage refuses.
    """
    if exists(url):
        fs, path = open_filesystem(url)
        with explained(url, writing=True):
            fs.rm_file(path)


def list_files(url: str, pattern: str = "**") -> list[str]:
    """Lists the files below a folder, hidden ones left out.

    Args:
        url: The folder. One that does not exist has no files, as object storage knows no folders.
        pattern: Shell pattern for the path relative to ``url``; ``*`` crosses folders.

    Returns:
        URLs, sorted.

    Raises:
        LakeError: If the bucket is missing or access is denied.
    """
    fs, root = open_filesystem(url)
    with explained(url):
        paths = fs.find(root)
    relative = ((path, path[len(root) :].strip("/")) for path in paths)
    return sorted(
        url_of(url, path)
        for path, name in relative
        if fnmatch.fnmatchcase(name, pattern) and not any(part.startswith(".") for part in name.split("/"))
    )


def exists(url: str) -> bool:
    """Tells whether a file or folder is there.

    Raises:
        LakeError: If the storage cannot be asked (wrong credentials, unreachable endpoint).
    """
    fs, path = open_filesystem(url)
    try:
        with explained(url):
            fs.info(path)
    except MissingError:
        return False
    return True


@contextlib.contextmanager
def explained(url: str, *, writing: bool = False) -> Iterator[None]:
    """Turns errors of the storage behind ``url`` into a LakeError that names the URL and the remedy."""
    try:
        yield
    except Exception as error:
        if not _is_storage_error(error):
            raise
        raise _explain(url, error, writing) from error


def _is_storage_error(error: Exception) -> bool:
    if isinstance(error, LakeError | pa.ArrowException):
        return False
    # Drivers let errors of their own libraries through, and importing all of those to name the classes is no option.
    return isinstance(error, OSError | ImportError | ValueError) or type(error).__module__.split(".")[0] in _DRIVERS


def _explain(url: str, error: BaseException, writing: bool) -> LakeError:
    shown = redact_url(url)
    if isinstance(error, FileNotFoundError):
        if url.startswith("hf://"):
            return MissingError(
                f"{shown} is not on the Hugging Face hub, or is private. Check the spelling "
                "(hf://datasets/owner/name), and set HF_TOKEN where it takes one."
            )
        bucket, _, key = url.split("://", 1)[-1].partition("/")
        if url.startswith(_BUCKET_SCHEMES) and (not key.strip("/") or "bucket" in str(error).lower()):
            return MissingError(
                f"{shown}: there is no bucket {bucket!r}. Check its name and AWS_ENDPOINT_URL, or create the bucket."
            )
        return MissingError(f"{shown} does not exist. Check the spelling, and that every machine can see it.")
    name = type(error).__name__
    if name in ("NoCredentialsError", "PartialCredentialsError"):
        return LakeError(
            f"{shown}: no credentials were found. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE, or "
            "give the machine a role)."
        )
    if isinstance(error, PermissionError):
        action = "write to" if writing else "read"
        if is_local(url):
            return LakeError(f"{shown}: no permission to {action} it. Change its owner or mode, or use another folder.")
        return LakeError(
            f"{shown}: access denied. Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, and that "
            f"this key may {action} the bucket."
        )
    if isinstance(error, NotADirectoryError | FileExistsError | IsADirectoryError):
        return LakeError(f"{shown}: a file stands where a folder is needed, or the reverse. Use another path.")
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return LakeError(f"{shown}: the disk is full. Free some space, or use another folder.")
    if isinstance(error, ImportError):
        return LakeError(f"{shown}: the driver for this kind of storage is not installed. {error}.")
    if isinstance(error, ValueError) and "rotocol" in str(error):
        scheme = url.split("://", 1)[0]
        return LakeError(f"{shown}: unknown scheme {scheme!r}. Use a path, file://, s3://, gs:// or hf://.")
    if name in _UNREACHABLE:
        endpoint = "HF_ENDPOINT" if url.startswith("hf://") else "AWS_ENDPOINT_URL"
        return TransientError(f"{shown}: the storage cannot be reached. Check the network and {endpoint}.")
    if "InvalidRange" in str(error):
        return _short_read(url)
    if not is_local(url) and _may_pass(error):
        return TransientError(
            f"{shown}: the storage is overloaded or lost the connection ({name}: {error}). Try again."
        )
    if isinstance(error, ValueError) and "endpoint" in str(error):
        return LakeError(f"{shown}: {error}. AWS_ENDPOINT_URL needs a scheme, as in https://minio.example.org:9000.")
    return LakeError(f"{shown}: {name}: {error}")


def _may_pass(error: BaseException) -> bool:
    """Tells whether a store's error is one of the moment rather than of the request."""
    if isinstance(error, TimeoutError | ConnectionError) or type(error).__name__ in _BROKEN_TRANSFERS:
        return True
    answer = getattr(error, "response", None)  # huggingface_hub; a mapping in botocore's errors
    status = getattr(error, "code", None) or getattr(error, "status", None) or getattr(answer, "status_code", None)
    return getattr(error, "errno", None) in _BUSY_ERRNOS or str(status) in _BUSY_STATUSES
