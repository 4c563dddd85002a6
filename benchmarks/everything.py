"""Everything mode: segment-anything's own generator against this project's, on photographs.

    python -m benchmarks.everything --photographs a.jpg b.jpg --checkpoint mobile_sam.pt

Every measurement is a fresh process that loads the model, warms up on a thumbnail, and segments one photograph; the
variants take turns, and medians are reported. On a CPU, speed is the ratio of CPU seconds. Agreement compares masks
with those of the reference. Run it on an idle machine; fewer ``--points-per-side`` give the same cost a point sooner.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.results import write_results
from tinysam.everything.config import PRECISIONS, PRESETS
from tinysam.runtime.choice import EngineChoice

REFERENCE = "segment-anything"
VARIANTS = (
    REFERENCE,
    *(f"{grid} {precision}" for grid in ("flat", *PRESETS) for precision in PRECISIONS),
)


@dataclass(frozen=True, kw_only=True)
class EverythingBenchmark:
    """Time, memory and agreement of everything mode."""

    photographs: tuple[Path, ...]
    """Images to segment."""

    checkpoint: str = "demo_student"
    """What tinysam.load takes, or the name of an architecture, which gets random weights."""

    keep: float = 0.4
    """Share of masks that pass the filters, for random weights, whose thresholds are chosen by this
    (benchmarks/untrained.py)."""

    pred_iou_thresh: float = 0.88
    """As in SAM; for a checkpoint."""

    stability_score_thresh: float = 0.95
    """As in SAM; for a checkpoint."""

    engine: EngineChoice = "auto"
    """Of this project's variants; the reference runs on torch."""

    points_per_side: int = 32
    """Of the flat grid and of the hierarchical mode's last round."""

    variants: tuple[str, ...] = VARIANTS
    """What to run: segment-anything, or a grid (flat, or a preset of the hierarchical mode) and a precision. The first
    is what the others are compared with."""

    repeats: int = 3
    """Measurements of each variant and photograph."""

    threads: int = 1
    """Threads of torch and of the mask pass."""

    device: str = "cpu"
    """"cpu" or "cuda"."""

    output: Path | None = None
    """JSON file for the results."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One variant on one photograph."""

    seconds: float
    cpu_seconds: float
    stages: dict[str, float]
    """Of ``cpu_seconds``, in proportion to wall time; of ``seconds`` on "cuda"."""
    peak_mib: float
    """Of the process, its libraries and weights included; of the GPU on "cuda"."""

    records: list[dict[str, Any]] = field(repr=False)
    """With masks as COCO run lengths."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What all variants run on one photograph."""

    checkpoint: str
    options: dict[str, Any]
    """Of a generator."""


def prepare(config: EverythingBenchmark, photograph: Path, folder: Path) -> Prepared:
    """The checkpoint as it is, or an architecture with random weights from a fixed seed, written to ``folder``."""
    import torch

    from benchmarks.untrained import make_realistic
    from tinysam import sam_model_registry
    from tinysam.lake.images import decode_image
    from tinysam.modeling.checkpoint import is_untrained, save_checkpoint

    options = {"points_per_side": config.points_per_side, "output_mode": "coco_rle"}
    if not is_untrained(config.checkpoint):
        thresholds = {name: getattr(config, name) for name in ("pred_iou_thresh", "stability_score_thresh")}
        return Prepared(checkpoint=config.checkpoint, options=options | thresholds)
    torch.manual_seed(0)
    sam = sam_model_registry[config.checkpoint]().eval()
    thresholds = make_realistic(sam, decode_image(photograph.read_bytes()), config.keep)
    path = folder / f"{photograph.name}.safetensors"
    save_checkpoint(sam, str(path))
    return Prepared(checkpoint=str(path), options=options | thresholds)


def measure(config: EverythingBenchmark, prepared: Prepared, photograph: Path, variant: str) -> Measurement:
    """Runs in a process of its own: memory is that of this variant alone."""
    import torch

    from tinysam import load, with_engine
    from tinysam.lake.images import decode_image

    torch.set_num_threads(config.threads)
    image = decode_image(photograph.read_bytes())
    sam = load(prepared.checkpoint).to(config.device)
    points = 2
    if variant != REFERENCE:
        sam = with_engine(sam, config.engine, bf16="bfloat16" in variant)
        points = 10  # enough for engines to be opened
    warm_up, _ = build(sam, variant, {"points_per_side": points, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0})
    warm_up.generate(np.ascontiguousarray(image[::16, ::16]))
    generator, stages = build(sam, variant, prepared.options)
    start, cpu_start = time.perf_counter(), time.process_time()
    records = generator.generate(image)
    if config.device == "cuda":
        torch.cuda.synchronize()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    stages["masks"] = seconds - stages["encode"] - stages["decode"]
    if config.device == "cpu":
        stages = {name: share / seconds * cpu_seconds for name, share in stages.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if config.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    return Measurement(seconds=seconds, cpu_seconds=cpu_seconds, stages=stages, peak_mib=peak, records=records)


def build(sam: Any, variant: str, options: dict[str, Any]) -> tuple[Any, dict[str, float]]:
    """The variant's generator, and the dict in which it adds up its stages' seconds."""
    import segment_anything

    from tinysam import SamAutomaticMaskGenerator, SamHierarchicalMaskGenerator

    if variant == REFERENCE:
        seconds = {"encode": 0.0, "decode": 0.0, "masks": 0.0}
        time_module(sam.image_encoder, "encode", seconds)
        time_module(sam.mask_decoder, "decode", seconds)
        return segment_anything.SamAutomaticMaskGenerator(sam, **options), seconds
    grid, precision = variant.split()
    if grid == "flat":
        generator = SamAutomaticMaskGenerator(sam, **options, precision=precision)
    else:
        generator = SamHierarchicalMaskGenerator(sam, **options, precision=precision, preset=grid)
    return generator, generator.seconds


def time_module(module: Any, stage: str, seconds: dict[str, float]) -> None:
    """Adds the time of the module's calls to ``seconds[stage]``."""
    import torch

    forward = module.forward

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        output = forward(*args, **kwargs)
        if next(module.parameters()).is_cuda:
            torch.cuda.synchronize()
        seconds[stage] += time.perf_counter() - start
        return output

    module.forward = timed


def agreement(records: list[dict[str, Any]], reference: list[dict[str, Any]]) -> dict[str, float]:
    """How well each mask of the reference is found among ``records``."""
    from pycocotools import mask as mask_utils

    if not records or not reference:
        return {"matched": 1.0 if not records and not reference else 0.0, "mean_iou": 0.0}
    ious = mask_utils.iou(
        [r["segmentation"] for r in reference], [r["segmentation"] for r in records], [0] * len(records)
    ).max(1)
    return {"matched": float((ious >= 0.999).mean()), "mean_iou": float(ious.mean())}


def main() -> None:
    """Measures, prints a table, and writes the results."""
    config = tyro.cli(EverythingBenchmark, description=__doc__)
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[variable] = str(config.threads)
    console = Console(width=max(Console().width, 130))  # rows stay whole in a log, too
    tasks = [
        (photograph, variant)
        for _ in range(config.repeats)
        for photograph in config.photographs
        for variant in config.variants
    ]
    results: dict[tuple[Path, str], list[Measurement]] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool,
    ):
        prepared = {path: pool.apply(prepare, (config, path, Path(folder))) for path in config.photographs}
        for photograph, variant in track(tasks, "Measuring", console=console):
            measured = pool.apply(measure, (config, prepared[photograph], photograph, variant))
            results.setdefault((photograph, variant), []).append(measured)
    rows = [summarise(config, results, photograph, variant) for photograph, variant in results]
    console.print(as_table(config, rows))
    if config.output is not None:
        write_results(config.output, config, rows)


def summarise(
    config: EverythingBenchmark,
    results: dict[tuple[Path, str], list[Measurement]],
    photograph: Path,
    variant: str,
) -> dict[str, Any]:
    """Medians of one variant on one photograph."""
    measured, reference = results[photograph, variant], results[photograph, config.variants[0]]

    def median(name: str, of: list[Measurement]) -> float:
        return statistics.median(getattr(m, name) for m in of)

    return {
        "photograph": photograph.name,
        "variant": variant,
        "seconds": median("seconds", measured),
        "cpu_seconds": median("cpu_seconds", measured),
        **{stage: statistics.median(m.stages[stage] for m in measured) for stage in ("encode", "decode", "masks")},
        "peak_mib": median("peak_mib", measured),
        "speedup": median("cpu_seconds", reference) / median("cpu_seconds", measured)
        if config.device == "cpu"
        else median("seconds", reference) / median("seconds", measured),
        "n_masks": len(measured[0].records),
        **agreement(measured[0].records, reference[0].records),
    }


def as_table(config: EverythingBenchmark, rows: list[dict[str, Any]]) -> Table:
    """The results for people."""
    table = Table(title=f"{config.checkpoint}, {config.points_per_side} points a side, {config.threads} thread(s)")
    for name in ("photograph", "variant"):
        table.add_column(name)
    formats = {
        "seconds": ".2f",
        "cpu_seconds": ".2f",
        "encode": ".2f",
        "decode": ".2f",
        "masks": ".2f",
        "speedup": ".1f",
        "peak_mib": ".0f",
        "found": "d",
        "matched": ".3f",
        "mean_iou": ".4f",
    }
    names = {"cpu_seconds": "CPU s", "seconds": "s", "peak_mib": "peak MiB", "matched": "IoU ≥ 0.999"}
    for name in formats:
        table.add_column(names.get(name, name), justify="right")
    for row in rows:
        values = row | {"found": row["n_masks"]}
        table.add_row(row["photograph"], row["variant"], *(format(values[n], f) for n, f in formats.items()))
    return table


if __name__ == "__main__":
    main()
