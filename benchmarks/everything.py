"""Everything mode: segment-anything's own generator against this project's, on photographs.

    python -m benchmarks.everything --photographs a.jpg b.jpg --checkpoint mobile_sam.pt

Every measurement is a fresh process that loads the model, warms up on a thumbnail, and segments one photograph; the
variants take turns, and medians are reported. Agreement compares masks with those of the reference. Run it on an idle
machine; ``--threads 1`` measures CPU time that does not depend on how many cores there are.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
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

REFERENCE = "segment-anything"
VARIANTS = (REFERENCE, "flat float32", "flat bfloat16", "hierarchical float32", "hierarchical bfloat16")


@dataclass(frozen=True, kw_only=True)
class EverythingBenchmark:
    """Time, memory and agreement of everything mode."""

    photographs: tuple[Path, ...]
    """Images to segment."""

    checkpoint: str = "demo_student"
    """What tinysam.load takes, or the name of an architecture, which gets random weights: then give --keep."""

    keep: float | None = None
    """Share of masks that pass each filter, whatever their quality: makes random weights do a realistic amount of
    work. None uses the two thresholds below."""

    pred_iou_thresh: float = 0.88
    """As in SAM."""

    stability_score_thresh: float = 0.95
    """As in SAM."""

    points_per_side: int = 32
    """Of the flat grid and of the hierarchical mode's second round."""

    variants: tuple[str, ...] = VARIANTS
    """What to run; the first is what the others are compared with."""

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
    peak_mib: float
    """Of the process, its libraries and weights included; of the GPU on "cuda"."""

    records: list[dict[str, Any]] = field(repr=False)
    """With masks as COCO run lengths."""


def measure(config: EverythingBenchmark, photograph: Path, variant: str) -> Measurement:
    """Runs in a process of its own: memory is that of this variant alone."""
    import torch

    from tinysam.lake.images import decode_image

    torch.set_num_threads(config.threads)
    image = decode_image(photograph.read_bytes())
    sam = load_model(config).to(config.device)
    options: dict[str, Any] = {
        "points_per_side": config.points_per_side,
        "pred_iou_thresh": config.pred_iou_thresh,
        "stability_score_thresh": config.stability_score_thresh,
        "output_mode": "coco_rle",
    }
    if config.keep is not None:
        options |= thresholds_that_keep(sam, image, config.keep)
    warm_up, _ = build(sam, variant, {"points_per_side": 2, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0})
    warm_up.generate(np.ascontiguousarray(image[::16, ::16]))
    generator, stages = build(sam, variant, options)
    start, cpu_start = time.perf_counter(), time.process_time()
    records = generator.generate(image)
    if config.device == "cuda":
        torch.cuda.synchronize()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    stages["masks"] = seconds - stages["encode"] - stages["decode"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if config.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    return Measurement(seconds=seconds, cpu_seconds=cpu_seconds, stages=dict(stages), peak_mib=peak, records=records)


def load_model(config: EverythingBenchmark) -> Any:
    """The checkpoint's model, or an architecture with random weights from a fixed seed."""
    import torch

    from tinysam import load, sam_model_registry

    if config.keep is None or config.checkpoint not in sam_model_registry:
        return load(config.checkpoint)
    torch.manual_seed(0)
    return sam_model_registry[config.checkpoint]()


def build(sam: Any, variant: str, options: dict[str, Any]) -> tuple[Any, dict[str, float]]:
    """The variant's generator, and the dict in which it adds up its stages' seconds."""
    import segment_anything

    from tinysam import SamAutomaticMaskGenerator, SamHierarchicalMaskGenerator

    if variant == REFERENCE:
        seconds = {"encode": 0.0, "decode": 0.0, "masks": 0.0}
        time_module(sam.image_encoder, "encode", seconds)
        time_module(sam.mask_decoder, "decode", seconds)
        return segment_anything.SamAutomaticMaskGenerator(sam, **options), seconds
    kind, precision = variant.split()
    cls = {"flat": SamAutomaticMaskGenerator, "hierarchical": SamHierarchicalMaskGenerator}[kind]
    generator = cls(sam, **options, precision=precision)
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


def thresholds_that_keep(sam: Any, image: np.ndarray, share: float) -> dict[str, float]:
    """Thresholds of predicted IoU and stability that each keep about ``share`` of a coarse grid's masks."""
    import segment_anything
    import torch
    from segment_anything.utils.amg import build_point_grid, calculate_stability_score

    predictor = segment_anything.SamPredictor(sam)
    predictor.set_image(image)
    height, width = image.shape[:2]
    points = predictor.transform.apply_coords(build_point_grid(4) * (width, height), (height, width))
    coords = torch.as_tensor(points, device=sam.device)[:, None]
    labels = torch.ones((16, 1), device=sam.device)
    _, iou, low_res = predictor.predict_torch(coords, labels)
    offset = 1.0
    stability = calculate_stability_score(low_res.flatten(0, 1), sam.mask_threshold, offset).nan_to_num(0)
    return {
        "pred_iou_thresh": max(float(iou.quantile(1 - share)), 1e-6),
        "stability_score_thresh": max(float(stability.quantile(1 - share)), 1e-6),
        "stability_score_offset": offset,
    }


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
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for task in track(tasks, "Measuring", console=console):
            results.setdefault(task, []).append(pool.apply(measure, (config, *task)))
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
