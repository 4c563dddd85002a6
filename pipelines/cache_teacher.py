"""Runs the teacher's image encoder over a lake once, so that no training step has to.

Each image is decoded, resized, and kept as the JPEG that the teacher saw; the embedding and the ground truth lie
beside it, so training reads these shards and nothing else. ``--teacher none`` leaves the embeddings out: what training
from ground truth alone reads.

    python pipelines/cache_teacher.py --lake s3://bucket/images --output s3://bucket/cache --teacher vit_h.pth
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found without an installation, and first of all

import numpy as np
import pyarrow as pa
import torch

from pipelines.common.cli import JobError, parse_config, run_main
from pipelines.common.job_config import ShardJobConfig
from pipelines.common.models import weights_sha256
from pipelines.common.read_ahead import read_ahead
from pipelines.common.shard_job import ShardJob
from pipelines.common.shard_worker import Placement, ShardWorker
from tinysam import load
from tinysam.lake import schema
from tinysam.lake.annotations import MAX_MASKS, MIN_AREA, read_annotations, to_training_masks
from tinysam.lake.codecs import Codec, encode_embedding
from tinysam.lake.fingerprint import fingerprint
from tinysam.lake.images import ImageError, decode_image, encode_jpeg
from tinysam.predictor import ResizeLongestSide
from tinysam.runtime.choice import TorchEngine, with_engine

NO_TEACHER = "none"

EMBEDDED_TOGETHER = {"cpu": 1, "cuda": 8}
"""Images that the teacher encodes at once, by device. A CPU takes half as long again for each of eight: the system
hands out the memory of their activations, and zeroes it, anew for every layer."""


@dataclass(frozen=True, kw_only=True)
class CacheTeacherConfig(ShardJobConfig):
    """Caches the teacher's image embeddings and the ground truth of a lake."""

    teacher: str
    """Whose embeddings: a model's name, a checkpoint (path or URL), or "none" for ground truth alone."""
    image_size: int | None = None
    """Longest side of the input frame in pixels, a multiple of 16. None: the teacher's own; "none" needs a number."""
    codec: Codec = "fp16"
    """How embeddings are stored: int8 (one scale a channel) takes about half the space of fp16, int6 a third."""
    batch_size: int | None = None
    """Images that the teacher encodes at once; what fits depends on the GPU's memory. None: 8 on GPUs, 1 on CPUs."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the teacher; bf16 is faster on GPUs and moves embeddings by about 1 %."""
    engine: TorchEngine = "torch"
    """What runs the teacher. compiled: torch.compile, which takes minutes to start and pays in long runs; int8 and fp8:
    that with 8-bit linear layers, on GPUs."""
    jpeg_quality: int = 95
    """Quality of the kept JPEG. The teacher sees its decoded pixels, so no quality makes it differ from training."""
    min_mask_area: float = MIN_AREA
    """Ground truth masks with fewer pixels of the input frame are left out."""
    max_masks: int = MAX_MASKS
    """At most so many ground truth masks an image; of more, as many are kept of each size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher == NO_TEACHER and self.image_size is None:
            raise ValueError("--teacher none needs --image-size")
        if self.image_size is not None and (self.image_size < 16 or self.image_size % 16):
            raise ValueError("--image-size must be a positive multiple of 16")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError("--batch-size must be at least 1")
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError("--jpeg-quality must be between 1 and 100")
        if self.min_mask_area < 0:
            raise ValueError("--min-mask-area must not be negative")
        if self.max_masks < 1:
            raise ValueError("--max-masks must be at least 1")

    def required_image_size(self) -> int:
        """``image_size`` where there is no teacher to ask."""
        assert self.image_size is not None
        return self.image_size

    def preprocessing(self) -> dict[str, Any]:
        """What decides about the pixels and the ground truth."""
        names = ("image_size", "jpeg_quality", "min_mask_area", "max_masks")
        return {name: getattr(self, name) for name in names}


class Teacher:
    """A Sam's image encoder for lists of input frames."""

    def __init__(self, config: CacheTeacherConfig, device: str) -> None:
        self._sam = with_engine(load(config.teacher).to(device), config.engine)
        self._device, self._precision = device, config.precision
        self.image_size: int = self._sam.image_encoder.img_size
        if config.image_size not in (None, self.image_size):
            raise JobError(
                f"--image-size {config.image_size} does not fit the teacher {config.teacher}, which takes "
                f"{self.image_size}; leave the flag out"
            )
        prompts = self._sam.prompt_encoder
        self.embedding_shape: tuple[int, int, int] = (prompts.embed_dim, *prompts.image_embedding_size)
        torch.backends.cudnn.deterministic = True

    @torch.inference_mode()
    def embed(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Embeds input frames.

        Args:
            images: (h, w, 3) uint8 RGB each, the longest side ``image_size``.

        Returns:
            (B, C, H, W) float32.
        """
        tensors = [torch.from_numpy(image).to(self._device).permute(2, 0, 1) for image in images]
        batch = torch.stack([self._sam.preprocess(tensor) for tensor in tensors])
        with torch.autocast(self._device, dtype=torch.bfloat16, enabled=self._precision == "bf16"):
            embeddings = self._sam.image_encoder(batch)
        return embeddings.float().cpu().numpy()


class CacheTeacherWorker(ShardWorker):
    """Index rows in, rows of ``schema.EMBEDDING`` out."""

    schema: ClassVar[pa.Schema] = schema.EMBEDDING

    def __init__(self, config: CacheTeacherConfig, teacher_sha256: str, placement: Placement) -> None:
        super().__init__()
        self._config, self._teacher_sha256, self._placement = config, teacher_sha256, placement
        self._teacher = None if config.teacher == NO_TEACHER else Teacher(config, placement.device)
        self._image_size = self._teacher.image_size if self._teacher else config.required_image_size()
        self._resize = ResizeLongestSide(self._image_size)

    def metadata(self) -> dict[str, str]:
        """See ``DESIGN``: what a reader needs to decode the embeddings, and what they were made with."""
        facts = {
            "image_size": str(self._image_size),
            "teacher": self._config.teacher,
            "preprocessing": fingerprint(self._config.preprocessing() | {"image_size": self._image_size}),
        }
        if self._teacher is not None:
            facts |= {
                "teacher_sha256": self._teacher_sha256,
                "embedding_shape": ",".join(map(str, self._teacher.embedding_shape)),
                "embedding_dtype": "float16" if self._config.codec == "fp16" else "int8",
                "codec": self._config.codec,
            }
        return facts

    def process(self, rows: pa.Table) -> pa.Table:
        """One row of ``schema.EMBEDDING`` an image, bad images as a status."""
        threads = self._placement.num_cpus
        batch_size = self._config.batch_size or EMBEDDED_TOGETHER[self._placement.device]
        prepared = read_ahead(self._prepare, rows.to_pylist(), threads=threads, ahead=2 * max(batch_size, threads))
        if self._teacher is None:
            return pa.Table.from_pylist([row for row, _ in prepared], schema=self.schema)
        done: list[dict[str, Any]] = []
        batch: list[tuple[dict[str, Any], np.ndarray]] = []
        for row, pixels in prepared:
            done.append(row)
            if pixels is not None:
                batch.append((row, pixels))
            if len(batch) == batch_size:
                self._embed(self._teacher, batch)
                batch.clear()
        if batch:
            self._embed(self._teacher, batch)
        return pa.Table.from_pylist(done, schema=self.schema)

    def _prepare(self, row: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray | None]:
        """The output row but for its embedding, and the input frame, (h, w, 3) uint8, as its JPEG decodes."""
        out: dict[str, Any] = {"image_id": row["image_id"], "uri": row["uri"], "status": schema.OK}
        try:
            original = self.read_pixels(row)
            with self.clock.stage("decode"):
                out["height"], out["width"] = original.shape[:2]
                pixels = self._resize.apply_image(original)
                out["input_height"], out["input_width"] = pixels.shape[:2]
                jpeg = encode_jpeg(pixels, self._config.jpeg_quality)
                pixels = decode_image(jpeg)
            with self.clock.stage("annotations"):
                out["masks"] = self._training_masks(row, original, pixels)
        except ImageError as error:
            return out | {"status": error.status, "error": str(error)}, None
        return out | {"image": jpeg}, pixels

    def _training_masks(
        self, row: Mapping[str, Any], original: np.ndarray, resized: np.ndarray
    ) -> list[dict[str, Any]] | None:
        rles = read_annotations(row, *original.shape[:2])
        if rles is None:
            return None
        return to_training_masks(
            rles,
            input_size=(resized.shape[0], resized.shape[1]),
            image_size=self._image_size,
            min_area=self._config.min_mask_area,
            max_masks=self._config.max_masks,
        )

    def _embed(self, teacher: Teacher, batch: Sequence[tuple[dict[str, Any], np.ndarray]]) -> None:
        """Adds the embeddings to the rows."""
        with self.clock.stage("embed"):
            embeddings = teacher.embed([pixels for _, pixels in batch])
        with self.clock.stage("encode"):
            for (row, _), embedding in zip(batch, embeddings, strict=True):
                row["embedding"] = encode_embedding(embedding, self._config.codec)


def job(config: CacheTeacherConfig) -> ShardJob:
    """The job that ``config`` asks for; hashes the teacher's checkpoint."""
    teacher_sha256 = "" if config.teacher == NO_TEACHER else weights_sha256(config.teacher)
    return ShardJob(
        name="cache_teacher",
        config=config,
        make_worker=partial(CacheTeacherWorker, config, teacher_sha256),
        identity={
            "teacher": teacher_sha256 or NO_TEACHER,
            "codec": config.codec,
            "precision": config.precision,
            "engine": config.engine,
            **config.preprocessing(),
        },
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job; returns its exit code."""
    return job(parse_config(CacheTeacherConfig, argv)).run()


if __name__ == "__main__":
    from pipelines import (
        cache_teacher,
    )  # Ray's workers find classes by their module, and have no __main__ like this one

    run_main(cache_teacher.main)
