"""The flags that every shard job has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipelines.common.preemption import Cloud, NoticeBoard
from tinysam.lake.index import IndexConfig


@dataclass(frozen=True, kw_only=True)
class ShardJobConfig:
    """Which images, where to, and with how many workers."""

    lake: str
    """The images: a folder (walked), a tar, a parquet file with an image column, one image, or a .txt with a URI a
    line; a path or a URL."""
    output: str
    """Folder or URL of the results. Running the same command again goes on from what is there."""
    annotations: str | None = None
    """COCO JSON file with the images' ground truth. SA-1B's JSON files beside the images need no flag."""
    include: tuple[str, ...] = ()
    """Only the images whose image_id matches one of these patterns, such as "train/*.jpg". Empty: all."""
    exclude: tuple[str, ...] = ()
    """Leave out the images whose image_id matches one of these patterns."""
    limit: int | None = None
    """Only the first so many images by image_id. Another limit is another run, with an output of its own."""

    images_per_shard: int = 64
    """Images of one output file, which is also what a worker takes at a time and what an interruption can lose."""
    num_workers: int | None = None
    """Workers. None: as many as the cluster's CPUs or GPUs allow now; say a number where an autoscaler adds nodes."""
    num_cpus_per_worker: int | None = None
    """CPUs that one worker reserves: as many threads decode images and run torch. None: 1 on "cpu", and an equal share
    of the cluster's on "cuda"."""
    num_gpus_per_worker: float | None = None
    """GPUs that one worker reserves; 0.5 puts two workers on one. None: 1 on "cuda", 0 on "cpu"."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs. auto: "cuda" when the cluster has a GPU now."""
    ray_address: str | None = None
    """Ray cluster to join. None: RAY_ADDRESS or the cluster that this job was submitted to, else this machine."""

    preemption_notice: Cloud | None = None
    """Look every few seconds, on each machine, whether this cloud is about to take it away. A worker then begins no
    more shards; on the driver's machine, the job ends in good order as after SIGTERM. None: do not look."""
    metadata_url: str | None = None
    """Where --preemption-notice looks. None: the address that the cloud gives its metadata service."""

    max_error_rate: float = 0.05
    """Exit with code 3 when a larger part of the images has a status other than ok. Real lakes hold a few broken
    files, and one in twenty failing points to a wrong path or a bug. The results are written in any case."""
    overwrite: bool = False
    """Delete the results that the output holds first, even another run's."""
    update: bool = False
    """List the lake again and process the images that it has gained, as new shards; those that exist stay as they are.
    Images are known by their ids. Without this flag a run keeps to the index that it began with."""
    retry_failed: bool = False
    """Process the images again whose status is not ok, and keep the rows of the others."""
    dry_run: bool = False
    """Only say what there is to do: images, shards, bytes, what is done already, and an estimate of the time. Starts no
    Ray and writes nothing."""
    dry_run_images: int = 4
    """Images that --dry-run processes on this machine for its estimate; 0: none, and no estimate."""

    def __post_init__(self) -> None:
        if self.images_per_shard < 1:
            raise ValueError("--images-per-shard must be at least 1")
        if self.limit is not None and self.limit < 1:
            raise ValueError("--limit must be at least 1")
        if self.num_workers is not None and self.num_workers < 1:
            raise ValueError("--num-workers must be at least 1")
        if self.num_cpus_per_worker is not None and self.num_cpus_per_worker < 1:
            raise ValueError("--num-cpus-per-worker must be at least 1")
        if self.num_gpus_per_worker is not None and self.num_gpus_per_worker < 0:
            raise ValueError("--num-gpus-per-worker must not be negative")
        if self.dry_run_images < 0:
            raise ValueError("--dry-run-images must not be negative")
        if self.update and self.limit is not None:
            raise ValueError("--update takes in all images, which --limit leaves out; give one of them")
        if self.overwrite and (self.update or self.retry_failed):
            raise ValueError("--overwrite begins anew, and leaves nothing for --update or --retry-failed")
        if not 0 <= self.max_error_rate <= 1:
            raise ValueError("--max-error-rate must be between 0 and 1")
        if self.metadata_url is not None and self.preemption_notice is None:
            raise ValueError("--metadata-url says where --preemption-notice looks; give that as well")

    def notice_board(self) -> NoticeBoard | None:
        """Where every machine of the job looks for its notice."""
        if self.preemption_notice is None:
            return None
        return NoticeBoard(cloud=self.preemption_notice, url=self.metadata_url)

    def index_config(self) -> IndexConfig:
        """What to list."""
        return IndexConfig(
            lake=self.lake,
            annotations=self.annotations,
            include=self.include,
            exclude=self.exclude,
            limit=self.limit,
        )
