"""Opening parquet files by URL, with damage told apart from trouble with the storage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from tinysam.lake.filesystem import LakeError, explained, open_filesystem, read_bytes, redact_url


@contextlib.contextmanager
def open_parquet(
    url: str, *, remedy: str, whole: bool = False, error_type: type[LakeError] = LakeError
) -> Iterator[pq.ParquetFile]:
    """Opens a parquet file for as long as the context lasts.

    Args:
        url: The file.
        remedy: What to do if it is damaged; ends the message.
        whole: Fetch all of it in one request, rather than the footer and then what is asked for.
        error_type: Raised if it is damaged.

    Raises:
        MissingError: If it is not there.
        LakeError: If the storage fails; ``error_type`` if the content is not whole parquet.
    """
    fs, path = open_filesystem(url)
    with contextlib.ExitStack() as stack:
        stack.enter_context(explained(url))
        source = pa.BufferReader(read_bytes(url)) if whole else stack.enter_context(fs.open(path, "rb"))
        try:
            yield pq.ParquetFile(source, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            if not _is_damage(error):
                raise
            message = f"{redact_url(url)} is not a whole parquet file ({_first_line(error)}). {remedy}"
            raise error_type(message) from error


def _is_damage(error: Exception) -> bool:
    # pyarrow reports some damage as a plain OSError without a number; the operating system and s3fs never do.
    return isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
