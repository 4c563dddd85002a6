"""Which weights a run uses, by content: the same path with other weights in it is another run."""

from __future__ import annotations

from pipelines.common.cli import JobError
from tinysam.lake.filesystem import explained, list_files, open_filesystem
from tinysam.lake.fingerprint import file_sha256, fingerprint
from tinysam.lake.run_record import RUN_FILE
from tinysam.modeling.checkpoint import is_untrained
from tinysam.report.quality import RESULTS_FILE
from tinysam.report.quantization import PAGE_FILE, REPORT_FILE
from tinysam.weights import SHIPPED, WeightsError, resolve


def weights_sha256(path_or_name: str) -> str:
    """SHA-256 of what ``tinysam.load(path_or_name)`` reads; for a quantized folder, a fingerprint of its files' hashes.

    Raises:
        JobError: for the name of an architecture that ships no weights, or of a public checkpoint not fetched yet.
        LakeError: if there is no such file.
    """
    if is_untrained(path_or_name):
        raise JobError(
            f"{path_or_name!r} names an architecture without weights: give the path or URL of a checkpoint, or one of "
            + ", ".join(SHIPPED)
        )
    try:
        url = resolve(path_or_name)
    except WeightsError as error:
        raise JobError(str(error)) from error
    fs, path = open_filesystem(url)
    with explained(url):
        is_folder = fs.isdir(path)
    if not is_folder:
        return file_sha256(url)
    names = {file.rsplit("/", 1)[-1]: file for file in list_files(url)}
    about = (RUN_FILE, RESULTS_FILE, REPORT_FILE, PAGE_FILE)  # times and scores, which change no result
    return fingerprint({name: file_sha256(file) for name, file in names.items() if name not in about})
