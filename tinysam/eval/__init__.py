"""Metrics of promptable segmentation: boxes, clicks, everything mode, average precision."""

from tinysam.eval.bootstrap import Metric
from tinysam.eval.clicks import ClickConfig, click_ious
from tinysam.eval.everything import EverythingScores, score_everything
from tinysam.eval.image import EvalConfig, ImageScores, evaluate_image, evaluate_images
from tinysam.eval.prompts import BoxPredictions, predict_boxes
from tinysam.eval.summary import summarize

__all__ = [
    "BoxPredictions",
    "ClickConfig",
    "EvalConfig",
    "EverythingScores",
    "ImageScores",
    "Metric",
    "click_ious",
    "evaluate_image",
    "evaluate_images",
    "predict_boxes",
    "score_everything",
    "summarize",
]
