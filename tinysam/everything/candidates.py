"""The masks that everything mode has so far, as arrays of one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """N masks. Boxes are inclusive XYXY, so a box of one pixel has x0 == x1, as in segment-anything."""

    run_lengths: list[np.ndarray]
    """N arrays of uint32: COCO's uncompressed run lengths in the original frame, column by column, background first."""

    boxes: np.ndarray
    """(N, 4) int64, original frame."""

    areas: np.ndarray
    """(N,) int64, pixels."""

    predicted_iou: np.ndarray
    """(N,) float32, what the model expects its mask's IoU to be; not confined to 0..1."""

    stability_score: np.ndarray
    """(N,) float32, 0..1."""

    points: np.ndarray
    """(N, 2) float64, the prompt (x, y) in the original frame."""

    crop_boxes: np.ndarray
    """(N, 4) int64, the crop the mask was found in, XYXY."""

    def __len__(self) -> int:
        return len(self.run_lengths)

    def select(self, index: np.ndarray) -> Candidates:
        """The masks at ``index``: a boolean array of length N, or integer positions in the order wanted."""
        positions = np.flatnonzero(index) if index.dtype == bool else index
        return Candidates(
            run_lengths=[self.run_lengths[i] for i in positions],
            boxes=self.boxes[positions],
            areas=self.areas[positions],
            predicted_iou=self.predicted_iou[positions],
            stability_score=self.stability_score[positions],
            points=self.points[positions],
            crop_boxes=self.crop_boxes[positions],
        )

    @staticmethod
    def concatenate(parts: Sequence[Candidates]) -> Candidates:
        """All masks of ``parts``, in order; none for no parts."""
        if not parts:
            return NO_CANDIDATES
        return Candidates(
            run_lengths=[counts for part in parts for counts in part.run_lengths],
            boxes=np.concatenate([part.boxes for part in parts]),
            areas=np.concatenate([part.areas for part in parts]),
            predicted_iou=np.concatenate([part.predicted_iou for part in parts]),
            stability_score=np.concatenate([part.stability_score for part in parts]),
            points=np.concatenate([part.points for part in parts]),
            crop_boxes=np.concatenate([part.crop_boxes for part in parts]),
        )


NO_CANDIDATES = Candidates(
    run_lengths=[],
    boxes=np.zeros((0, 4), np.int64),
    areas=np.zeros(0, np.int64),
    predicted_iou=np.zeros(0, np.float32),
    stability_score=np.zeros(0, np.float32),
    points=np.zeros((0, 2), np.float64),
    crop_boxes=np.zeros((0, 4), np.int64),
)
