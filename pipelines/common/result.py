"""What a shard job did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from pipelines.common.cli import EXIT_ERROR, EXIT_OK, EXIT_TOO_MANY_ERRORS
from tinysam.lake import schema


@dataclass(kw_only=True)
class JobResult:
    """Filled in while a job runs; ``counts`` covers the whole output, the other figures this run alone."""

    shards: int
    """Shards of the plan."""
    shards_before: int
    """Shards that the output held already."""
    counts: Counter[str] = field(default_factory=Counter)
    """Images by status."""
    images: int = 0
    """Images processed by this run."""
    bytes_read: int = 0
    """Bytes of the images that this run processed, where the listing told their sizes."""
    seconds: float = 0.0
    """Wall time of this run, from the time that Ray was there; of jobs that run together, each its own part."""
    num_workers: int = 0
    """Workers that Ray was asked for."""
    device: str = "none"
    """Where the model ran."""
    time_split: Counter[str] = field(default_factory=Counter)
    """Seconds by stage, summed over the threads of all workers."""
    finished: bool = False
    """Whether every shard of the plan is in the output."""
    failures: dict[str, str] = field(default_factory=dict)
    """Shards that were not written, and why."""

    @property
    def total_images(self) -> int:
        """Images with a row in the output."""
        return sum(self.counts.values())

    @property
    def errors(self) -> int:
        """Images with a status other than ok."""
        return self.total_images - self.counts[schema.OK]

    @property
    def error_rate(self) -> float:
        """The part of the images whose status is not ok; 0 when there are none."""
        return self.errors / max(self.total_images, 1)

    @property
    def images_per_second(self) -> float:
        """Throughput of this run."""
        return self.images / max(self.seconds, 1e-9)

    def exit_code(self, max_error_rate: float) -> int:
        """See :mod:`pipelines.common.cli`."""
        if self.failures:
            return EXIT_ERROR
        return EXIT_TOO_MANY_ERRORS if self.error_rate > max_error_rate else EXIT_OK
