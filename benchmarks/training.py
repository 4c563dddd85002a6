"""Distillation: images a second of the Ray job against a plain loop over the same tensors.

    python -m benchmarks.training --student demo_student --image-size 512 --crop-size 256

    python -m benchmarks.training --student vit_t --image-size 1024 --crop-size None --batch-size 8 --prompts 8 \\
        --max-rounds 9 --recompute decoder --loader-processes 8 --images 256 --workers 0 1       (on a GPU)

Everything is random: images, masks, the teacher's embeddings and all weights; only the time counts. The plain loop has
a few batches in memory and does nothing but the step; the job reads shards, decodes, logs and checkpoints. Variants
take turns, each in a fresh process, and medians are reported. Run it on an idle machine. Where Ray is not installed,
the plain loop and the job in its own process are measured, and the others left out. How much GPU memory Ray's workers
take is not seen from here; it is what the job in its own process takes.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.results import write_results

if TYPE_CHECKING:
    from pipelines.distill import DistillConfig
    from tinysam.distill.cache import Cache

PLAIN = "plain loop"
MASKS = 24  # of an image
WARM_UP = 2  # steps that do not count
IN_MEMORY = 4  # batches that the plain loop takes in turns


@dataclass(frozen=True, kw_only=True)
class TrainingBenchmark:
    """Speed of the training job."""

    student: str = "demo_student"
    """Architecture of the student and of the teacher's decoder."""
    image_size: int = 512
    """Side of the cached images in pixels."""
    crop_size: int | None = 256
    """Side of the training crops; None trains on whole images."""
    prompts: int = 16
    """Masks prompted in an image."""
    max_rounds: int = 0
    """Most refinements of the prompts. A step draws their number, which several workers draw for other images than one
    does: they compare exactly at 0, and otherwise over many steps."""
    batch_size: int = 4
    """Images a step and worker."""
    images: int = 128
    """Cached images."""
    epochs: int = 2
    """Passes over them in one measurement."""
    workers: tuple[int, ...] = (0, 1, 2)
    """Ray Train workers of the jobs to measure; 0 is the job in its own process."""
    cpus_per_worker: int = 1
    """Threads of each, and of the plain loop."""
    loader_processes: int = 1
    """Processes a worker that decode."""
    repeats: int = 3
    """Measurements of each variant."""
    precision: str = "bf16"
    """"bf16" or "fp32"."""
    recompute: str = "nothing"
    """As --trainer.recompute of the job."""
    output: Path | None = None
    """JSON file for the results."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One run of one variant."""

    images_per_second: float
    """After the warm-up."""
    waiting_share: float
    """Share of the time that training waited for data."""
    peak_gpu_mib: float
    """The most that tensors took; NaN without a GPU, and for Ray's workers."""


def write_cache(config: TrainingBenchmark, folder: str) -> None:
    """A cache of noise, and ``<folder>/teacher.safetensors``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipelines.common.models import weights_sha256
    from tinysam import sam_model_registry, save_checkpoint
    from tinysam.lake import schema
    from tinysam.lake.codecs import encode_embedding
    from tinysam.lake.images import encode_jpeg
    from tinysam.lake.rle import encode_rle
    from tinysam.lake.shards import SHARDS_FOLDER, write_shard

    rng, size = np.random.default_rng(0), config.image_size
    teacher_file = f"{folder}/teacher.safetensors"
    teacher = sam_model_registry[config.student](image_size=size)
    save_checkpoint(teacher, teacher_file)
    shape = (teacher.prompt_encoder.embed_dim, size // 16, size // 16)
    metadata = {
        "image_size": str(size),
        "embedding_shape": ",".join(map(str, shape)),
        "codec": "fp16",
        "teacher": teacher_file,
        "teacher_sha256": weights_sha256(teacher_file),
        "preprocessing": "noise",
    }

    def row(number: int) -> dict[str, Any]:
        masks = []
        for _ in range(MASKS):
            x, y, w, h = (int(v) for v in (*rng.integers(0, size * 3 // 4, 2), *rng.integers(16, size // 4, 2)))
            frame = np.zeros((size // 2, size // 2), bool)
            frame[y // 2 : (y + h) // 2, x // 2 : (x + w) // 2] = True
            masks.append({**encode_rle(frame), "bbox": [x, y, w, h], "area": float(w * h), "point_coords": []})
        return {
            "image_id": str(number),
            "uri": str(number),
            "height": size,
            "width": size,
            "input_height": size,
            "input_width": size,
            "status": schema.OK,
            # Coarse noise: a JPEG of about a photograph's size.
            "image": encode_jpeg(
                rng.integers(0, 256, (size // 8, size // 8, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
            ),
            "embedding": encode_embedding(rng.normal(size=shape).astype(np.float32), "fp16"),
            "masks": masks,
        }

    per_shard, ids = 16, []
    for number in range(max(1, config.images // per_shard)):
        rows = [row(number * per_shard + i) for i in range(per_shard)]
        table = pa.Table.from_pylist(rows, schema=schema.EMBEDDING)
        write_shard(f"{folder}/{SHARDS_FOLDER}", f"shard-{number:04d}", table, metadata)
        ids += [f"shard-{number:04d}"] * per_shard
    pq.write_table(pa.table({"shard_id": ids}), f"{folder}/index.parquet")


def job_flags(config: TrainingBenchmark, cache: str) -> list[str]:
    """Of pipelines/distill.py, but for its output and workers."""
    flags = {
        "cache": cache,
        "student": config.student,
        "trainer.epochs": config.epochs,
        "trainer.batch-size": config.batch_size,
        "trainer.precision": config.precision,
        "trainer.recompute": config.recompute,
        "trainer.loader-processes": config.loader_processes,
        "trainer.log-every-s": 0,
        "prompts.per-image": config.prompts,
        "prompts.max-rounds": config.max_rounds,
        "cpus-per-worker": config.cpus_per_worker,
        **({"samples.crop-size": config.crop_size} if config.crop_size is not None else {}),
    }
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))] + ["--fresh"]


def measure(config: TrainingBenchmark, cache: str, workers: int | None) -> Measurement:
    """Runs in a process of its own; ``workers`` None is the plain loop."""
    return plain_loop(config, cache) if workers is None else job(config, cache, workers)


def peak_gpu_mib() -> float:
    """Of this process."""
    import torch

    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else float("nan")


def job(config: TrainingBenchmark, cache: str, workers: int) -> Measurement:
    """The job's own history tells its speed from the end of the warm-up to its last step."""
    from pipelines import distill
    from tinysam.distill.history import read_history, throughput

    with tempfile.TemporaryDirectory() as output:
        distill.main([*job_flags(config, cache), "--output", output, "--num-workers", str(workers)])
        lines = [line for line in read_history(f"{output}/history.csv") if "loss" in line][WARM_UP - 1 :]
    steps, seconds = lines[-1]["step"] - lines[0]["step"], lines[-1]["time"] - lines[0]["time"]
    return Measurement(
        images_per_second=steps * config.batch_size * max(workers, 1) / seconds,
        waiting_share=throughput(lines[1:])[1],
        peak_gpu_mib=float("nan") if workers else peak_gpu_mib(),
    )


def plain_loop(config: TrainingBenchmark, cache: str) -> Measurement:
    """The steps and arithmetic of the job in its own process, and nothing else."""
    import torch
    from torch import nn
    from torch.optim.swa_utils import AveragedModel

    from pipelines.common.cli import parse_config
    from pipelines.distill import DistillConfig
    from tinysam import load
    from tinysam.distill.cache import open_cache
    from tinysam.distill.groups import Group
    from tinysam.distill.loading import Reading, load_batches
    from tinysam.distill.memory import recompute_blocks
    from tinysam.distill.optimizer import moving_average, parameter_groups
    from tinysam.distill.step import DistillationLoss
    from tinysam.distill.student import build_student
    from tinysam.distill.trainer import seeded_generator

    job = parse_config(DistillConfig, [*job_flags(config, cache), "--output", "unused"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(config.cpus_per_worker)
    opened = open_cache([cache])
    teacher = load(opened.teacher)
    student = build_student(config.student, opened, teacher, fresh=True).train()
    recompute = job.trainer.recompute != "nothing"
    loss_module = DistillationLoss(student, teacher, job.losses, job.prompts, recompute_rounds=recompute).to(device)
    student.image_encoder.to(memory_format=torch.channels_last)
    average = AveragedModel(student, multi_avg_fn=moving_average(job.optimizer.ema_decay), use_buffers=True)
    if job.trainer.recompute == "all":
        recompute_blocks(student.image_encoder)
    optimizer = torch.optim.AdamW(parameter_groups(student, job.optimizer.weight_decay), lr=1e-4, fused=True)
    autocast = torch.autocast(device, torch.bfloat16, enabled=config.precision == "bf16")
    group = Group(offset=0, shards=tuple(range(len(opened.shards))), steps=IN_MEMORY)
    reading = Reading(groups=[group], samples=job.samples, prompts=config.prompts, batch_size=config.batch_size)
    batches = itertools.cycle([batch.to(device) for batch in load_batches(opened, reading, processes=0)])
    own = seeded_generator((0,), device)
    steps = list(refinements(job, opened))
    start = time.perf_counter()
    for number, (drawn, batch) in enumerate(zip(steps, batches, strict=False)):
        if number == WARM_UP:
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss_module(batch, drawn, own, autocast)[0].backward()
        nn.utils.clip_grad_norm_(student.parameters(), job.optimizer.clip_norm)
        optimizer.step()
        average.update_parameters(student)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    images = (len(steps) - WARM_UP) * config.batch_size
    return Measurement(images_per_second=images / seconds, waiting_share=0.0, peak_gpu_mib=peak_gpu_mib())


def refinements(job: DistillConfig, cache: Cache) -> Iterator[list[bool]]:
    """What the job with one worker draws for each of its steps."""
    from tinysam.distill.groups import epoch_order, make_groups
    from tinysam.distill.prompts import draw_refinements
    from tinysam.distill.trainer import seeded_generator

    for epoch in range(job.trainer.epochs):
        groups = make_groups(
            epoch_order(len(cache.shards), job.trainer.seed, epoch),
            [shard.images for shard in cache.shards],
            done=0,
            group_shards=job.trainer.group_shards,
            images_per_step=job.trainer.batch_size,
        )
        for group in groups:
            generator = seeded_generator((job.trainer.seed, epoch, group.offset), "cpu")
            for _ in range(group.steps):
                yield draw_refinements(job.prompts, generator)


def main() -> None:
    """Measures, prints a table, and writes the results."""
    config = tyro.cli(TrainingBenchmark, description=__doc__)
    workers = [number for number in config.workers if number == 0 or importlib.util.find_spec("ray") is not None]
    if len(workers) < len(config.workers):
        Console(stderr=True).print("Ray is not installed here: its workers are left out")
    variants: list[int | None] = [None, *workers]
    results: dict[int | None, list[Measurement]] = {variant: [] for variant in variants}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as cache:
        write_cache(config, cache)
        for _ in range(config.repeats):
            for variant in variants:
                with ProcessPoolExecutor(1, mp_context=context) as pool:
                    results[variant].append(pool.submit(measure, config, cache, variant).result())
    rows = [summarise(variant, measured, results[None]) for variant, measured in results.items()]
    table = Table("variant", "images/s", "of the plain loop", "waiting", "peak GPU MiB", title=config.student)
    for row in rows:
        table.add_row(
            row["variant"],
            f"{row['images_per_second']:.2f}",
            f"{row['share_of_plain']:.0%}",
            f"{row['waiting_share']:.1%}",
            "" if math.isnan(row["peak_gpu_mib"]) else f"{row['peak_gpu_mib']:.0f}",
        )
    Console().print(table)
    if config.output is not None:
        write_results(config.output, config, rows)


def summarise(variant: int | None, measured: list[Measurement], plain: list[Measurement]) -> dict[str, Any]:
    """Medians of one variant."""

    def median(name: str, of: list[Measurement]) -> float:
        return statistics.median(getattr(one, name) for one in of)

    return {
        "variant": PLAIN if variant is None else f"job, {variant} Ray workers" if variant else "job, in process",
        "images_per_second": median("images_per_second", measured),
        "share_of_plain": median("images_per_second", measured) / median("images_per_second", plain),
        "waiting_share": median("waiting_share", measured),
        "peak_gpu_mib": median("peak_gpu_mib", measured),
    }


if __name__ == "__main__":
    main()
