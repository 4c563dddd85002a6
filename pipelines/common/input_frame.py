"""The check that an image survives SAM's resize."""

from __future__ import annotations

import numpy as np
from segment_anything.utils.transforms import ResizeLongestSide

from tinysam.lake.images import ImageError


def check_input_frame(pixels: np.ndarray, image_size: int) -> None:
    """Makes sure that something is left of (H, W, 3) pixels after the longest side was resized to ``image_size``.

    Raises:
        ImageError: ``too_narrow``, for a strip so long that its shorter side would have no pixel.
    """
    height, width = pixels.shape[:2]
    if min(ResizeLongestSide.get_preprocess_shape(height, width, image_size)) < 1:
        raise ImageError("too_narrow", f"{width} x {height} pixels leave none when the longest side is {image_size}")
