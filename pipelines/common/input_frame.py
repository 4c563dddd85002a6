"""The check that an image survives SAM's resize."""

from __future__ import annotations

from segment_anything.utils.transforms import ResizeLongestSide

from tinysam.lake.images import ImageError


def check_input_frame(height: int, width: int, image_size: int) -> None:
    """Makes sure that pixels are left after the longest side was resized to ``image_size``.

    Raises:
        ImageError: ``too_narrow``, for a strip so long that its shorter side would have none.
    """
    if min(ResizeLongestSide.get_preprocess_shape(height, width, image_size)) < 1:
        raise ImageError("too_narrow", f"{width} x {height} pixels leave none when the longest side is {image_size}")
