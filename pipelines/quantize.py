"""Turns a student's image encoder into 8-bit integers.

    python pipelines/quantize.py --student runs/student.safetensors --lake s3://bucket/images --output s3://bucket/int8

The ranges of the activations come from a few images of the lake; a few more measure what was lost. With
``--evaluate-lake`` the model is scored against ground truth before and after. The output is a folder that
``tinysam.load`` and ``label_images.py --quantized`` take: encoder.onnx, decoder.safetensors, config.json and
calibration.json (all scales), with report.json, results.json, report.html and run.json about it. One machine does it
all, without Ray.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found without an installation, and first of all

import numpy as np
import pyarrow as pa
from rich.markdown import Markdown
from rich.table import Table
from segment_anything.modeling import Sam

from pipelines.common.cli import EXIT_OK, EXIT_TOO_MANY_ERRORS, JobError, console, error_console, parse_config, run_main
from pipelines.common.models import weights_sha256
from pipelines.common.progress import JobProgress
from pipelines.common.summary import human_bytes
from pipelines.common.timing import StageClock
from tinysam import load
from tinysam.eval import EvalConfig
from tinysam.eval.compare import compare_models
from tinysam.eval.image import Task
from tinysam.eval.results import dataset_results, to_markdown
from tinysam.lake import schema
from tinysam.lake.filesystem import join, remove, write_once
from tinysam.lake.fingerprint import fingerprint
from tinysam.lake.images import ImageError, decode_image
from tinysam.lake.index import IndexConfig, build_index, read_image_bytes
from tinysam.lake.run_record import RUN_FILE, RunRecord, check_same_run, read_run_record
from tinysam.quant import QuantizationConfig, QuantizationError, load_quantized, quantize_encoder, save_quantized
from tinysam.quant.folder import CONFIG_FILE
from tinysam.quant.report import LAYER_KINDS, QuantizationReport, layer_table, measure
from tinysam.report.quality import RESULTS_FILE
from tinysam.report.quantization import PAGE_FILE, REPORT_FILE, render_quantization
from tinysam.runtime import EngineConfig, EngineError, EngineImageEncoder

FLOAT, QUANTIZED = "float", "int8"
"""What the results call the two models."""
SEARCH_REPORT_EVERY = 10
LOW_MASK_IOU = 0.9
"""Below this agreement with the float model, the summary says what to try."""


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """Quantizes a student's image encoder to 8-bit integers."""

    student: str
    """The float model: a name, or a checkpoint's path or URL."""
    lake: str
    """Images like those that the student will see: a folder, a tar, a parquet file; a path or a URL."""
    output: str
    """Folder or URL of the quantized model."""
    calibration_images: int = 8
    """Images that the activations' ranges come from."""
    held_out_images: int = 4
    """Further images, on which error and agreement with the float model are measured."""
    limit: int = 10_000
    """The images are drawn from the first so many of the lake, by image_id, so that a huge lake is not listed whole."""
    seed: int = 0
    """Which images are drawn."""
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    """How the encoder is quantized."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """How the result is run to measure it; the output does not depend on it."""

    evaluate_lake: str | None = None
    """Images with ground truth, on which the float and the quantized model are scored."""
    evaluate_annotations: str | None = None
    """COCO file of that ground truth; None: SA-1B's JSON files beside the images."""
    evaluate_images: int = 20
    """The first so many images of it are taken."""
    evaluate_tasks: tuple[Task, ...] = ("box", "points")
    """box: mask AP and mIoU for the objects' boxes. points: mIoU after clicks. everything: recall of everything mode,
    which takes longest."""

    max_error_rate: float = 0.2
    """Exit with code 3 when a larger part of the images drawn could not be read. Others are drawn in their place, so
    the output is good in any case; but one in five points to a wrong path."""
    overwrite: bool = False
    """Replace the quantized model that the output holds, even another run's."""
    dry_run: bool = False
    """Only say which images would be drawn. Reads no image and writes nothing."""

    def __post_init__(self) -> None:
        for name in ("calibration_images", "held_out_images", "limit", "evaluate_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
        if self.seed < 0:
            raise ValueError("--seed must not be negative")
        if not 0 <= self.max_error_rate <= 1:
            raise ValueError("--max-error-rate must be between 0 and 1")
        if self.evaluate_annotations is not None and self.evaluate_lake is None:
            raise ValueError("--evaluate-annotations needs --evaluate-lake, the images that they belong to")
        EvalConfig(tasks=self.evaluate_tasks)

    @property
    def num_images(self) -> int:
        """Good images that the job needs."""
        return self.calibration_images + self.held_out_images

    def fingerprint(self, student_sha256: str) -> str:
        """What decides about the output."""
        names: tuple[str, ...] = ("lake", "calibration_images", "held_out_images", "limit", "seed")
        if self.evaluate_lake is not None:
            names += ("evaluate_lake", "evaluate_annotations", "evaluate_images", "evaluate_tasks")
        return fingerprint(
            {
                "job": "quantize",
                "schema_version": schema.SCHEMA_VERSION,
                "student": student_sha256,
                "quantization": asdict(self.quantization),
                **{name: getattr(self, name) for name in names},
            }
        )


@dataclass(frozen=True, kw_only=True)
class Draw:
    """The images that a run works on."""

    image_ids: list[str]
    pixels: list[np.ndarray]
    """(H, W, 3) uint8 each."""
    counts: Counter[str]
    """Images read, by status."""

    @property
    def error_rate(self) -> float:
        """The part of them that could not be read."""
        return 1 - self.counts[schema.OK] / max(self.counts.total(), 1)


def draw_rows(config: QuantizeConfig) -> pa.Table:
    """The lake's index in the random order in which images are tried.

    Raises:
        JobError: if the lake holds fewer images than are needed.
        LakeError: if it cannot be listed, or holds none.
    """
    index = build_index(IndexConfig(lake=config.lake, limit=config.limit))
    _check_enough(config, index.num_rows, "holds")
    return index.take(np.random.default_rng(config.seed).permutation(index.num_rows))


def read_images(config: QuantizeConfig, rows: pa.Table) -> Draw:
    """Reads images until there are enough good ones.

    Raises:
        JobError: if there are not.
    """
    draw = Draw(image_ids=[], pixels=[], counts=Counter())
    for row in _rows(rows):
        if len(draw.pixels) == config.num_images:
            break
        try:
            pixels = decode_image(read_image_bytes(row))
        except ImageError as error:
            draw.counts[error.status] += 1
            error_console.print(f"skipped {row['image_id']}: {error.status}: {error}", markup=False, highlight=False)
            continue
        draw.counts[schema.OK] += 1
        draw.image_ids.append(row["image_id"])
        draw.pixels.append(pixels)
    _check_enough(config, len(draw.pixels), "has only good ones:" if draw.error_rate else "holds")
    return draw


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    for number in range(table.num_rows):
        yield table.slice(number, 1).to_pylist()[0]


def _check_enough(config: QuantizeConfig, found: int, verb: str) -> None:
    if found < config.num_images:
        raise JobError(
            f"{config.lake} {verb} {found} images, but {config.calibration_images} are needed for calibration and "
            f"{config.held_out_images} to measure on. Give a lake with more, or lower --calibration-images or "
            "--held-out-images"
        )


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run has to say, in ``report.json``."""

    bytes_float_model: int
    """All weights of the float model, in float32."""
    bytes_int8_model: int
    """All files of the quantized one."""
    report: QuantizationReport
    layers: list[dict[str, object]]
    """Of ``layer_table``."""


def quantize(config: QuantizeConfig, sam: Sam, draw: Draw, sha256: str, clock: StageClock) -> Result:
    """Quantizes, writes the folder but for its run record, loads it again as any user would, and measures that."""
    measured = itertools.count(1)

    def on_layer() -> None:
        error_console.print(f"quantize: effect of layer {next(measured)} on the embedding measured", highlight=False)

    searched = itertools.count(1)

    def on_product(name: str, count: int) -> None:
        number = next(searched)
        if number % SEARCH_REPORT_EVERY == 0 or number == count:
            error_console.print(f"quantize: scales of {number} of {count} layers found", highlight=False)

    images, held_out = draw.pixels[: config.calibration_images], draw.pixels[config.calibration_images :]
    with JobProgress("quantize", config.num_images, error_console) as progress:
        with clock.stage("quantize"):
            encoder = quantize_encoder(
                sam,
                images,
                held_out,
                config.quantization,
                num_threads=config.engine.num_threads,
                on_image=lambda: progress.advance(1),
                on_layer=on_layer,
                on_product=on_product,
            )
        with clock.stage("write"):
            sizes = save_quantized(
                config.output,
                sam,
                encoder,
                config.quantization,
                calibration_images=draw.image_ids[: config.calibration_images],
                source={"model": config.student, "sha256": sha256},
            )
        with clock.stage("load"):
            quantized = load_quantized(config.output, config.engine)
        with clock.stage("measure"):
            report = measure(sam, quantized, encoder, held_out, on_image=lambda: progress.advance(1))
    result = Result(
        bytes_float_model=sum(value.numel() * value.element_size() for value in sam.state_dict().values()),
        bytes_int8_model=sum(sizes.values()),
        report=report,
        layers=layer_table(encoder),
    )
    if config.evaluate_lake is not None:
        with clock.stage("evaluate"):
            evaluate(config, {FLOAT: sam, QUANTIZED: quantized}, sha256)
    write_once(join(config.output, REPORT_FILE), (json.dumps(asdict(result), indent=2) + "\n").encode())
    return result


def evaluate(config: QuantizeConfig, models: Mapping[str, Sam], sha256: str) -> None:
    """Scores both models against ground truth, and writes ``results.json`` as ``pipelines/evaluate.py`` does.

    Raises:
        JobError: if none of the images has ground truth.
        LakeError: if they cannot be listed, or the annotations do not belong to them.
    """
    assert config.evaluate_lake is not None
    lake, annotations = config.evaluate_lake, config.evaluate_annotations
    index = build_index(IndexConfig(lake=lake, annotations=annotations, limit=config.evaluate_images)).to_pylist()
    with JobProgress("evaluate", len(index), error_console) as progress:
        reductions = compare_models(
            models, index, EvalConfig(tasks=config.evaluate_tasks), on_image=lambda: progress.advance(1)
        )
    if not reductions[FLOAT].images:
        raise JobError(f"none of the images in {lake} has ground truth: give --evaluate-annotations, or another lake")
    sources = {FLOAT: (config.student, sha256), QUANTIZED: (config.output, fingerprint({"quantized": sha256}))}
    results = {
        "evaluation": {"tasks": sorted(set(config.evaluate_tasks))},
        "datasets": {lake.rstrip("/"): dataset_results(lake, annotations, sources, reductions)},
    }
    write_once(join(config.output, RESULTS_FILE), (json.dumps(results, indent=2) + "\n").encode())
    console.print(Markdown(to_markdown(results)))


def print_summary(config: QuantizeConfig, draw: Draw, result: Result) -> None:
    """Says what became of the model."""
    report = result.report
    table = Table(show_header=False, title=f"quantize: {config.output}")
    broken = draw.counts.total() - draw.counts[schema.OK]
    table.add_row("images", f"{config.calibration_images} + {config.held_out_images} held out, {broken} broken")
    table.add_row("layers", f"{report.layers_int8} of {report.layers} in int8, scales by {config.quantization.method}")
    kernels = ", ".join(
        f"{kind} {' + '.join(f'{count} {precision}' for precision, count in counts.items())}"
        for kind, counts in report.executed.items()
        if kind in (*LAYER_KINDS, "Subgraph") and {"i8", "u8"} & counts.keys()
    )
    table.add_row("executed", f"{report.engine}, {report.precision} beside: {kernels or 'no integer kernels'}")
    for part, before, after in (
        ("encoder", report.bytes_float_encoder, report.bytes_int8_encoder),
        ("whole model", result.bytes_float_model, result.bytes_int8_model),
    ):
        table.add_row(part, f"{human_bytes(before)} → {human_bytes(after)} ({after / before:.0%})")
    table.add_row(
        "encoder's time",
        f"{report.int8_ms:.1f} ms an image, {report.num_threads} threads; float32: {report.engine_fp32_ms:.1f} ms on "
        f"{report.engine}, {report.torch_fp32_ms:.1f} ms in torch",
    )
    table.add_row("embedding", f"relative error {report.embedding_relative_error:.4f}")
    table.add_row("masks", f"IoU {report.mask_iou:.4f} with the float model's, {report.mask_iou_90:.0%} above 0.9")
    console.print(table)
    if not report.vnni:
        error_console.print(
            "this processor has no VNNI, so products are computed more slowly for exact sums, or in float: the times "
            "say little about a processor that has it, and the float model may be faster",
            highlight=False,
        )
    if report.mask_iou < LOW_MASK_IOU:
        error_console.print(
            "the masks differ much from the float model's: try --quantization.activations uint8, or "
            "--quantization.max-error 0.02, which keeps the layers that hurt most in float",
            highlight=False,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job; returns its exit code."""
    config = parse_config(QuantizeConfig, argv)
    sha256 = weights_sha256(config.student)
    fingerprint_ = config.fingerprint(sha256)
    if not config.overwrite:
        check_same_run(config.output, fingerprint_)
        record = read_run_record(config.output)
        if record is not None:
            console.print(f"{config.output} is done already; pass --overwrite to do it again", highlight=False)
            return EXIT_OK
    rows = draw_rows(config)
    if config.dry_run:
        _print_dry_run(config, rows)
        return EXIT_OK

    start, clock = time.monotonic(), StageClock()
    with clock.stage("load"):
        sam = load(config.student)
    if isinstance(sam.image_encoder, EngineImageEncoder):
        raise JobError(f"{config.student} is quantized already; give the float checkpoint that it was made of")
    with clock.stage("read"):
        draw = read_images(config, rows)
    if config.overwrite:
        # From here on, the folder is no finished model.
        for name in (RUN_FILE, CONFIG_FILE, RESULTS_FILE, REPORT_FILE, PAGE_FILE):
            remove(join(config.output, name))
    try:
        result = quantize(config, sam, draw, sha256, clock)
    except (QuantizationError, EngineError, FloatingPointError) as error:
        raise JobError(f"{config.student}: {error}") from error
    seconds = time.monotonic() - start
    RunRecord(
        job="quantize",
        config=asdict(config),
        fingerprint=fingerprint_,
        counts=dict(sorted(draw.counts.items())),
        seconds=round(seconds, 3),
        images_per_second=round(config.num_images / seconds, 3),
        time_split={stage: round(value, 3) for stage, value in clock.take().items()},
        extra={
            "finished": True,
            "bytes_float_model": result.bytes_float_model,
            "bytes_int8_model": result.bytes_int8_model,
            **asdict(result.report),
        },
    ).write(config.output)
    page = join(config.output, PAGE_FILE)
    write_once(page, render_quantization(config.output).encode())
    print_summary(config, draw, result)
    console.print(f"every layer, its scales and its error: {page}", markup=False, highlight=False)
    if draw.error_rate > config.max_error_rate:
        error_console.print(
            f"{draw.error_rate:.0%} of the images drawn could not be read, more than --max-error-rate "
            f"{config.max_error_rate:g} allows; the reasons are above"
        )
        return EXIT_TOO_MANY_ERRORS
    return EXIT_OK


def _print_dry_run(config: QuantizeConfig, rows: pa.Table) -> None:
    table = Table("use", "images", title=f"quantize: dry run, nothing was written to {config.output}")
    ids = rows["image_id"].slice(0, config.num_images).to_pylist()
    table.add_row("calibration", "\n".join(ids[: config.calibration_images]))
    table.add_row("held out", "\n".join(ids[config.calibration_images :]))
    table.add_row("in place of broken ones", f"{rows.num_rows - config.num_images} more")
    console.print(table)


if __name__ == "__main__":
    run_main(main)
