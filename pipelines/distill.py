"""Distils a student from cached teacher embeddings, or trains one on ground truth alone, across workers.

    python pipelines/distill.py --cache s3://bucket/cache --output s3://bucket/student --student vit_t

The cache is what pipelines/cache_teacher.py wrote. Running the same command again goes on from the newest checkpoint.
The result is ``<output>/student.safetensors``, with ``history.csv`` and ``run.json`` beside it.
"""

from __future__ import annotations

import csv
import io
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found without an installation, and first of all

import numpy as np
import torch
from rich.table import Table
from segment_anything.modeling import Sam

from pipelines.common.cli import EXIT_OK, EXIT_TOO_MANY_ERRORS, JobError, console, error_console, parse_config, run_main
from pipelines.common.models import weights_sha256
from tinysam import load, sam_model_registry, save_checkpoint
from tinysam.distill.cache import Cache, GroupSamples, open_cache
from tinysam.distill.losses import LossConfig
from tinysam.distill.prompts import PromptConfig
from tinysam.distill.samples import Sample, SampleConfig
from tinysam.distill.trainer import OptimizerConfig, Trainer, TrainerConfig
from tinysam.lake import schema
from tinysam.lake.filesystem import exists, join, open_filesystem, read_bytes, write_once
from tinysam.lake.fingerprint import fingerprint
from tinysam.lake.run_record import RunRecord, check_same_run, read_run_record

NO_TEACHER = "none"
STUDENT_FILE = "student.safetensors"
HISTORY_FILE = "history.csv"
CHECKPOINTS_FOLDER = "checkpoints"


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Trains a student from caches of teacher embeddings."""

    cache: tuple[str, ...]
    """Outputs of pipelines/cache_teacher.py: folders or URLs."""
    output: str
    """Folder or URL of the student, its checkpoints and its history."""
    repeat: tuple[int, ...] = ()
    """How often an epoch shows each of the caches; once each if left out."""
    validation_cache: tuple[str, ...] = ()
    """Caches that are only looked at: box and one-click IoU at each checkpoint."""
    validation_images: int = 48
    """Images drawn from each validation cache."""
    student: str = "vit_t"
    """What to train: a model's name (random weights), or a checkpoint to go on from."""
    teacher: str | None = None
    """Whose decoder teaches, a name or a checkpoint; it has to be the one that made the cache. "none" trains on ground
    truth alone. None: the teacher that the cache names, or ground truth alone where it has no embeddings."""
    init_decoder: bool = True
    """Start from the teacher's prompt encoder and mask decoder, where the student begins with random weights."""
    limit: int | None = None
    """Only as many shards as hold this many images."""
    num_workers: int = 0
    """Ray Train workers; 0 trains in this process, without a cluster."""
    use_gpu: bool | None = None
    """One GPU for each worker. None: if the first of them sees one."""
    cpus_per_worker: int = 2
    """CPUs that each worker reserves, its loader's process included."""
    max_failures: int = 3
    """How often a run starts over from its newest checkpoint after workers died; -1 for ever."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    samples: SampleConfig = field(default_factory=SampleConfig)
    max_error_rate: float = 0.05
    """Refuse a cache of whose images a larger part failed, and exit with code 3."""
    ray_address: str | None = None
    """Ray cluster to join. None: RAY_ADDRESS or the cluster that this job was submitted to, else this machine."""
    overwrite: bool = False
    """Start over, even if the output holds another run."""
    dry_run: bool = False
    """Only say what there is to do."""

    def __post_init__(self) -> None:
        if not self.cache:
            raise ValueError("--cache needs at least one folder")
        if self.limit is not None and self.limit < 1:
            raise ValueError("--limit must be at least 1")
        if self.num_workers < 0:
            raise ValueError("--num-workers must not be negative")
        if not 0 <= self.max_error_rate <= 1:
            raise ValueError("--max-error-rate must be between 0 and 1")

    def identity(self) -> dict[str, Any]:
        """What two runs have in common of which one may continue the other."""
        names = ("cache", "repeat", "limit", "init_decoder", "trainer", "optimizer", "losses", "prompts", "samples")
        return {name: getattr(self, name) for name in names}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job; returns its exit code."""
    config = parse_config(DistillConfig, argv)
    cache = _limited(open_cache(config.cache, config.repeat), config.limit)
    teacher_name = _teacher_name(config, cache)
    _check_teacher(teacher_name, cache)
    if cache.embedding_shape is not None and config.samples.alters_pixels:
        raise JobError(
            "the cached embeddings belong to unaltered pixels; leave --samples.flip, --samples.color-jitter and the "
            "zoom out, or train on ground truth alone from a cache made with --teacher none"
        )
    if _error_rate(config.cache) > config.max_error_rate:
        error_console.print(f"more than {config.max_error_rate:.0%} of the cached images failed: see their run.json")
        return EXIT_TOO_MANY_ERRORS
    mark = fingerprint({"job": "distill", "student": config.student, "teacher": teacher_name, **config.identity()})
    if not config.overwrite:
        check_same_run(config.output, mark)
    if config.dry_run:
        _print_plan(config, cache, teacher_name)
        return EXIT_OK
    if config.overwrite:
        _delete(config.output)
    if exists(join(config.output, STUDENT_FILE)):
        console.print(f"{join(config.output, STUDENT_FILE)} is finished; --overwrite trains it again")
        return EXIT_OK

    started = time.monotonic()
    _write_record(config, mark, cache, seconds=0.0, finished=False)
    arguments = {"config": config, "cache": cache, "teacher": teacher_name}
    _run_workers(config, arguments)
    _write_record(config, mark, cache, seconds=time.monotonic() - started, finished=True)
    _print_summary(config, time.monotonic() - started)
    return EXIT_OK


def _run_workers(config: DistillConfig, arguments: dict[str, Any]) -> None:
    # Ray Train's import takes seconds that a dry run and a wrong flag need not wait for.
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from pipelines.common.ray_setup import start_ray

    use_gpu = config.use_gpu
    if config.num_workers > 0:
        from pipelines.common.ray_setup import cluster_total

        start_ray(config.ray_address)
        use_gpu = cluster_total("GPU") >= 1 if use_gpu is None else use_gpu
    use_gpu = torch.cuda.is_available() if use_gpu is None else use_gpu
    resources = {"CPU": config.cpus_per_worker, **({"GPU": 1} if use_gpu else {})}
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={**arguments, "device": "cuda" if use_gpu else "cpu"},
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=use_gpu,
            resources_per_worker=resources if config.num_workers else None,
        ),
        # Checkpoints are ours (tinysam.distill.progress): readable without Ray, on any storage. Ray only restarts.
        run_config=RunConfig(failure_config=FailureConfig(max_failures=config.max_failures)),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise JobError(f"training failed; after a remedy, the same command goes on from here\n{error}") from error


def train_worker(arguments: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    import ray.train

    config: DistillConfig = arguments["config"]
    cache: Cache = arguments["cache"]
    device: Literal["cpu", "cuda"] = arguments["device"]
    context = ray.train.get_context()
    torch.manual_seed(config.trainer.seed)
    if device == "cpu":
        torch.set_num_threads(config.cpus_per_worker)
    teacher = None if arguments["teacher"] == NO_TEACHER else load(arguments["teacher"])
    student = _build_student(config, cache, teacher)
    history = History(join(config.output, HISTORY_FILE))
    trainer = Trainer(
        student,
        teacher,
        cache,
        trainer=config.trainer,
        optimizer=config.optimizer,
        losses=config.losses,
        prompts=config.prompts,
        samples=config.samples,
        validation=_validation_batches(config, cache),
        checkpoints_url=join(config.output, CHECKPOINTS_FOLDER),
        on_log=history.append,
        on_checkpoint=ray.train.report,
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=device,
    )
    trainer.run()
    if context.get_world_rank() == 0:
        metadata = {"teacher": arguments["teacher"], "teacher_sha256": cache.teacher_sha256}
        save_checkpoint(trainer.averaged_student, join(config.output, STUDENT_FILE), metadata)


class History:
    """``history.csv``: one line for each log of the trainer, kept whole on any storage."""

    COLUMNS = (
        *("time", "step", "total_steps", "epoch", "loss", "embedding", "token", "output", "focal", "dice", "iou"),
        *("learning_rate", "images_per_second", "waiting_share", "val_box", "val_click", "val_click_best"),
    )

    def __init__(self, url: str) -> None:
        self._url = url
        self._lines: list[dict[str, Any]] = []
        if exists(url):
            self._lines = list(csv.DictReader(io.StringIO(read_bytes(url).decode())))

    def append(self, line: dict[str, float]) -> None:
        """Adds a line, shows it, and writes the file."""
        rounded = {name: float(f"{value:.6g}") for name, value in line.items()}
        self._lines.append({"time": round(time.time(), 1), **rounded})
        text = io.StringIO()
        writer = csv.DictWriter(text, self.COLUMNS)
        writer.writeheader()
        writer.writerows(self._lines)
        write_once(self._url, text.getvalue().encode())
        error_console.print(
            "  ".join(f"{name} {value:.4g}" for name, value in rounded.items()), highlight=False, soft_wrap=True
        )


def _build_student(config: DistillConfig, cache: Cache, teacher: Sam | None) -> Sam:
    if config.student not in sam_model_registry:
        student = load(config.student)
    else:
        student = sam_model_registry[config.student](image_size=cache.image_size)
        if config.init_decoder and teacher is not None and teacher.config.prompt_embed_dim == _embed_dim(student):
            student.prompt_encoder.load_state_dict(teacher.prompt_encoder.state_dict())
            student.mask_decoder.load_state_dict(teacher.mask_decoder.state_dict())
    if student.image_encoder.img_size != cache.image_size:
        raise JobError(
            f"the student {config.student} works at {student.image_encoder.img_size} pixels, the cache at "
            f"{cache.image_size}; cache the lake with --image-size {student.image_encoder.img_size}"
        )
    if cache.embedding_shape is not None and _embed_dim(student) != cache.embedding_shape[0]:
        raise JobError(
            f"the student {config.student} has embeddings of {_embed_dim(student)} channels, the cache of "
            f"{cache.embedding_shape[0]}; choose a student of the teacher's width"
        )
    return student


def _embed_dim(sam: Sam) -> int:
    return sam.prompt_encoder.embed_dim


def _validation_batches(config: DistillConfig, cache: Cache) -> list[Sample]:
    batches: list[Sample] = []
    for url in config.validation_cache:
        held_out = open_cache([url])
        if held_out.image_size != cache.image_size:
            raise JobError(f"{url} is cached at {held_out.image_size} pixels, the training set at {cache.image_size}")
        samples = GroupSamples(
            held_out,
            [shard.url for shard in held_out.shards],
            config=SampleConfig(),
            prompts=32,
            count=config.validation_images,
            seed=[0],
        )
        batches += [Sample.stack([sample]) for sample in samples]
    return batches


def _limited(cache: Cache, limit: int | None) -> Cache:
    if limit is None:
        return cache
    before = np.cumsum([0, *(shard.images for shard in cache.shards)])[:-1]
    shards = tuple(shard for shard, images in zip(cache.shards, before, strict=True) if images < limit)
    return Cache(**{**_fields(cache), "shards": shards})


def _fields(cache: Cache) -> dict[str, Any]:
    return {name: getattr(cache, name) for name in Cache.__dataclass_fields__}


def _teacher_name(config: DistillConfig, cache: Cache) -> str:
    if cache.embedding_shape is None:
        if config.teacher not in (None, NO_TEACHER):
            raise JobError(
                f"--teacher {config.teacher} needs a cache with its embeddings; {config.cache[0]} holds none. "
                f"Run pipelines/cache_teacher.py --teacher {config.teacher}."
            )
        return NO_TEACHER
    return config.teacher or cache.teacher


def _check_teacher(teacher: str, cache: Cache) -> None:
    if teacher != NO_TEACHER and weights_sha256(teacher) != cache.teacher_sha256:
        raise JobError(
            f"{teacher} is not the teacher that made the cache's embeddings (its checksum differs). "
            "Give that one as --teacher, or cache again."
        )


def _error_rate(urls: Sequence[str]) -> float:
    records = [record for url in urls if (record := read_run_record(url)) is not None]
    counts = [(sum(record.counts.values()), record.counts.get(schema.OK, 0)) for record in records]
    images, ok = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
    return 1 - ok / images if images else 0.0


def _delete(output: str) -> None:
    fs, path = open_filesystem(output)
    for name in (STUDENT_FILE, HISTORY_FILE, CHECKPOINTS_FOLDER, "run.json"):
        if exists(join(output, name)):
            fs.rm(f"{path}/{name}", recursive=True)


def _write_record(config: DistillConfig, mark: str, cache: Cache, *, seconds: float, finished: bool) -> None:
    images = config.trainer.epochs * sum(shard.images for shard in cache.shards)
    RunRecord(
        job="distill",
        config=asdict(config),
        fingerprint=mark,
        counts={schema.OK: sum(shard.images for shard in cache.shards)},
        seconds=round(seconds, 3),
        images_per_second=round(images / seconds, 3) if seconds else 0.0,
        time_split={},
        extra={"finished": finished, "image_views": images},
    ).write(config.output)


def _print_plan(config: DistillConfig, cache: Cache, teacher: str) -> None:
    table = Table(show_header=False, title=f"distill: dry run, nothing was written to {config.output}")
    table.add_row("student", config.student)
    table.add_row("teacher", teacher)
    table.add_row("images", f"{sum(shard.images for shard in cache.shards)} in {len(cache.shards)} shards")
    table.add_row("epochs", str(config.trainer.epochs))
    table.add_row("workers", str(config.num_workers) if config.num_workers else "in this process")
    console.print(table)


def _print_summary(config: DistillConfig, seconds: float) -> None:
    lines = list(csv.DictReader(io.StringIO(read_bytes(join(config.output, HISTORY_FILE)).decode())))
    table = Table(show_header=False, title=f"distill: {join(config.output, STUDENT_FILE)}")
    table.add_row("time", f"{seconds / 60:.1f} min")
    last: dict[str, str] = {}
    for line in lines:
        last |= {name: value for name, value in line.items() if value}
    for name in ("step", "loss", "images_per_second", "waiting_share", "val_box", "val_click", "val_click_best"):
        if name in last:
            table.add_row(name, last[name])
    console.print(table)


if __name__ == "__main__":
    run_main(main)
