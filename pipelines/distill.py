"""Distils a student from cached teacher embeddings, or trains one on ground truth alone, across workers.

    python pipelines/distill.py --cache s3://bucket/cache --output s3://bucket/student --student vit_t

The cache is what pipelines/cache_teacher.py wrote. Running the same command again goes on from the newest checkpoint.
The result is ``<output>/student.safetensors``, with ``history.csv``, ``curves.html`` and ``run.json`` beside it, and
the weights that did best in validation in ``checkpoints/best.safetensors``. ``--config pipelines/recipes/tinysam.yaml``
asks for the paper's recipe.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found without an installation, and first of all

import torch
from rich.table import Table
from segment_anything.modeling import Sam

from pipelines.common.cli import EXIT_OK, EXIT_TOO_MANY_ERRORS, JobError, console, error_console, parse_config, run_main
from pipelines.common.models import weights_sha256
from tinysam import load, save_checkpoint
from tinysam.distill.cache import Cache, open_cache
from tinysam.distill.curves import CURVES_FILE, curves_page
from tinysam.distill.difficulty import MiningConfig
from tinysam.distill.history import HISTORY_FILE, Follower, History, read_history, throughput
from tinysam.distill.losses import LossConfig
from tinysam.distill.optimizer import OptimizerConfig
from tinysam.distill.progress import BEST
from tinysam.distill.prompts import PromptConfig
from tinysam.distill.samples import SampleConfig
from tinysam.distill.student import build_student, check_own_embeddings
from tinysam.distill.teacher_masks import TeacherMaskConfig
from tinysam.distill.trainer import NonFiniteLossError, Trainer, TrainerConfig
from tinysam.distill.validation import SCORES, validation_batches
from tinysam.lake import schema
from tinysam.lake.filesystem import LakeError, exists, join, open_filesystem, write_once
from tinysam.lake.fingerprint import fingerprint
from tinysam.lake.run_record import RUN_FILE, RunRecord, check_same_run, read_run_record
from tinysam.modeling.checkpoint import CheckpointError, is_untrained

NO_TEACHER = "none"
STUDENT_FILE = "student.safetensors"
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
    """What to train: a model's name or a checkpoint. Where it has weights (checkpoints, and the models that ship with
    the project) training goes on from them."""
    fresh: bool = False
    """Take only the student's architecture, and begin with random weights."""
    teacher: str | None = None
    """Whose decoder teaches, a name or a checkpoint; it has to be the one that made the cache. "none" trains on ground
    truth alone. None: the teacher that the cache names, or ground truth alone where it has no embeddings or
    --trainer.freeze-encoder."""
    init_decoder: bool = True
    """Start from the teacher's prompt encoder and mask decoder, where the student begins with random weights."""
    limit: int | None = None
    """Only as many shards as hold this many images."""
    num_workers: int = 0
    """Ray Train workers; 0 trains in this process, without a cluster."""
    min_workers: int | None = None
    """Train with as few workers as this where the cluster has no room for --num-workers, and with more once it has.
    A change of their number goes on from the newest checkpoint. None: wait for all."""
    use_gpu: bool | None = None
    """One GPU for each worker. None: if the cluster, or without workers this machine, has one."""
    cpus_per_worker: int = 2
    """CPUs that each worker reserves, its loader's process included."""
    max_failures: int = 3
    """How often a run goes on from its newest checkpoint after workers died; -1 for ever. Bad shards, checkpoints that
    do not fit and losses that are no number stop it at once."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    samples: SampleConfig = field(default_factory=SampleConfig)
    teacher_masks: TeacherMaskConfig = field(default_factory=TeacherMaskConfig)
    mining: MiningConfig = field(default_factory=MiningConfig)
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
        if self.min_workers is not None and not 1 <= self.min_workers <= self.num_workers:
            raise ValueError("--min-workers must lie between 1 and --num-workers")
        if self.validation_images < 1 or self.cpus_per_worker < 1 or self.max_failures < -1:
            raise ValueError("--validation-images and --cpus-per-worker must be at least 1, --max-failures at least -1")
        if self.trainer.freeze_encoder and (self.losses.dense > 0 or not self.losses.needs_prompts):
            raise ValueError("--trainer.freeze-encoder leaves --losses.dense and --losses.embedding nothing to train")
        if not 0 <= self.max_error_rate <= 1:
            raise ValueError("--max-error-rate must be between 0 and 1")

    def identity(self) -> dict[str, Any]:
        """What two runs have in common of which one may continue the other; models go by their content."""
        names = (
            *("cache", "repeat", "limit", "fresh", "init_decoder", "optimizer", "losses", "prompts", "samples"),
            *("teacher_masks", "mining"),
        )
        student = self.student if is_untrained(self.student) else weights_sha256(self.student)
        decisive = {name: getattr(self, name) for name in names}
        return {"student": student, "trainer": self.trainer.decisive(), **decisive}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job; returns its exit code."""
    config = parse_config(DistillConfig, argv)
    cache = open_cache(config.cache, config.repeat)
    if config.limit is not None:
        cache = cache.limited(config.limit)
    teacher = _teacher_name(config, cache)
    _check_teacher(teacher, cache)
    if cache.embedding_shape is not None and config.samples.alters_pixels:
        raise JobError(
            "the cached embeddings belong to unaltered pixels; leave --samples.flip, --samples.color-jitter and the "
            "zoom out, or train on ground truth alone from a cache made with --teacher none"
        )
    if _error_rate(config.cache) > config.max_error_rate:
        error_console.print(f"more than {config.max_error_rate:.0%} of the cached images failed: see their run.json")
        return EXIT_TOO_MANY_ERRORS
    models = {"teacher": NO_TEACHER if teacher == NO_TEACHER else cache.teacher_sha256, "cached": cache.teacher_sha256}
    identity = config.identity()
    mark = fingerprint({"job": "distill", **models, **identity})
    if not config.overwrite:
        check_same_run(config.output, mark)
    if config.dry_run:
        _print_plan(config, cache, teacher)
        return EXIT_OK
    # Built here as well, so that what does not fit is said here and now.
    student = build_student(config.student, cache, None, fresh=config.fresh)
    made_the_cache = identity["student"] == cache.teacher_sha256 and not config.fresh
    if config.trainer.freeze_encoder and not made_the_cache:
        _check_encoder(config.student, student, cache)
    if config.overwrite:
        _delete(config.output)
    if exists(join(config.output, STUDENT_FILE)):
        console.print(f"{join(config.output, STUDENT_FILE)} is finished; --overwrite trains it again")
        return EXIT_OK

    started = time.monotonic()
    _write_record(config, mark, cache, seconds=0.0, finished=False)
    history = join(config.output, HISTORY_FILE)
    with Follower(history, _show, every_s=max(1.0, config.trainer.log_every_s)):
        if config.num_workers > 0:
            _train_on_ray(config, cache, teacher)
        else:
            _train_here(config, cache, teacher)
    page = curves_page(f"distill: {config.output}", read_history(history))
    write_once(join(config.output, CURVES_FILE), page.encode())
    _write_record(config, mark, cache, seconds=time.monotonic() - started, finished=True)
    _print_summary(config, time.monotonic() - started)
    return EXIT_OK


def _show(line: str) -> None:
    error_console.print(line, markup=False, highlight=False, soft_wrap=True)


def _train_here(config: DistillConfig, cache: Cache, teacher: str) -> None:
    """Trains in this process, without Ray."""
    use_gpu = torch.cuda.is_available() if config.use_gpu is None else config.use_gpu
    try:
        train(config, cache, teacher, device="cuda" if use_gpu else "cpu")
    except NonFiniteLossError as error:
        raise JobError(str(error)) from error


def _train_on_ray(config: DistillConfig, cache: Cache, teacher: str) -> None:
    # Ray Train's import takes seconds that a dry run and a wrong flag need not wait for.
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

    from pipelines.common.ray_setup import cluster_total, start_ray

    start_ray(config.ray_address)
    use_gpu = cluster_total("GPU") >= 1 if config.use_gpu is None else config.use_gpu
    resources = {"CPU": config.cpus_per_worker, **({"GPU": 1} if use_gpu else {})}
    elastic = (config.min_workers, config.num_workers)
    failures = 0
    while True:
        # Checkpoints are ours (tinysam.distill.progress): readable without Ray, on any storage. So is starting over,
        # as Ray would also repeat what fails in the same way each time.
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={
                "config": config,
                "cache": cache,
                "teacher": teacher,
                "device": "cuda" if use_gpu else "cpu",
            },
            scaling_config=ScalingConfig(
                num_workers=elastic if config.min_workers is not None else config.num_workers,
                use_gpu=use_gpu,
                resources_per_worker=resources,
            ),
        )
        try:
            trainer.fit()
            return
        except WorkerGroupError as error:
            _raise_if_hopeless(error.worker_failures.values())
            failures += 1
            if failures > config.max_failures >= 0:
                raise JobError(f"workers died {failures} times; the same command goes on from here\n{error}") from error
            _show(f"distill: workers died ({failures} of {config.max_failures} failures); going on from the checkpoint")
        except TrainingFailedError as error:
            raise JobError(f"training failed; after a remedy, the same command goes on from here\n{error}") from error


def _raise_if_hopeless(failures: Iterable[Exception]) -> None:
    """Raises what workers would meet again; the others only noticed that those were gone."""
    hopeless = (LakeError, CheckpointError, NonFiniteLossError)
    messages = dict.fromkeys(str(failure) for failure in failures if isinstance(failure, hopeless))
    if messages:
        raise JobError("\n".join(messages))


def train_worker(arguments: dict[str, Any]) -> None:
    """What each Ray Train worker runs: :func:`train` with these arguments, in its place."""
    import ray.train

    context = ray.train.get_context()
    train(
        **arguments,
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        on_checkpoint=ray.train.report,
    )


def train(
    config: DistillConfig,
    cache: Cache,
    teacher: str,
    *,
    device: Literal["cpu", "cuda"],
    rank: int = 0,
    world_size: int = 1,
    on_checkpoint: Callable[[dict[str, float]], None] = lambda scores: None,
) -> None:
    """Trains as one of ``world_size`` workers; the first of them writes the history and, at the end, the student.

    Args:
        teacher: a model's name or checkpoint, or ``NO_TEACHER``.
        on_checkpoint: as of :class:`Trainer`, whose errors this raises.
    """
    torch.manual_seed(config.trainer.seed)
    if device == "cpu":
        torch.set_num_threads(config.cpus_per_worker)
    teacher_model = None if teacher == NO_TEACHER else load(teacher)
    if teacher_model is not None:
        # What it would say is in the cache, and SAM-H's takes 2.5 GB.
        teacher_model.image_encoder = torch.nn.Identity()
    student = build_student(config.student, cache, teacher_model if config.init_decoder else None, fresh=config.fresh)
    is_first = rank == 0
    history = History(join(config.output, HISTORY_FILE))
    trainer = Trainer(
        student,
        teacher_model,
        cache,
        trainer=config.trainer,
        optimizer=config.optimizer,
        losses=config.losses,
        prompts=config.prompts,
        samples=config.samples,
        teacher_masks=config.teacher_masks,
        mining=config.mining,
        validation=validation_batches(
            config.validation_cache if is_first else (), images=config.validation_images, image_size=cache.image_size
        ),
        checkpoints_url=join(config.output, CHECKPOINTS_FOLDER),
        on_log=history.append,
        on_checkpoint=on_checkpoint,
        rank=rank,
        world_size=world_size,
        device=device,
    )
    trainer.run()
    if is_first:
        history.flush()
        metadata = {"teacher": teacher, "teacher_sha256": cache.teacher_sha256, "precision": trainer.precision}
        save_checkpoint(trainer.averaged_student, join(config.output, STUDENT_FILE), metadata)


def _teacher_name(config: DistillConfig, cache: Cache) -> str:
    if cache.embedding_shape is None:
        if config.teacher not in (None, NO_TEACHER):
            raise JobError(
                f"--teacher {config.teacher} needs a cache with its embeddings; {config.cache[0]} holds none. "
                f"Run pipelines/cache_teacher.py --teacher {config.teacher}."
            )
        return NO_TEACHER
    return config.teacher or (NO_TEACHER if config.trainer.freeze_encoder else cache.teacher)


def _check_teacher(teacher: str, cache: Cache) -> None:
    if teacher != NO_TEACHER and weights_sha256(teacher) != cache.teacher_sha256:
        raise JobError(
            f"{teacher} is not the teacher that made the cache's embeddings (its checksum differs). "
            "Give that one as --teacher, or cache again."
        )


def _check_encoder(name: str, student: Sam, cache: Cache) -> None:
    """Checks that a student from another file than the one that made the cache has its image encoder still."""
    if cache.embedding_shape is not None and weights_sha256(cache.teacher) != cache.teacher_sha256:
        raise JobError(
            f"{cache.teacher} has changed since it made the cache: it cannot tell whether {name} has the same encoder. "
            f"Cache the lake with pipelines/cache_teacher.py --teacher {name}."
        )
    check_own_embeddings(student, name, cache)


def _error_rate(urls: Sequence[str]) -> float:
    records = [record for url in urls if (record := read_run_record(url)) is not None]
    counts = [(sum(record.counts.values()), record.counts.get(schema.OK, 0)) for record in records]
    images, ok = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
    return 1 - ok / images if images else 0.0


def _delete(output: str) -> None:
    fs, path = open_filesystem(output)
    for name in (STUDENT_FILE, HISTORY_FILE, CURVES_FILE, CHECKPOINTS_FOLDER, RUN_FILE):
        if exists(join(output, name)):
            fs.rm(f"{path}/{name}", recursive=True)


def _write_record(config: DistillConfig, mark: str, cache: Cache, *, seconds: float, finished: bool) -> None:
    images_per_second, waiting = throughput(read_history(join(config.output, HISTORY_FILE)))
    RunRecord(
        job="distill",
        config=asdict(config),
        fingerprint=mark,
        counts={schema.OK: cache.images},
        seconds=round(seconds, 3),
        images_per_second=round(images_per_second, 3),
        time_split={"training": round(seconds * (1 - waiting), 3), "waiting for data": round(seconds * waiting, 3)},
        extra={"finished": finished, "image_views": config.trainer.epochs * cache.images},
    ).write(config.output)


def _print_plan(config: DistillConfig, cache: Cache, teacher: str) -> None:
    table = Table(show_header=False, title=f"distill: dry run, nothing was written to {config.output}")
    table.add_row("student", config.student)
    table.add_row("teacher", teacher)
    table.add_row("images", f"{cache.images} in {len(cache.shards)} shards")
    table.add_row("epochs", str(config.trainer.epochs))
    table.add_row("workers", str(config.num_workers) if config.num_workers else "in this process")
    console.print(table)


def _print_summary(config: DistillConfig, seconds: float) -> None:
    lines = read_history(join(config.output, HISTORY_FILE))
    images_per_second, waiting = throughput(lines)
    table = Table(show_header=False, title=f"distill: {join(config.output, STUDENT_FILE)}")
    table.add_row("time", f"{seconds / 60:.1f} min")
    table.add_row("speed", f"{images_per_second:.3g} images/s, {waiting:.1%} of the time waiting for data")
    last = {name: value for line in lines for name, value in line.items()}
    for name in ("step", "loss", *(f"val_{score}" for score in SCORES)):
        if name in last:
            table.add_row(name, f"{last[name]:.5g}")
    table.add_row("curves", join(config.output, CURVES_FILE))
    if config.validation_cache:
        table.add_row("best in validation", join(config.output, CHECKPOINTS_FOLDER, BEST))
    console.print(table)


if __name__ == "__main__":
    run_main(main)
