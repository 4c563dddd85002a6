"""SamHierarchicalMaskGenerator: TinySAM's everything mode, a coarse grid first and denser ones where needed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from segment_anything.modeling import Sam

from tinysam.everything.candidates import Candidates
from tinysam.everything.config import HierarchicalConfig, OutputMode, Precision, Preset
from tinysam.everything.decoding import embedding_at
from tinysam.everything.generator import SamAutomaticMaskGenerator, Scene
from tinysam.everything.grids import nested_grids, pixels_of, round_grids
from tinysam.everything.promise import ENOUGH, expected_iou


class SamHierarchicalMaskGenerator(SamAutomaticMaskGenerator):
    """Segments everything in an image in rounds (TinySAM, arXiv 2312.13789, section 3.3, where they are two).

    The first round prompts a coarse grid. Each later one prompts the points of a denser grid that no mask kept so far
    covers confidently and, but for the preset ``paper``, that promise a mask (``tinysam.everything.promise``). All
    rounds' masks are then merged by one suppression. Crops are segmented each in rounds of their own.
    """

    __slots__ = ()
    config: HierarchicalConfig

    def __init__(
        self,
        model: Sam,
        points_per_side: int | None = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        point_grids: Sequence[ArrayLike] | None = None,
        min_mask_region_area: int = 0,
        output_mode: OutputMode = "binary_mask",
        preset: Preset = "adaptive",
        rounds: int | None = None,
        coarse_ratio: float | None = None,
        high_score_thresh: float | None = None,
        nested: bool | None = None,
        iou_margin: float | None = None,
        precision: Precision = "float32",
    ) -> None:
        """
        Args:
            model: any Sam, on any device.
            point_grids: instead of ``points_per_side``: for each crop layer, the last round's (N, 2) points (x, y)
                in 0..1. The first round has about N / coarse_ratio**2 points.

        ``HierarchicalConfig`` describes the other options.

        Raises:
            ValueError: an option out of its range, or both or neither of ``points_per_side`` and ``point_grids``.
        """
        config = HierarchicalConfig(
            points_per_side=points_per_side,
            points_per_batch=points_per_batch,
            pred_iou_thresh=pred_iou_thresh,
            stability_score_thresh=stability_score_thresh,
            stability_score_offset=stability_score_offset,
            box_nms_thresh=box_nms_thresh,
            crop_n_layers=crop_n_layers,
            crop_nms_thresh=crop_nms_thresh,
            crop_overlap_ratio=crop_overlap_ratio,
            crop_n_points_downscale_factor=crop_n_points_downscale_factor,
            min_mask_region_area=min_mask_region_area,
            output_mode=output_mode,
            precision=precision,
            preset=preset,
            rounds=rounds,
            coarse_ratio=coarse_ratio,
            high_score_thresh=high_score_thresh,
            nested=nested,
            iou_margin=iou_margin,
        )
        self._setup(model, config, point_grids)

    def _segment(self, scene: Scene, grid: np.ndarray) -> Candidates:
        size, schedule = scene.encoded.size, self.config.schedule
        part = nested_grids if schedule.nested else round_grids
        rounds = part(grid, schedule.coarse_ratio, schedule.rounds)
        points = np.concatenate(rounds) * size[::-1]
        number = np.repeat(np.arange(len(rounds)), [len(one) for one in rounds])
        covered = np.zeros(len(points), bool)
        features = embedding_at(self.model, scene.encoded, points)
        prompted, best_iou = np.zeros(0, np.intp), torch.zeros(0, device=features.device)
        found = []
        for current in range(len(rounds)):
            now, later = (np.flatnonzero(of & ~covered) for of in (number == current, number > current))
            if len(prompted) >= ENOUGH and schedule.iou_margin < math.inf:
                expected = expected_iou(features[now], features[prompted], best_iou)
                now = now[(expected > self._min_iou - schedule.iou_margin).cpu().numpy()]
            answers = self._prompt(scene, points[now], probed=pixels_of(points[later], size))
            covered[later] = answers.highest > schedule.high_score_thresh
            prompted, best_iou = np.concatenate([prompted, now]), torch.cat([best_iou, answers.best_iou])
            found.append(answers.masks)
        return Candidates.concatenate(found)
