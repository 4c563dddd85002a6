"""Segments everything in every image of a lake.

    python pipelines/label_images.py --lake s3://bucket/images --output s3://bucket/masks --student tinysam.pth

Each image becomes one row (``tinysam.lake.schema.MASKS``) with its masks as COCO run lengths at original resolution.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found without an installation, and first of all

import numpy as np
import pyarrow as pa
import torch

from pipelines.common.cli import parse_config, run_main
from pipelines.common.job_config import ShardJobConfig
from pipelines.common.loading import load_on_engine
from pipelines.common.models import weights_sha256
from pipelines.common.read_ahead import read_ahead
from pipelines.common.shard_job import ShardJob
from pipelines.common.shard_worker import Placement, ShardWorker
from tinysam import SamHierarchicalMaskGenerator
from tinysam.everything import HierarchicalConfig
from tinysam.everything.decoders import decoder_precision
from tinysam.lake import schema
from tinysam.lake.fingerprint import fingerprint
from tinysam.lake.images import ImageError
from tinysam.runtime.choice import EngineChoice, engine_name

DEFAULT_STUDENT = "demo_student"

EMBEDDED_TOGETHER = {"cpu": 1, "cuda": 16}
"""Images of a batch of the encoder, by device; more than one gains a CPU nothing."""


@dataclass(frozen=True, kw_only=True)
class LabelImagesConfig(ShardJobConfig):
    """Segments everything in every image of a lake."""

    student: str | None = None
    """The model: a name, or a checkpoint's path or URL. None: "demo_student", unless --quantized names a model."""
    quantized: str | None = None
    """Folder of a quantized student (pipelines/quantize.py), instead of --student. Runs on CPUs."""
    engine: EngineChoice = "auto"
    """What embeds the images. auto: OpenVINO on CPUs, torch on GPUs. compiled: torch.compile. A quantized student
    brings its own."""
    everything: HierarchicalConfig = field(default_factory=lambda: HierarchicalConfig(output_mode="coco_rle"))
    """Options of everything mode; --everything.preset paper is TinySAM's schedule, --everything.rounds 1 SAM's own flat
    grid."""
    min_area: int = 0
    """Masks with fewer pixels are left out."""
    max_area: int | None = None
    """Masks with more pixels are left out."""
    max_masks: int | None = None
    """At most so many masks an image, those with the highest predicted IoU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.student is not None and self.quantized is not None:
            raise ValueError("--student and --quantized name two models; give one of them")
        if self.quantized is not None and self.device == "cuda":
            raise ValueError("--quantized runs on CPUs; leave --device out")
        if self.everything.output_mode != "coco_rle":
            raise ValueError("masks are stored as run lengths; leave --everything.output-mode out")
        if self.min_area < 0:
            raise ValueError("--min-area must not be negative")
        if self.max_area is not None and self.max_area < self.min_area:
            raise ValueError("--max-area must not be below --min-area")
        if self.max_masks is not None and self.max_masks < 1:
            raise ValueError("--max-masks must be at least 1")

    @property
    def model(self) -> str:
        """What to load."""
        return self.quantized or self.student or DEFAULT_STUDENT

    def labelling(self) -> dict[str, Any]:
        """What decides about the masks beside the weights."""
        names = ("engine", "min_area", "max_area", "max_masks")
        return {"everything": self.everything.decisive(), **{name: getattr(self, name) for name in names}}


class LabelImagesWorker(ShardWorker):
    """Index rows in, rows of ``schema.MASKS`` out."""

    schema: ClassVar[pa.Schema] = schema.MASKS

    def __init__(self, config: LabelImagesConfig, model_sha256: str, placement: Placement) -> None:
        super().__init__()
        self._config, self._model_sha256, self._placement = config, model_sha256, placement
        torch.backends.cudnn.deterministic = True
        self._sam = load_on_engine(config.model, placement.device, config.engine, config.everything)
        self._generator = SamHierarchicalMaskGenerator.from_config(self._sam, config.everything)

    def metadata(self) -> dict[str, str]:
        """What the masks were made with."""
        return {
            "model": self._config.model,
            "model_sha256": self._model_sha256,
            "labelling": fingerprint(self._config.labelling()),
            "engine": engine_name(self._sam),
            "decoder_precision": decoder_precision(self._sam, self._config.everything.precision),
        }

    def process(self, rows: pa.Table) -> pa.Table:
        """One row of ``schema.MASKS`` an image, bad images as a status."""
        threads, together = self._placement.num_cpus, EMBEDDED_TOGETHER[self._placement.device]
        read = read_ahead(self._read, rows.to_pylist(), threads=threads, ahead=threads + together)
        done = []
        while batch := list(islice(read, together)):
            good = [(row, pixels) for row, pixels in batch if pixels is not None]
            with self.clock.stage("segment"):
                found = self._generator.generate_batch([pixels for _, pixels in good], together)
            for (row, _), records in zip(good, found, strict=True):
                row["masks"] = self._chosen(records)
            done += [row for row, _ in batch]
        return pa.Table.from_pylist(done, schema=self.schema)

    def _read(self, row: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray | None]:
        out: dict[str, Any] = {"image_id": row["image_id"], "uri": row["uri"], "status": schema.OK}
        try:
            pixels = self.read_pixels(row)
        except ImageError as error:
            return out | {"status": error.status, "error": str(error)}, None
        return out | {"height": pixels.shape[0], "width": pixels.shape[1]}, pixels

    def _chosen(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """An image's masks as ``schema.MASK``, in the generator's order."""
        limit = self._config.max_area
        kept = [r for r in records if r["area"] >= self._config.min_area and (limit is None or r["area"] <= limit)]
        if self._config.max_masks is not None and len(kept) > self._config.max_masks:
            best = sorted(range(len(kept)), key=lambda i: -kept[i]["predicted_iou"])[: self._config.max_masks]
            kept = [kept[i] for i in sorted(best)]
        return [
            {
                "size": record["segmentation"]["size"],
                "counts": record["segmentation"]["counts"],
                **{name: record[name] for name in ("bbox", "area", "predicted_iou", "stability_score", "point_coords")},
            }
            for record in kept
        ]


def job(config: LabelImagesConfig) -> ShardJob:
    """The job that ``config`` asks for; hashes the model's files."""
    if config.quantized is not None:
        config = replace(config, device="cpu")
    model_sha256 = weights_sha256(config.model)
    return ShardJob(
        name="label_images",
        config=config,
        make_worker=partial(LabelImagesWorker, config, model_sha256),
        identity={"model": model_sha256, **config.labelling()},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job; returns its exit code."""
    return job(parse_config(LabelImagesConfig, argv)).run()


if __name__ == "__main__":
    from pipelines import label_images  # Ray's workers find classes by their module, and have no __main__ like this one

    run_main(label_images.main)
