"""Which masks to drop because of where their boxes lie."""

from __future__ import annotations

import numpy as np
import torch
from segment_anything.utils.amg import is_box_near_crop_edge
from torchvision.ops import nms

from tinysam.everything.candidates import Candidates
from tinysam.everything.grids import Crop


def suppress(candidates: Candidates, scores: np.ndarray, iou_threshold: float) -> Candidates:
    """Box non-maximum suppression: the masks kept, in order of falling ``scores`` (equal scores keep their order)."""
    boxes = torch.from_numpy(candidates.boxes).float()
    keep = nms(boxes, torch.from_numpy(np.ascontiguousarray(scores, np.float32)), iou_threshold)
    return candidates.select(keep.numpy())


def suppress_by_quality(candidates: Candidates, iou_threshold: float) -> Candidates:
    """Within a crop: the mask of higher predicted IoU wins."""
    return suppress(candidates, candidates.predicted_iou, iou_threshold)


def suppress_by_crop(candidates: Candidates, iou_threshold: float) -> Candidates:
    """Between crops: the mask of the smaller crop wins, since it was seen at a higher resolution."""
    x0, y0, x1, y1 = candidates.crop_boxes.T
    return suppress(candidates, 1 / ((x1 - x0) * (y1 - y0)), iou_threshold)


def touches_crop_edge(boxes: np.ndarray, crop: Crop, image_size: tuple[int, int]) -> np.ndarray:
    """(N,) bool: boxes (N, 4) within 20 pixels of the crop's edge but not of the image's: cut off, most likely.

    Args:
        boxes: XYXY in the original frame.
        crop: where they were found.
        image_size: (H, W) of the original frame.
    """
    height, width = image_size
    whole = torch.tensor([0, 0, width, height])
    in_crop = torch.from_numpy(boxes - np.array([crop.x0, crop.y0, crop.x0, crop.y0]))
    return is_box_near_crop_edge(in_crop, crop.box, whole).numpy()
