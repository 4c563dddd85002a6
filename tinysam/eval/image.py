"""One image through every task, and many images in a loop: what the evaluation job and a training run both call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from segment_anything.modeling import Sam

from tinysam.eval.bootstrap import Metric
from tinysam.eval.clicks import ClickConfig, click_ious
from tinysam.eval.everything import EverythingScores, score_everything
from tinysam.eval.masks import Rle, areas, boxes_xyxy, paired_iou, to_rles
from tinysam.eval.prompts import BoxPredictions, check_sizes, predict_boxes
from tinysam.eval.summary import summarize
from tinysam.everything import SamHierarchicalMaskGenerator
from tinysam.everything.decoding import encode

Task = Literal["box", "points", "everything"]
TASKS: tuple[Task, ...] = ("box", "points", "everything")


class MaskGenerator(Protocol):
    """Anything with SAM's ``generate``, set to ``output_mode="coco_rle"``."""

    def generate(self, image: np.ndarray) -> list[dict[str, Any]]: ...


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is measured, and in what portions."""

    tasks: tuple[Task, ...] = TASKS
    """Box prompts, simulated clicks, everything mode."""
    clicks: ClickConfig = field(default_factory=ClickConfig)
    """How clicks are simulated."""
    prompts_per_batch: int = 64
    """Prompts in one decoder pass."""

    def __post_init__(self) -> None:
        unknown = set(self.tasks) - set(TASKS)
        if unknown or not self.tasks:
            raise ValueError(f"tasks must be some of {', '.join(TASKS)}, not {', '.join(sorted(unknown)) or 'none'}")
        if self.prompts_per_batch < 1:
            raise ValueError(f"prompts_per_batch must be at least 1, not {self.prompts_per_batch}")


@dataclass(frozen=True, kw_only=True)
class ImageScores:
    """One image's results; a task that was not asked for is None. Objects are in the order of the ground truth."""

    areas: np.ndarray
    """(objects,) pixels of each object."""
    box_multimask_iou: np.ndarray | None = None
    """(objects,) IoU of the multi-mask output of highest predicted IoU."""
    box_singlemask_iou: np.ndarray | None = None
    """(objects,) IoU of the single-mask output."""
    click_iou: np.ndarray | None = None
    """(objects, clicks)."""
    everything: EverythingScores | None = None
    """Everything mode."""
    box_predictions: BoxPredictions | None = None
    """The masks for the detector's boxes, else those for the objects' own: what average precision is computed from."""


def evaluate_image(
    sam: Sam,
    image: np.ndarray,
    masks: Sequence[Rle] | np.ndarray,
    *,
    config: EvalConfig | None = None,
    generator: MaskGenerator | None = None,
    detections: np.ndarray | None = None,
    stage: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> ImageScores:
    """Scores a model on one image.

    Args:
        sam: in eval mode, on its device.
        image: (H, W, 3) uint8 RGB.
        masks: ground truth at the same size: COCO RLEs or an (N, H, W) array. Empty masks are left out, since no
            prompt can be drawn from them.
        config: tasks and portions; everything by default.
        generator: of everything mode; by default a ``SamHierarchicalMaskGenerator`` with its own defaults.
        detections: (M, 4) XYXY boxes of a detector, to be segmented for average precision in the place of the ground
            truth's. The box IoUs are those of the ground truth's tight boxes all the same.
        stage: entered with a stage's name around its work ("embed", "box", "points", "everything"), to time it.

    Raises:
        ValueError: if a mask has another size than the image.
    """
    config = config or EvalConfig()
    truths = to_rles(masks)
    check_sizes(truths, image.shape[:2])
    truths = [truth for truth, area in zip(truths, areas(truths), strict=True) if area > 0]
    scores: dict[str, Any] = {"areas": areas(truths)}
    together = config.prompts_per_batch
    if {"box", "points"} & set(config.tasks):
        with stage("embed"):
            embedded = encode(sam, [image])[0]
    if "box" in config.tasks:
        with stage("box"):
            predictions = predict_boxes(sam, embedded, boxes_xyxy(truths), prompts_per_batch=together)
            scores["box_multimask_iou"] = paired_iou(predictions.multimask, truths)
            scores["box_singlemask_iou"] = paired_iou(predictions.singlemask, truths)
            if detections is not None:
                predictions = predict_boxes(sam, embedded, detections, prompts_per_batch=together)
            scores["box_predictions"] = predictions
    if "points" in config.tasks:
        with stage("points"):
            scores["click_iou"] = click_ious(sam, embedded, truths, config.clicks, prompts_per_batch=together)
    if "everything" in config.tasks:
        with stage("everything"):
            scores["everything"] = score_everything((generator or default_generator(sam)).generate(image), truths)
    return ImageScores(**scores)


def evaluate_images(
    sam: Sam,
    samples: Iterable[tuple[np.ndarray, Sequence[Rle] | np.ndarray]],
    *,
    config: EvalConfig | None = None,
    generator: MaskGenerator | None = None,
    bootstrap_samples: int = 1000,
) -> dict[str, Metric]:
    """Scores a model on (image, masks) pairs in this process: see ``evaluate_image`` and ``summarize``.

    >>> metrics = evaluate_images(sam, pairs, config=EvalConfig(tasks=("box", "points")))  # doctest: +SKIP
    >>> metrics["box_miou"].value, metrics["click_miou_1"].value  # doctest: +SKIP
    """
    config = config or EvalConfig()
    if "everything" in config.tasks and generator is None:
        generator = default_generator(sam)
    scores = [evaluate_image(sam, image, masks, config=config, generator=generator) for image, masks in samples]
    return summarize(scores, bootstrap_samples=bootstrap_samples)


def default_generator(sam: Sam) -> MaskGenerator:
    """Hierarchical everything mode with its default options."""
    return SamHierarchicalMaskGenerator(sam, output_mode="coco_rle")
