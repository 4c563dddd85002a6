"""The record of a run: what was asked, on what it ran, what came out, and where the time went."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from typing import Any

from tinysam.lake.filesystem import LakeError, MissingError, join, read_bytes, redact_url, write_once
from tinysam.lake.fingerprint import to_plain

RUN_FILE = "run.json"

_PACKAGES = ("tinysam", "torch", "torchvision", "timm", "segment-anything", "ray", "pyarrow", "numpy", "pillow")
_SECRET = re.compile(r"secret|token|passw|credential|api_?key|access_?key|private_?key", re.IGNORECASE)


def package_versions() -> dict[str, str]:
    """Names the versions of Python and of the packages that results depend on, as far as they are installed."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def describe_machine() -> dict[str, Any]:
    """Describes this machine: system, processors, memory in bytes, and the GPUs if torch is loaded and sees any."""
    machine: dict[str, Any] = {
        "system": platform.platform(),
        "processor": _processor_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    torch = sys.modules.get("torch")  # asking must not load it: that takes seconds
    if torch is not None and torch.cuda.is_available():
        machine["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return machine


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What ``<output>/run.json`` says. Secrets in the configuration are blanked when it is written."""

    job: str
    """Name of the pipeline, such as ``cache_teacher``."""
    config: Mapping[str, Any]
    """The resolved configuration."""
    fingerprint: str
    """Fingerprint of the part of the configuration that decides the output; see ``check_same_run``."""
    versions: Mapping[str, str] = dataclasses.field(default_factory=package_versions)
    """Versions of Python and packages."""
    machine: Mapping[str, Any] = dataclasses.field(default_factory=describe_machine)
    """The machine that started the job."""
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Images by status."""
    seconds: float = 0.0
    """Wall-clock time of the run."""
    images_per_second: float = 0.0
    """Images of this run per second of ``seconds``; those that an earlier run finished do not count."""
    time_split: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Seconds by stage, summed over workers."""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What only this job has to say."""

    def write(self, output_url: str) -> None:
        """Writes ``<output_url>/run.json``.

        Raises:
            LakeError: If the storage refuses.
        """
        text = json.dumps(redact(to_plain(self)), indent=2, ensure_ascii=False)
        write_once(join(output_url, RUN_FILE), (text + "\n").encode())


def read_run_record(output_url: str) -> RunRecord | None:
    """Reads ``<output_url>/run.json``; None where there is none.

    Raises:
        LakeError: If it cannot be read or is not a run record.
    """
    url = join(output_url, RUN_FILE)
    try:
        values = json.loads(read_bytes(url))
        known = {field.name for field in dataclasses.fields(RunRecord)}
        return RunRecord(**{key: value for key, value in values.items() if key in known})
    except MissingError:
        return None
    except (ValueError, TypeError, AttributeError) as error:
        raise LakeError(
            f"{redact_url(url)} is not a run record ({error}). Delete it, or use another folder."
        ) from error


def check_same_run(output_url: str, fingerprint: str) -> None:
    """Makes sure that an output folder is new, or holds an earlier part of this same run.

    Raises:
        LakeError: If it holds a run of another fingerprint; two settings must not mix in one folder.
    """
    record = read_run_record(output_url)
    if record is not None and record.fingerprint != fingerprint:
        raise LakeError(
            f"{redact_url(output_url)} holds another run: {record.job} with fingerprint {record.fingerprint}, this one "
            f"has {fingerprint} (the lake, the model or a setting differs; compare {RUN_FILE} there). Choose another "
            "--output, or pass --overwrite to replace what is there."
        )


def redact(value: Any, key: str = "") -> Any:
    """Blanks secrets in plain values: strings under keys that name a secret, and user, password and query of URLs."""
    if isinstance(value, Mapping):
        return {name: redact(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [redact(item, key) for item in value]
    if isinstance(value, str):
        return "***" if value and _SECRET.search(key) else redact_url(value)
    return value


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()
