"""Measures models against ground truth: box prompts, clicks, everything mode, and mask AP; several side by side.

    python pipelines/evaluate.py --checkpoints demo_teacher demo_student --lake images \\
        --annotations instances.json --output results

Each checkpoint has a folder of its own in the output, with one row an image (``tinysam.eval.rows.SCORES``): a run that
was cut short goes on where it stopped, and of a checkpoint that is added later, only its own part is computed. The
tables ``results.json`` and ``results.md`` and the page ``results.html`` are reduced from these rows.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found without an installation, and first of all

import numpy as np
import pyarrow as pa
import torch
from rich.markdown import Markdown
from segment_anything.modeling import Sam

from pipelines.common.cli import JobError, console, error_console, parse_config, run_main
from pipelines.common.job_config import ShardJobConfig
from pipelines.common.loading import load_on_engine
from pipelines.common.models import weights_sha256
from pipelines.common.read_ahead import read_ahead
from pipelines.common.shard_job import ShardJob, run_jobs
from pipelines.common.shard_worker import Placement, ShardWorker
from tinysam import SamHierarchicalMaskGenerator
from tinysam.eval import ClickConfig, EvalConfig, evaluate_image
from tinysam.eval.detections import read_detections, read_results, write_detections
from tinysam.eval.ground_truth import NO_CATEGORY, Objects, coco_image_ids, read_objects
from tinysam.eval.image import TASKS, Task
from tinysam.eval.lvis import LvisError, read_lvis, require_lvis
from tinysam.eval.reduce import Lvis, Reduction, read_scores, reduce_scores
from tinysam.eval.results import dataset_results, to_markdown
from tinysam.eval.rows import SCORES, to_row
from tinysam.everything import HierarchicalConfig
from tinysam.everything.decoders import decoder_precision
from tinysam.lake import schema
from tinysam.lake.coco import CocoFile
from tinysam.lake.filesystem import join, write_once
from tinysam.lake.fingerprint import file_sha256, fingerprint
from tinysam.lake.images import ImageError
from tinysam.lake.index import build_index
from tinysam.lake.run_record import RunRecord, read_run_record
from tinysam.report import ReportConfig, write_report
from tinysam.runtime.choice import EngineChoice, engine_name

DETECTIONS_FILE = "detections.parquet"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ShardJobConfig):
    """Measures models against the ground truth of a lake: --annotations, SA-1B's JSON files beside the images, or the
    masks that --teacher makes of images without any."""

    checkpoints: tuple[str, ...]
    """The models, compared side by side: names, checkpoints (path or URL), folders of quantized models."""
    tasks: tuple[Task, ...] = TASKS
    """box: box prompts and mask AP. points: simulated clicks. everything: recall of everything mode."""
    detections: str | None = None
    """COCO results JSON of a detector, whose boxes are segmented for mask AP. None: the objects' own boxes. Needs
    --annotations."""
    protocol: Literal["coco", "lvis"] = "coco"
    """Whose definition of mask AP. lvis: lvis-api's, with an LVIS file as --annotations; needs tinysam[lvis]."""
    teacher: str | None = None
    """A model whose masks of everything take the place of ground truth: how far the models agree with it, on images
    that nobody has annotated. A name, checkpoint, or folder of a quantized model."""
    name: str | None = None
    """What the data set is called in the results. None: the last part of --lake."""

    clicks: ClickConfig = field(default_factory=ClickConfig)
    """How clicks are simulated."""
    engine: EngineChoice = "auto"
    """What embeds the images. auto: OpenVINO on CPUs, torch on GPUs. Quantized models bring their own."""
    everything: HierarchicalConfig = field(default_factory=lambda: HierarchicalConfig(output_mode="coco_rle"))
    """Options of everything mode; --everything.preset paper is TinySAM's schedule, --everything.rounds 1 SAM's own flat
    grid."""
    prompts_per_batch: int = 64
    """Box and click prompts that are decoded together."""

    max_detections: int = 100
    """Masks of one image and category that count for AP. 100 is COCO's protocol (LVIS: 300); a class-agnostic or dense
    data set, with more objects than that in an image, needs more."""
    bootstrap_samples: int = 1000
    """Resamplings of the images behind the 95 % intervals."""
    ap_bootstrap_samples: int = 100
    """The same for AP, where each takes seconds on a data set of COCO's size; 0: no interval."""
    images_per_shard: int = 8
    """Images of one output file. An image with hundreds of objects takes minutes on a CPU, hence few."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.checkpoints:
            raise ValueError("--checkpoints needs at least one")
        if self.detections is not None and (self.annotations is None or "box" not in self.tasks):
            raise ValueError("--detections needs --annotations, the COCO file with its image ids, and the task box")
        if self.protocol == "lvis" and (self.annotations is None or "box" not in self.tasks):
            raise ValueError("--protocol lvis needs --annotations, LVIS's file, and the task box")
        if self.teacher is not None and self.annotations is not None:
            raise ValueError("--teacher and --annotations name two ground truths; give one of them")
        if self.everything.output_mode != "coco_rle":
            raise ValueError("masks are compared as run lengths; leave --everything.output-mode out")
        if min(self.bootstrap_samples, self.max_detections) < 1:
            raise ValueError("--bootstrap-samples and --max-detections must be at least 1")
        if self.ap_bootstrap_samples < 0:
            raise ValueError("--ap-bootstrap-samples must not be negative")
        self.eval_config()

    def eval_config(self) -> EvalConfig:
        """What is measured on an image."""
        return EvalConfig(tasks=self.tasks, clicks=self.clicks, prompts_per_batch=self.prompts_per_batch)

    def dataset(self) -> str:
        """The data set's name in the results."""
        return self.name or PurePosixPath(self.lake.rstrip("/")).name or self.lake

    def identity(self) -> dict[str, Any]:
        """What decides about the rows beside the weights."""
        identity: dict[str, Any] = {"tasks": sorted(set(self.tasks)), "engine": self.engine}
        if self.detections is not None:
            identity["detections"] = file_sha256(self.detections)
        if self.teacher is not None:
            identity["teacher"] = weights_sha256(self.teacher)
        if "points" in self.tasks:
            identity["clicks"] = asdict(self.clicks)
        if "everything" in self.tasks or self.teacher is not None:
            identity["everything"] = self.everything.decisive()
        return identity


class EvaluateWorker(ShardWorker):
    """Index rows in, rows of ``SCORES`` out."""

    schema: ClassVar[pa.Schema] = SCORES

    def __init__(
        self, config: EvaluateConfig, checkpoint: str, sha256: str, detections_url: str | None, placement: Placement
    ) -> None:
        super().__init__()
        torch.backends.cudnn.deterministic = True
        self._config, self._placement = config, placement
        self._facts = {"model": checkpoint, "model_sha256": sha256, "evaluation": fingerprint(config.identity())}
        self._detections_url = detections_url
        self._sam = self._load(checkpoint)
        self._facts["engine"] = engine_name(self._sam)
        self._facts["decoder_precision"] = decoder_precision(self._sam, config.everything.precision)
        self._generator = SamHierarchicalMaskGenerator.from_config(self._sam, config.everything)
        self._teacher = None
        if config.teacher is not None:
            self._teacher = SamHierarchicalMaskGenerator.from_config(self._load(config.teacher), config.everything)

    def _load(self, checkpoint: str) -> Sam:
        config = self._config
        return load_on_engine(checkpoint, self._placement.device, config.engine, config.everything)

    def metadata(self) -> dict[str, str]:
        """What the scores belong to."""
        return self._facts

    def process(self, rows: pa.Table) -> pa.Table:
        """One row of ``SCORES`` an image, bad images as a status."""
        detections: dict[str, list[dict[str, Any]]] | None = None
        if self._detections_url is not None:
            detections = read_detections(self._detections_url, rows["image_id"].to_pylist())
        threads = self._placement.num_cpus
        done = []
        for row, pixels, objects in read_ahead(self._read, rows.to_pylist(), threads=threads, ahead=threads + 1):
            if pixels is not None and self._teacher is not None:
                objects = self._objects_of_teacher(self._teacher, pixels)
            if pixels is not None and objects is not None:
                boxes = None if detections is None else detections.get(row["image_id"], [])
                row |= self._score(pixels, objects, boxes)
            done.append(row)
        return pa.Table.from_pylist(done, schema=self.schema)

    def _read(self, row: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray | None, Objects | None]:
        out: dict[str, Any] = {"image_id": row["image_id"], "uri": row["uri"], "status": schema.OK}
        try:
            pixels = self.read_pixels(row)
            objects = None
            if self._teacher is None:
                with self.clock.stage("annotations"):
                    objects = read_objects(row, *pixels.shape[:2])
        except ImageError as error:
            return out | {"status": error.status, "error": str(error)}, None, None
        return out | {"height": pixels.shape[0], "width": pixels.shape[1]}, pixels, objects

    def _score(
        self, pixels: np.ndarray, objects: Objects, detections: Sequence[Mapping[str, Any]] | None
    ) -> dict[str, Any]:
        boxes = None
        if detections is not None:
            boxes = np.array([detection["bbox"] for detection in detections], dtype=np.float64).reshape(-1, 4)
        scores = evaluate_image(
            self._sam,
            pixels,
            objects.rles,
            config=self._config.eval_config(),
            generator=self._generator,
            detections=boxes,
            stage=self._stage,
        )
        return to_row(scores, objects.rles, objects.categories, detections)

    def _objects_of_teacher(self, teacher: SamHierarchicalMaskGenerator, pixels: np.ndarray) -> Objects:
        with self.clock.stage("teacher"):
            rles = [record["segmentation"] for record in teacher.generate(pixels)]
        return Objects(rles=rles, categories=[NO_CATEGORY] * len(rles))

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """The clock's stage, that of everything mode in its parts: the generator knows where its time went."""
        if name != "everything":
            with self.clock.stage(name):
                yield
            return
        before, start = dict(self._generator.seconds), time.perf_counter()
        yield
        total = time.perf_counter() - start
        for part, seconds in self._generator.seconds.items():
            self.clock.add(f"everything: {part}", seconds - before[part])
            total -= seconds - before[part]
        self.clock.add("everything: rest", total)


def labels(checkpoints: Sequence[str], sha256s: Sequence[str]) -> list[str]:
    """A column's and folder's name for each checkpoint: the file's, and a part of its hash where two are alike.

    Raises:
        JobError: if one is given twice.
    """
    if len(set(checkpoints)) < len(checkpoints):
        raise JobError("--checkpoints names a model twice; give each once")
    names = [PurePosixPath(checkpoint.rstrip("/")).name for checkpoint in checkpoints]
    names = [name.rsplit(".", 1)[0] if name.endswith((".safetensors", ".pth", ".pt")) else name for name in names]
    unique = [name if names.count(name) == 1 else f"{name}-{sha[:8]}" for name, sha in zip(names, sha256s, strict=True)]
    if len(set(unique)) < len(unique):
        raise JobError("two of --checkpoints have the same name and the same content; give one of them")
    return unique


def prepare_detections(config: EvaluateConfig) -> str:
    """Writes the detector's boxes by image, so that each worker reads its own part; returns where.

    Raises:
        LakeError: if the lake, the annotations or the results cannot be read, or do not belong together.
    """
    assert config.detections is not None
    image_ids = annotated_images(config)
    url = join(config.output, DETECTIONS_FILE)
    write_detections(url, read_results(config.detections, image_ids))
    return url


def annotated_images(config: EvaluateConfig) -> dict[str, Any]:
    """The annotation file's id of each image by the lake's ``image_id``.

    Raises:
        LakeError: if the lake or the annotations cannot be read, or do not belong together.
    """
    assert config.annotations is not None
    index = build_index(replace(config.index_config(), annotations=None, limit=None))
    return coco_image_ids(CocoFile.read(config.annotations), index)


def seconds_per_image(output: str) -> dict[str, float]:
    """Where a checkpoint's time went, by stage, in the run that computed the last of its rows."""
    record = read_run_record(output)
    if record is None or not record.extra.get("images_this_run"):
        return {}
    return {stage: round(seconds / record.extra["images_this_run"], 4) for stage, seconds in record.time_split.items()}


def write_results(
    config: EvaluateConfig, models: Mapping[str, tuple[str, str]], reductions: Mapping[str, Reduction]
) -> dict[str, Any]:
    """Writes ``results.json`` and ``results.md``.

    Args:
        config: of the run.
        models: checkpoint and its SHA-256 by label.
        reductions: by label.

    Returns:
        The content of ``results.json``.
    """
    results = {
        "evaluation": config.identity(),
        "datasets": {
            config.dataset(): dataset_results(
                config.lake,
                config.annotations,
                models,
                reductions,
                teacher=config.teacher,
                seconds_per_image={label: seconds_per_image(join(config.output, label)) for label in reductions},
            )
        },
    }
    text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_once(join(config.output, "results.json"), text.encode())
    write_once(join(config.output, "results.md"), to_markdown(results).encode())
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job; returns its exit code."""
    config = parse_config(EvaluateConfig, argv)
    started = time.monotonic()
    sha256s = [weights_sha256(checkpoint) for checkpoint in config.checkpoints]
    names = labels(config.checkpoints, sha256s)
    models = dict(zip(names, zip(config.checkpoints, sha256s, strict=True), strict=True))
    identity = config.identity()
    if config.protocol == "lvis":
        try:
            require_lvis()  # before hours of work rather than after them
        except LvisError as error:
            raise JobError(str(error)) from error
    detections_url = None if config.detections is None or config.dry_run else prepare_detections(config)
    jobs = []
    for label, (checkpoint, sha256) in models.items():
        make_worker: Callable[[Placement], ShardWorker] = partial(
            EvaluateWorker, config, checkpoint, sha256, detections_url
        )
        job = ShardJob(
            name=f"evaluate {label}",
            config=replace(config, output=join(config.output, label)),
            make_worker=make_worker,
            identity={"model": sha256, **identity},
        )
        jobs.append(job)
    codes = run_jobs("evaluate", jobs)
    if config.dry_run:
        return max(codes)

    lvis = None
    if config.protocol == "lvis":
        assert config.annotations is not None
        lvis = Lvis(dataset=read_lvis(config.annotations), image_ids=annotated_images(config))
    reductions = {}
    for label in models:
        error_console.print(f"reducing the scores of {label}", highlight=False)
        reductions[label] = reduce_scores(
            *read_scores(join(config.output, label)),
            max_detections=config.max_detections,
            bootstrap_samples=config.bootstrap_samples,
            ap_bootstrap_samples=config.ap_bootstrap_samples,
            lvis=lvis,
        )
    if not any(reduction.images for reduction in reductions.values()):
        raise JobError(
            f"none of the images in {config.lake} has ground truth: give --annotations, or a lake in SA-1B's layout"
        )
    results = write_results(config, models, reductions)
    RunRecord(
        job="evaluate",
        config=asdict(config),
        fingerprint=fingerprint({"models": dict(models), **identity}),
        counts=reductions[names[0]].statuses,
        seconds=round(time.monotonic() - started, 3),
        extra={"checkpoints": {label: join(config.output, label) for label in models}},
    ).write(config.output)
    write_report(ReportConfig(labels=config.output, output=join(config.output, "results.html")))
    console.print(Markdown(to_markdown(results)))
    return max(codes)


if __name__ == "__main__":
    from pipelines import evaluate  # Ray's workers find classes by their module, and have no __main__ like this one

    run_main(evaluate.main)
