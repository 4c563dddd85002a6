"""Starting Ray, or joining the cluster that the job was submitted to."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from pipelines.common.cli import JobError

ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds ``pipelines`` and ``tinysam``."""


def start_ray(address: str | None = None) -> None:
    """Connects to ``address``, ``RAY_ADDRESS`` or the cluster of this job; starts Ray on this machine otherwise.

    Does nothing where Ray already runs in this process. Workers can import this repository's packages in each case:
    a submitted job has its working directory on their path; for all others it is put there.

    Raises:
        JobError: if there is no cluster at the address.
    """
    if ray.is_initialized():
        return
    quiet_ray()
    options: dict[str, Any] = {"logging_level": "warning", "log_to_driver": False}
    search_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    cluster = address or os.environ.get("RAY_ADDRESS")
    if cluster is None:
        os.environ["PYTHONPATH"] = search_path  # what a raylet starts inherits its environment
        options["include_dashboard"] = False
    elif "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:  # set by `ray job submit`
        options["runtime_env"] = {"env_vars": {"PYTHONPATH": search_path}}
    try:
        ray.init(address=address, **options)
    except ConnectionError as error:
        raise JobError(
            f"no Ray cluster at {cluster}: check --ray-address and RAY_ADDRESS, or unset both to start Ray here"
        ) from error


@contextmanager
def shared_ray() -> Iterator[str]:
    """Ray on this machine for as long as the context lasts, for commands that run one after the other.

    Yields:
        The address, for ``--ray-address`` or ``RAY_ADDRESS``: a command that joins need not start Ray and end it.
    """
    ours = not ray.is_initialized()
    start_ray()
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        if ours:
            ray.shutdown()


def quiet_ray() -> None:
    """Leaves progress and failures to the job, which shows them."""
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    # That a Ray on this machine alone asks for a token is no news.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)


def cluster_total(resource: str) -> float:
    """How much of ``"CPU"`` or ``"GPU"`` the cluster has now; nodes that an autoscaler may add do not count."""
    return float(ray.cluster_resources().get(resource, 0.0))
