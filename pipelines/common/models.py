"""Which weights a run uses, by content: the same path with other weights in it is another run."""

from __future__ import annotations

from pipelines.common.cli import JobError
from tinysam.lake.filesystem import explained, list_files, open_filesystem
from tinysam.lake.fingerprint import file_sha256, fingerprint
from tinysam.lake.run_record import RUN_FILE
from tinysam.modeling.checkpoint import SHIPPED, shipped_path
from tinysam.modeling.registry import CONFIGS


def weights_sha256(path_or_name: str) -> str:
    """SHA-256 of what ``tinysam.load(path_or_name)`` reads; for a quantized folder, a fingerprint of its files' hashes.

    Raises:
        JobError: for the name of an architecture that ships no weights.
        LakeError: if there is no such file.
    """
    if path_or_name in SHIPPED:
        return file_sha256(str(shipped_path(path_or_name)))
    if path_or_name in CONFIGS:
        raise JobError(
            f"{path_or_name!r} names an architecture without weights: give the path or URL of a checkpoint, or one of "
            + ", ".join(SHIPPED)
        )
    fs, path = open_filesystem(path_or_name)
    with explained(path_or_name):
        is_folder = fs.isdir(path)
    if not is_folder:
        return file_sha256(path_or_name)
    names = {url.rsplit("/", 1)[-1]: url for url in list_files(path_or_name)}
    # The run record says when and where, which changes no result.
    return fingerprint({name: file_sha256(url) for name, url in names.items() if name != RUN_FILE})
