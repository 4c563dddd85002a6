"""Makes a KubeRay RayJob of a job's command line, for ``kubectl create``.

    python scripts/rayjob.py label_images --lake s3://bucket/images --output s3://bucket/masks \\
        --num-workers 64 --device cuda | kubectl create -f -

The job has a cluster of its own, with the node groups of cluster/kuberay/raycluster.yaml, that ends with it; it is
tried again where it fails, and goes on from what its output holds. ``--cluster NAME`` before the job's name submits it
to a cluster that runs already. The flags are checked here, before anything is started.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found without an installation

from pipelines.common.cli import parse_config
from pipelines.common.job_config import ShardJobConfig

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster" / "kuberay" / "raycluster.yaml"
JOBS = {
    "cache_teacher": "CacheTeacherConfig",
    "distill": "DistillConfig",
    "quantize": "QuantizeConfig",
    "label_images": "LabelImagesConfig",
    "evaluate": "EvaluateConfig",
}
"""Each job's module in ``pipelines``, and the dataclass of its flags there."""

RETRIES = 5


class RayJobError(Exception):
    """The job would not run as it is; the message says which flag is missing."""


def check_flags(job: str, flags: Sequence[str]) -> None:
    """Parses a job's flags as the job will.

    Raises:
        RayJobError: if a flag is missing whose default is taken from the running cluster: one that is yet to grow, or
            to start, has nothing to take it from.
        SystemExit: with code 2, if the job would not take the flags.
    """
    config: Any = parse_config(getattr(importlib.import_module(f"pipelines.{job}"), JOBS[job]), flags)
    if isinstance(config, ShardJobConfig):
        if config.num_workers is None:
            raise RayJobError("give --num-workers: the autoscaler starts machines for workers that wait for them")
        if config.device == "auto" and getattr(config, "quantized", None) is None:
            raise RayJobError('give --device: "auto" takes a GPU only where the cluster has one already')
    if job == "distill":
        if config.num_workers == 0:
            raise RayJobError("give --num-workers: 0 trains in the driver, which runs on the head")
        if config.use_gpu is None:
            raise RayJobError("give --use-gpu True or False: no machine is there yet that could be asked for its GPU")


def make_rayjob(job: str, flags: Sequence[str], cluster: dict[str, Any], shared: str | None = None) -> dict[str, Any]:
    """The manifest.

    Args:
        job: A key of ``JOBS``.
        flags: The job's flags.
        cluster: A RayCluster's manifest.
        shared: Name of a running RayCluster to submit to, instead of a cluster of the job's own.
    """
    spec: dict[str, Any] = {"entrypoint": shlex.join(["python", f"pipelines/{job}.py", *flags])}
    if job == "quantize":
        spec["entrypointNumCpus"] = 8  # it computes in the driver, which then has to find a place beside the head
    if shared is not None:
        # KubeRay refuses backoffLimit and ignores shutdownAfterJobFinishes where the cluster is not the job's own.
        spec["clusterSelector"] = {"ray.io/cluster": shared}
    else:
        # A head that is lost takes the driver with it: a retry, with a new cluster, is what helps then.
        own = {name: value for name, value in cluster["spec"].items() if name != "gcsFaultToleranceOptions"}
        spec |= {
            "backoffLimit": RETRIES,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": own,
        }
    # The name is new each time: a second run of the same command is a job of its own.
    metadata = {"generateName": f"tinysam-{job.replace('_', '-')}-"}
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}


class _NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def to_yaml(manifest: dict[str, Any]) -> str:
    """The manifest as YAML, every node group written out."""
    return yaml.dump(manifest, Dumper=_NoAliases, sort_keys=False, width=10**6)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the manifest; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", metavar="NAME", help="submit to this RayCluster (default: one of the job's own)")
    parser.add_argument("job", choices=list(JOBS))
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="the job's flags")
    arguments = parser.parse_args(argv)
    try:
        check_flags(arguments.job, arguments.flags)
    except RayJobError as error:
        parser.error(str(error))
    cluster = yaml.safe_load(CLUSTER.read_text(encoding="utf-8"))
    sys.stdout.write(to_yaml(make_rayjob(arguments.job, arguments.flags, cluster, arguments.cluster)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
