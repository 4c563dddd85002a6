"""A job's figures as Ray metrics, which every node's metrics port offers to Prometheus."""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Counter, Histogram

_SECONDS = [0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000]


class JobMetrics:
    """``ray_tinysam_images``, ``…_bytes_read``, ``…_shards_failed`` and ``…_shard_seconds``, tagged with the job.

    Ray must run. Images have their status as a second tag.
    """

    def __init__(self, job: str) -> None:
        tags = {"job": job}
        self._images = Counter("tinysam_images", "Images processed, by status.", ("job", "status"))
        self._bytes = Counter("tinysam_bytes_read", "Bytes of the images processed.", ("job",))
        self._failed = Counter("tinysam_shards_failed", "Shards that could not be written.", ("job",))
        self._seconds = Histogram("tinysam_shard_seconds", "Seconds that a shard took.", _SECONDS, ("job",))
        for metric in (self._images, self._bytes, self._failed, self._seconds):
            metric.set_default_tags(tags)

    def shard_done(self, counts: Mapping[str, int], bytes_read: int, seconds: float) -> None:
        """A shard was written."""
        for status, count in counts.items():
            if count > 0:
                self._images.inc(count, {"status": status})
        if bytes_read:
            self._bytes.inc(bytes_read)
        self._seconds.observe(seconds)

    def shard_failed(self) -> None:
        """A shard was not written."""
        self._failed.inc()
