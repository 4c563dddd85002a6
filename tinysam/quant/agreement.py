"""How far a quantized Sam agrees with the float one: embeddings, and the masks of a grid of clicks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from segment_anything.modeling import Sam

from tinysam.predictor import ResizeLongestSide, SamPredictor, check_image
from tinysam.quant.errors import Difference, difference

POINTS_PER_SIDE = 4


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The comparison on one image."""

    embedding: Difference
    """Of the image embedding, padding included."""
    mask_iou: tuple[float, ...]
    """For each click, the IoU of the quantized model's mask with the float model's."""
    predicted_iou_difference: float
    """Mean absolute difference of the predicted IoU."""


@torch.no_grad()
def compare(sam: Sam, quantized: Sam, image: np.ndarray, points_per_side: int = POINTS_PER_SIDE) -> Agreement:
    """Compares two models on one image.

    Each click of a grid is given alone. Of the three masks that SAM returns, the one that the float model thinks best
    is compared with the same one of the quantized model, in the input frame. Two empty masks agree.

    Args:
        sam: the float model.
        quantized: the model made from it.
        image: (H, W, 3) uint8 RGB.
        points_per_side: clicks along each side of the grid, in the centres of its cells.
    """
    # At the size that the encoder sees, 48 masks take 200 MB at most; at that of a large photograph, gigabytes.
    image = ResizeLongestSide(sam.image_encoder.img_size).apply_image(check_image(image))
    height, width = image.shape[:2]
    cells = (np.arange(points_per_side) + 0.5) / points_per_side
    points = np.stack(np.meshgrid(cells * width, cells * height), axis=-1).reshape(-1, 1, 2)
    expected_masks, expected_iou, expected_embedding = _predict(sam, image, points)
    masks, iou, embedding = _predict(quantized, image, points)
    every, best = np.arange(len(expected_iou)), expected_iou.argmax(1)
    a, b = expected_masks[every, best], masks[every, best]
    both, either = (a & b).sum((1, 2)), (a | b).sum((1, 2))
    return Agreement(
        embedding=difference(expected_embedding, embedding),
        mask_iou=tuple(np.where(either == 0, 1.0, both / np.maximum(either, 1)).tolist()),
        predicted_iou_difference=float(np.abs(expected_iou - iou)[every, best].mean()),
    )


def _predict(sam: Sam, image: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks (N, 3, H, W) bool, predicted IoU (N, 3) and the embedding (1, C, h, w), for N clicks of their own."""
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    coords = torch.as_tensor(predictor.transform.apply_coords(points, image.shape[:2]), device=sam.device)
    labels = torch.ones(coords.shape[:2], dtype=torch.int, device=sam.device)
    masks, iou, _ = predictor.predict_torch(coords.float(), labels, multimask_output=True)
    return masks.cpu().numpy(), iou.cpu().numpy(), predictor.get_image_embedding().cpu().numpy()
