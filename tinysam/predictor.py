"""SamPredictor: segment-anything's predictor with its arguments checked.

The computation is segment-anything's own, so results are equal bit for bit. What is added: errors that say what to do
instead of failing deep inside torch, and images so elongated that their short side would round to nothing.
"""

from __future__ import annotations

import numpy as np
import segment_anything
import torch
from numpy.typing import ArrayLike
from segment_anything.modeling import Sam
from segment_anything.utils import transforms


class ResizeLongestSide(transforms.ResizeLongestSide):
    """segment-anything's transform, except that no side is ever resized to nothing (1x5000 at 1024 gives 1x1024)."""

    @staticmethod
    def get_preprocess_shape(oldh: int, oldw: int, long_side_length: int) -> tuple[int, int]:
        """The (height, width) of an ``oldh`` x ``oldw`` image whose longest side became ``long_side_length``."""
        height, width = transforms.ResizeLongestSide.get_preprocess_shape(oldh, oldw, long_side_length)
        return max(height, 1), max(width, 1)


def check_image(image: np.ndarray) -> np.ndarray:
    """Returns ``image`` if it is an (H, W, 3) uint8 array with at least one pixel.

    Raises:
        TypeError: it is not a uint8 array.
        ValueError: it has another shape, or no pixel.
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        kind = f"an array of {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
        raise TypeError(f"an image must be a uint8 numpy array, not {kind}; tinysam.lake.images decodes files to one")
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image must have shape (height, width, 3), not {image.shape}; convert it to RGB first")
    if image.size == 0:
        raise ValueError(f"an image must have at least one pixel, not shape {image.shape}")
    return image


class SamPredictor(segment_anything.SamPredictor):
    """Predicts masks from points, boxes and masks, after ``set_image`` has embedded the image once.

    Takes any ``segment_anything.modeling.Sam``; the same methods, attributes and results as
    ``segment_anything.SamPredictor``.
    """

    def __init__(self, sam_model: Sam) -> None:
        super().__init__(sam_model)
        self.transform = ResizeLongestSide(sam_model.image_encoder.img_size)

    def set_image(self, image: np.ndarray, image_format: str = "RGB") -> None:
        """Embeds an image.

        Args:
            image: (H, W, 3) uint8.
            image_format: order of its channels, "RGB" or "BGR".

        Raises:
            TypeError, ValueError: see ``check_image``; or an unknown ``image_format``.
        """
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format must be 'RGB' or 'BGR', not {image_format!r}")
        super().set_image(check_image(image), image_format)

    def set_torch_image(self, transformed_image: torch.Tensor, original_image_size: tuple[int, ...]) -> None:
        """Embeds an image that ``ResizeLongestSide`` has resized already.

        Args:
            transformed_image: (1, 3, h, w), values in 0..255, max(h, w) equal to the model's image size.
            original_image_size: (H, W) before it was resized.

        Raises:
            ValueError: another shape.
        """
        size = self.model.image_encoder.img_size
        shape = tuple(transformed_image.shape)
        if len(shape) != 4 or shape[1] != 3 or max(shape[2:]) != size or min(shape) < 1:
            raise ValueError(f"the transformed image must be (1, 3, h, w) with a longest side of {size}, not {shape}")
        super().set_torch_image(transformed_image, original_image_size)

    def predict(
        self,
        point_coords: ArrayLike | None = None,
        point_labels: ArrayLike | None = None,
        box: ArrayLike | None = None,
        mask_input: ArrayLike | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Predicts the masks of one object of the current image.

        Args:
            point_coords: (N, 2), each (x, y) in pixels of the original image.
            point_labels: (N,), 1 for a point on the object and 0 for one outside of it.
            box: (4,), XYXY in pixels of the original image.
            mask_input: (1, S, S) low-resolution logits as returned by an earlier call.
            multimask_output: three masks (best for a single click) or one.
            return_logits: logits rather than a binary mask.

        Returns:
            masks (C, H, W) bool, or float32 with ``return_logits``; predicted IoU (C,) float32, not confined to 0..1;
            low-resolution logits (C, S, S) float32, S being a quarter of the model's image size.

        Raises:
            RuntimeError: no image is set.
            ValueError: a prompt of another shape, or with a value that is not finite.
        """
        if (point_coords is None) != (point_labels is None):
            raise ValueError("point_coords and point_labels must be given together")
        mask_size = tuple(self.model.prompt_encoder.mask_input_size)
        coords = None if point_coords is None else _prompt("point_coords", point_coords, (-1, 2))
        labels = None if coords is None else _prompt("point_labels", point_labels, coords.shape[:1])
        box = None if box is None else _prompt("box", np.reshape(box, -1), (4,))
        mask_input = None if mask_input is None else _prompt("mask_input", mask_input, (1, *mask_size))
        return super().predict(coords, labels, box, mask_input, multimask_output, return_logits)


def _prompt(name: str, value: ArrayLike | None, shape: tuple[int, ...]) -> np.ndarray:
    """``value`` as a finite array of that shape, where -1 stands for any length."""
    array = np.asarray(value)
    if len(array.shape) != len(shape) or any(e not in (-1, a) for a, e in zip(array.shape, shape, strict=True)):
        wanted = ", ".join("N" if n == -1 else str(n) for n in shape)
        raise ValueError(f"{name} must have shape ({wanted}), not {array.shape}; predict_torch takes several prompts")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds a value that is not finite")
    return array
