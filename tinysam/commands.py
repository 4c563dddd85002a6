"""What the commands of ``tinysam`` do; :mod:`tinysam.cli` is their command line."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from tinysam.lake.filesystem import LakeError, read_bytes, redact_url, write_once
from tinysam.lake.images import ImageError, decode_image
from tinysam.lake.rle import encode_rle, rle_bbox
from tinysam.overlay import draw_masks, draw_prompts
from tinysam.weights import PUBLIC_FILES, SHIPPED, WeightsError, fetch, locate, shipped_path

if TYPE_CHECKING:
    from segment_anything.modeling import Sam


THRESHOLDS, SHIPPED_THRESHOLDS = (0.88, 0.95), (0.5, 0.7)
"""Predicted IoU and stability that ``everything`` asks for by default: SAM's own, and lower ones for the models that
ship, which are less sure of themselves."""
MAX_FINDINGS = 20
"""Lines of ``verify`` about single files."""


class CommandError(Exception):
    """A command cannot do what it was asked; the message says why."""


class UsageError(Exception):
    """The command line asks for something that makes no sense; the message says what."""


def segment(arguments: argparse.Namespace) -> None:
    """Segments the object that points and boxes show, and draws it."""
    from tinysam import SamPredictor  # loads torch, which other commands need not wait for

    points, boxes = arguments.point, arguments.box
    labels = arguments.label or [1] * len(points)
    if not points and not boxes:
        raise UsageError("say what to segment: --point X,Y or --box X0,Y0,X1,Y1")
    if len(labels) != len(points):
        raise UsageError(f"there are {len(points)} points and {len(labels)} labels: give one --label for each --point")
    if points and len(boxes) > 1:
        raise UsageError("points refine one box; give several boxes without points")
    out = _output_path(arguments, "segment")
    _check_picture(arguments.mask, arguments.photo)
    pixels = _read_photo(arguments.photo)
    _check_inside(points, boxes, pixels)

    predictor = SamPredictor(_load(arguments.model, arguments.device))
    predictor.set_image(pixels)
    # One point may mean a part or the whole: SAM then offers three masks, of which the best by its own score is taken.
    ambiguous = len(points) == 1 and not boxes
    records = []
    for box in boxes or [None]:
        masks, scores, _ = predictor.predict(
            point_coords=np.array(points, np.float32) if points else None,
            point_labels=np.array(labels, np.int32) if points else None,
            box=np.array(box, np.float32) if box is not None else None,
            multimask_output=ambiguous,
        )
        best = int(np.argmax(scores))
        records.append(_record(masks[best], float(scores[best]), points))
    drawing = draw_masks(pixels, records)
    _write_picture(out, draw_prompts(drawing, points=points, labels=labels, boxes=boxes))
    if arguments.mask:
        _write_picture(
            arguments.mask, 255 * np.any([record["segmentation"] for record in records], axis=0).astype(np.uint8)
        )
    _write_json(arguments, records, pixels)
    for record in records:
        share = record["area"] / (pixels.shape[0] * pixels.shape[1])
        _say(f"{record['area']:,} pixels ({share:.1%}), predicted IoU {record['predicted_iou']:.2f}")
    _say(f"{arguments.photo} → {out}")


def everything(arguments: argparse.Namespace) -> None:
    """Segments every object, and draws all of them."""
    from tinysam import SamAutomaticMaskGenerator, SamHierarchicalMaskGenerator, with_engine

    out = _output_path(arguments, "everything")
    pixels = _read_photo(arguments.photo)
    model = with_engine(_load(arguments.model, arguments.device), arguments.engine)
    min_iou, min_stability = SHIPPED_THRESHOLDS if arguments.model in SHIPPED else THRESHOLDS
    min_iou = min_iou if arguments.pred_iou_thresh is None else arguments.pred_iou_thresh
    min_stability = min_stability if arguments.stability_score_thresh is None else arguments.stability_score_thresh
    options: dict[str, Any] = {
        "points_per_side": arguments.points_per_side,
        "pred_iou_thresh": min_iou,
        "stability_score_thresh": min_stability,
        "output_mode": "coco_rle",
    }
    try:
        if arguments.flat:
            generator = SamAutomaticMaskGenerator(model, **options)
        else:
            generator = SamHierarchicalMaskGenerator(model, preset=arguments.preset, **options)
    except ValueError as error:
        raise UsageError(str(error)) from error
    records = generator.generate(pixels)
    _write_picture(out, draw_masks(pixels, records, points=arguments.points, boxes=arguments.boxes))
    _write_json(arguments, records, pixels)
    _say(f"{len(records)} mask{'' if len(records) == 1 else 's'}: {arguments.photo} → {out}")
    if not records:
        _say(
            f"no mask passed --pred-iou-thresh {min_iou:g} and --stability-score-thresh {min_stability:g}: lower them, "
            "or use a better --model"
        )


def weights(arguments: argparse.Namespace) -> None:
    """Downloads a public checkpoint, goes on with a download that was cut short, and checks what has arrived."""
    name = arguments.name
    if name is None:
        _list_weights(arguments.folder)
        return
    if name in SHIPPED:
        _say(f"{name} comes with this package: {shipped_path(name)}")
        return
    if name not in PUBLIC_FILES:
        raise UsageError(f"{name!r} is not one of {', '.join([*PUBLIC_FILES, *SHIPPED])}")
    with _progress() as progress:
        path = fetch(PUBLIC_FILES[name], source=arguments.source, folder=arguments.folder, progress=progress)
    _say(f"{path}\nIn Python: tinysam.load({str(path)!r}); on the command line: --model {path}")


def _list_weights(folder: Path | None) -> None:
    table = Table("name", "what", "size", "here", box=None, pad_edge=False, header_style="bold")
    for name in SHIPPED:
        table.add_row(name, "demo model, comes with this package", "", "yes")
    for file in PUBLIC_FILES.values():
        size = f"{file.size / 1e6:,.0f} MB" if file.size else ""
        table.add_row(file.name, file.about, size, "yes" if locate(file.name, folder) else "no")
    Console().print(table)


def report(arguments: argparse.Namespace) -> None:
    """Makes one self-contained HTML page: what the masks look like, how many, how sure, how fast, what failed."""
    from tinysam.report import ReportConfig, write_report

    try:
        config = ReportConfig(
            labels=arguments.labels,
            stages=tuple(arguments.stages),
            lake=arguments.lake,
            output=arguments.output,
            seed=arguments.seed,
            images=arguments.images,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    with _progress() as progress:
        path = write_report(config, progress=progress)
    _say(path)


def verify(arguments: argparse.Namespace) -> None:
    """Checks a job's output, says what is wrong, and deletes it if asked to."""
    from tinysam.verify import repair
    from tinysam.verify import verify as check

    with _progress() as progress:
        result = check(arguments.output, progress=progress)
    for finding in result.findings[:MAX_FINDINGS]:
        _say(f"{finding.kind}: {redact_url(finding.url)}: {finding.message}")
    if len(result.findings) > MAX_FINDINGS:
        _say(f"… and {len(result.findings) - MAX_FINDINGS:,} more")
    if result.ok:
        counts = ", ".join(f"{count:,} {status}" for status, count in sorted(result.counts.items()))
        _say(f"{result.images:,} images in {result.shards:,} shards are whole: {counts}")
        return
    if arguments.repair:
        deleted = repair(result)
        _say(f"deleted {len(deleted):,} files")
        raise CommandError("the output was not whole; run the job again, which makes what is missing")
    kinds = Counter(finding.kind for finding in result.findings)
    found = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
    remedy = "run the job again" if set(kinds) == {"missing"} else "use --repair, then run the job again"
    raise CommandError(f"the output is not whole ({found}): {remedy}")


def export(arguments: argparse.Namespace) -> None:
    """Writes the masks of a label job in the format of another tool."""
    from tinysam.export import export as write

    with _progress() as progress:
        exported = write(arguments.labels, arguments.format, arguments.to, progress=progress)
    _say(f"{exported.masks:,} masks of {exported.images:,} images → {redact_url(exported.url)}")
    if exported.left_out:
        counts = ", ".join(f"{count:,} {status}" for status, count in sorted(exported.left_out.items()))
        _say(f"left out, as they could not be labelled: {counts}")


COMMANDS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "segment": segment,
    "everything": everything,
    "weights": weights,
    "verify": verify,
    "export": export,
    "report": report,
}


def expected_errors() -> tuple[type[Exception], ...]:
    """The errors whose messages are written for people, and that need no traceback."""
    errors: list[type[Exception]] = [CommandError, LakeError, ImageError, WeightsError]
    # Only a module that is loaded can have raised; loading torch to find out would take seconds.
    for module, name in (
        ("tinysam.modeling.checkpoint", "CheckpointError"),
        ("tinysam.runtime.engine", "EngineError"),
        ("tinysam.report.page", "ReportError"),
        ("tinysam.export.labels", "ExportError"),
    ):
        if module in sys.modules:
            errors.append(getattr(sys.modules[module], name))
    return tuple(errors)


def _check_inside(points: Sequence[tuple[float, ...]], boxes: Sequence[tuple[float, ...]], pixels: np.ndarray) -> None:
    height, width = pixels.shape[:2]
    image = f"the image of {width} x {height} pixels"
    for x, y in points:
        if not (0 <= x < width and 0 <= y < height):
            raise UsageError(f"the point {x:g},{y:g} lies outside {image}")
    for x0, y0, x1, y1 in boxes:
        box = f"the box {x0:g},{y0:g},{x1:g},{y1:g}"
        if not (x0 < x1 and y0 < y1):
            raise UsageError(f"{box} is empty: X0,Y0 is its upper left corner, X1,Y1 the lower right one")
        # One that reaches over the edge is as good as any: detectors give them.
        if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
            raise UsageError(f"{box} lies outside {image}")


def _output_path(arguments: argparse.Namespace, kind: str) -> str:
    out = arguments.out or f"{Path(arguments.photo.rstrip('/')).stem}-{kind}.png"
    _check_picture(out, arguments.photo)
    return out


def _check_picture(path: str | None, photo: str) -> None:
    """Before the model runs: afterwards, an output that cannot be written is a nuisance."""
    if path is None:
        return
    if Path(path).suffix.lower() not in Image.registered_extensions():
        raise UsageError(f"{path}: pictures are written as .png, .jpg, .webp … by their name's ending")
    if path == photo or ("://" not in path + photo and Path(path).resolve() == Path(photo).resolve()):
        raise UsageError(f"{path} is the photo itself; write to another file")


def _read_photo(url: str) -> np.ndarray:
    try:
        return decode_image(read_bytes(url))
    except ImageError as error:
        raise CommandError(f"{url}: {error}") from error


def _load(model: str, device: str) -> Sam:
    import torch

    from tinysam import load

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise CommandError("there is no GPU that torch can use; leave --device out")
    return load(model).to(device)


def _record(mask: np.ndarray, predicted_iou: float, points: Sequence[Sequence[float]]) -> dict[str, Any]:
    return {
        "segmentation": mask,
        "area": int(mask.sum()),
        "bbox": rle_bbox(encode_rle(mask)),
        "predicted_iou": predicted_iou,
        "point_coords": [list(point) for point in points],
    }


def _write_picture(url: str, pixels: np.ndarray) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, Image.registered_extensions()[Path(url).suffix.lower()])
    write_once(url, buffer.getvalue())


def _write_json(arguments: argparse.Namespace, records: Sequence[dict[str, Any]], pixels: np.ndarray) -> None:
    """SA-1B's layout: https://github.com/facebookresearch/segment-anything#dataset."""
    if not arguments.json:
        return
    annotations = []
    for number, record in enumerate(records):
        mask = record["segmentation"]
        annotations.append(
            {"id": number, **record, "segmentation": mask if isinstance(mask, dict) else encode_rle(mask)}
        )
    height, width = pixels.shape[:2]
    image = {"file_name": arguments.photo.rsplit("/", 1)[-1], "height": height, "width": width}
    write_once(arguments.json, json.dumps({"image": image, "annotations": annotations}).encode())


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int | None], None]]:
    """A bar on stderr for each thing that is being done; nothing before there is something to do."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    tasks: dict[str, TaskID] = {}

    def show(what: str, done: int, total: int | None) -> None:
        if what not in tasks:
            progress.start()
            tasks[what] = progress.add_task(what, total=total)
        progress.update(tasks[what], completed=done, total=total)

    try:
        yield show
    finally:
        if tasks:
            progress.stop()


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
