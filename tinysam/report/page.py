"""One self-contained page from the outputs of the jobs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from tinysam.lake import schema
from tinysam.lake.filesystem import exists, join, list_files, redact_url, write_once
from tinysam.lake.plan import INDEX_FILE
from tinysam.lake.shards import SHARDS_FOLDER
from tinysam.report import charts
from tinysam.report.pictures import Picture, count_rows, find_rows, make_pictures, relocated
from tinysam.report.quality import RESULTS_FILE
from tinysam.report.rendering import render
from tinysam.report.scan import ImageRef, LabelFigures, SampleSizes, scan
from tinysam.report.stages import Stage, in_order, read_stage
from tinysam.report.text import figure, percent

MOST_BYTES = 20_000_000
"""No page is larger."""
PICTURE_BYTES = 14_000_000
"""Of those, what all pictures may take."""
MOST_SHOWN = 96
HEADLINES = {"ap": "Mask AP", "box_miou": "Box mIoU", "click_miou_1": "One-click mIoU"}
"""Metrics of which the first one there is stands at the top of the page."""


class ReportError(Exception):
    """There is nothing to report on; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What to report on."""

    labels: str
    """Output folder of ``pipelines/label_images.py``, or of ``pipelines/evaluate.py`` for a page about its results
    alone; a path or URL."""
    stages: tuple[str, ...] = ()
    """Output folders of other jobs to show on the same page."""
    lake: str | None = None
    """Where the images lie now, if they have moved since they were labelled."""
    output: str = "report.html"
    """Where the page goes, a path or URL."""
    seed: int = 0
    """Decides which images are the random ones."""
    images: int = 24
    """How many random images; of the worst ones there are up to as many."""

    def __post_init__(self) -> None:
        if not 0 <= self.images <= MOST_SHOWN:
            raise ValueError(f"images must lie in 0..{MOST_SHOWN}, not {self.images}")


def write_report(config: ReportConfig, *, progress: Callable[[str, int, int], None] | None = None) -> str:
    """Writes the page, which needs no network and no other file, and is smaller than 20 MB for any lake.

    Args:
        progress: told what is being done, how much of it is done, and of how much.

    Returns:
        Where the page lies.

    Raises:
        ReportError: if ``config.labels`` is not the output of a label job.
        LakeError: if something cannot be read or written.
    """
    write_once(config.output, render_report(config, progress=progress).encode("utf-8", "replace"))
    return config.output


def render_report(config: ReportConfig, *, progress: Callable[[str, int, int], None] | None = None) -> str:
    """The page as a string; see :func:`write_report`."""
    if exists(join(config.labels, RESULTS_FILE)):
        return render_scores(config.labels)
    report = progress or (lambda _what, _done, _total: None)
    shards = list_files(join(config.labels, SHARDS_FOLDER), "*.parquet")
    if not shards:
        raise ReportError(
            f"{redact_url(config.labels)} holds no shards of masks. Give the --output folder of "
            "pipelines/label_images.py after its first shard is done, or that of pipelines/evaluate.py."
        )
    worst = max(1, config.images // 2)
    sizes = SampleSizes(random=config.images, lowest=worst, empty=max(1, worst // 2), failed=worst)
    figures = scan(shards, sizes=sizes, seed=config.seed, progress=lambda done, n: report("reading shards", done, n))

    random, lowest, empty = figures.random.images, figures.lowest.images, figures.empty.images
    failed = [image for selection in figures.failed.values() for image in selection.images][:MOST_SHOWN]
    pictures, planned = _pictures(config, [*random, *lowest, *empty, *failed])
    report("reading images", len(pictures), len(pictures))
    label = read_stage(config.labels) if exists(join(config.labels, "run.json")) else None
    stages = in_order([*(read_stage(url) for url in config.stages), *([label] if label else [])])
    return render(
        "report.html.j2",
        figures=figures,
        charts=_label_charts(figures),
        ok=schema.OK,
        planned=planned,
        label=label,
        stages=stages,
        name=_lake_name(label, config),
        source=redact_url(config.labels),
        sheets=_sheets(random, lowest, empty, pictures),
        failures=[(image, pictures[image.image_id]) for image in failed],
        seed=config.seed,
        quality=_headline_quality(stages, label),
    )


def render_scores(results: str) -> str:
    """The page about an evaluation's results, as a string.

    Args:
        results: output folder of ``pipelines/evaluate.py``.

    Raises:
        LakeError: if the results cannot be read.
    """
    stage = read_stage(results)
    name = ", ".join(table.dataset for table in stage.quality)
    return render("scores.html.j2", stages=[stage], name=name, source=redact_url(results))


def _pictures(config: ReportConfig, images: list[ImageRef]) -> tuple[dict[str, Picture], int | None]:
    """Pictures by ``image_id``, and how many images were planned in all where the index tells."""
    index = join(config.labels, INDEX_FILE)
    rows: dict[str, dict[str, Any]] = {}
    planned = None
    if exists(index):
        planned = count_rows(index)
        rows = find_rows(index, [image.image_id for image in images])
    if config.lake is not None:
        rows = {name: relocated(row, config.lake) for name, row in rows.items()}
    return make_pictures(images, rows, max_bytes=PICTURE_BYTES), planned


def _sheets(
    random: list[ImageRef], lowest: list[ImageRef], empty: list[ImageRef], pictures: dict[str, Picture]
) -> list[tuple[str, str, list[Picture]]]:
    """Titled rows of pictures: an anchor, a title, and the pictures."""
    sheets = (
        ("random", "Random images", random),
        ("lowest", "Least certain", lowest),
        ("empty", "No masks found", empty),
    )
    return [(anchor, title, [pictures[i.image_id] for i in images]) for anchor, title, images in sheets if images]


def _lake_name(label: Stage | None, config: ReportConfig) -> str:
    lake = config.lake or (label.record.config.get("lake") if label and label.record else None) or config.labels
    return str(redact_url(str(lake)))


def _label_charts(figures: LabelFigures) -> list[tuple[str, str, Markup]]:
    """Title, a line of figures and the drawing of each distribution."""
    per_image, area = figures.masks_per_image, figures.area_share
    iou, stability = figures.predicted_iou, figures.stability_score
    return [
        (
            "Masks per image",
            f"mean {figure(per_image.mean)}, median {figure(per_image.quantile(0.5))}",
            charts.histogram_chart(per_image, describe=lambda v: f"{math.ceil(v):,}", unit="images", whole=True),
        ),
        (
            "Mask area, share of the image",
            _size_shares(figures),
            charts.histogram_chart(area, describe=percent, unit="masks", log=True),
        ),
        (
            "Predicted IoU",
            f"mean {figure(iou.mean)}, 10 % below {figure(iou.quantile(0.1))}",
            charts.histogram_chart(iou, describe=lambda v: f"{v:.3g}", unit="masks"),
        ),
        (
            "Stability score",
            f"mean {figure(stability.mean)}, 10 % below {figure(stability.quantile(0.1))}",
            charts.histogram_chart(stability, describe=lambda v: f"{v:.3g}", unit="masks"),
        ),
    ]


def _size_shares(figures: LabelFigures) -> str:
    """How many masks are small, medium and large, by COCO's bounds."""
    if not figures.masks:
        return ""
    return ", ".join(f"{percent(figures.sizes[name] / figures.masks)} {name}" for name in ("small", "medium", "large"))


def _headline_quality(stages: list[Stage], label: Stage | None) -> tuple[str, float, str] | None:
    """The metric for the top of the page: its name, its value for the model that labelled, and the data set.

    None if the model that labelled was not evaluated.
    """
    config = label.record.config if label and label.record else {}
    model = str(config.get("quantized") or config.get("student") or "")
    for table in (table for stage in stages for table in stage.quality):
        used = [place for place, name in enumerate(table.columns) if _same_model(model, name)]
        values = {key: cells[used[0]] for key, _, cells in table.rows} if used else {}
        for key, name in HEADLINES.items():
            if (cell := values.get(key)) is not None:
                return name, cell.value, table.dataset
    return None


def _same_model(model: str, label: str) -> bool:
    """Whether an evaluation would call ``model`` so: by the last part of its path."""
    name = model.rstrip("/").rsplit("/", 1)[-1]
    return bool(name) and label in (name, name.rsplit(".", 1)[0])
