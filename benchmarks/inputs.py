"""What benchmarks run on: models by name, and images with ground truth."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from segment_anything.modeling import Sam

from tinysam import load, sam_model_registry
from tinysam.eval.ground_truth import read_objects
from tinysam.eval.masks import Rle
from tinysam.lake.images import decode_image
from tinysam.lake.index import IndexConfig, build_index, read_image_bytes
from tinysam.modeling.checkpoint import is_untrained


def load_or_random(checkpoint: str) -> Sam:
    """What ``tinysam.load`` takes; an architecture without weights gets random ones, of torch's present seed."""
    return sam_model_registry[checkpoint]() if is_untrained(checkpoint) else load(checkpoint)


def images_with_objects(lake: str, annotations: str | None) -> Iterator[tuple[np.ndarray, list[Rle]]]:
    """Pixels and masks of a lake's images that have any."""
    for row in build_index(IndexConfig(lake=lake, annotations=annotations)).to_pylist():
        pixels = decode_image(read_image_bytes(row))
        objects = read_objects(row, *pixels.shape[:2])
        if objects is not None and objects.rles:
            yield pixels, objects.rles
