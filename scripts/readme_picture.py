"""Draws the README's picture: everything mode of the shipped student, on images that come with packages or are made up.

python scripts/readme_picture.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found without an installation

import numpy as np
import tyro
from PIL import Image
from segment_anything.modeling import Sam

from pipelines.common.demo_lake import photographs
from tinysam import SamHierarchicalMaskGenerator, load
from tinysam.commands import SHIPPED_THRESHOLDS
from tinysam.lake.images import decode_image
from tinysam.overlay import draw_masks
from tinysam.synthetic import scene

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Draws the README's picture."""

    model: str = "demo_student"
    """A name that `tinysam weights` lists, or a checkpoint."""
    photographs: tuple[str, ...] = ("coins.png",)
    """Which of the demo's photographs are shown, by file name."""
    scenes: tuple[int, ...] = (10, 9)
    """Seeds of the synthetic microscopy scenes that are shown."""
    points_per_side: int = 32
    """Of everything mode's grid."""
    pred_iou_thresh: float = SHIPPED_THRESHOLDS[0]
    """Masks that the model itself expects to be worse are left out."""
    stability_score_thresh: float = SHIPPED_THRESHOLDS[1]
    """Masks that change more with the threshold of their logits are left out."""
    height: int = 300
    """Of the picture, in pixels."""
    output: Path = ROOT / "docs" / "overlay.jpg"
    """Where to."""


def everything(config: Picture, sam: Sam, image: np.ndarray) -> np.ndarray:
    """``image`` (H, W, 3) uint8 with all masks on it."""
    generator = SamHierarchicalMaskGenerator(
        sam,
        points_per_side=config.points_per_side,
        pred_iou_thresh=config.pred_iou_thresh,
        stability_score_thresh=config.stability_score_thresh,
        output_mode="coco_rle",
    )
    return draw_masks(image, generator.generate(image))


def side_by_side(images: Sequence[np.ndarray], height: int, gap: int = 6) -> Image.Image:
    """Images of one height in a row, white between them."""
    sized = [Image.fromarray(image) for image in images]
    sized = [image.resize((round(image.width * height / image.height), height), Image.LANCZOS) for image in sized]
    row = Image.new("RGB", (sum(image.width for image in sized) + gap * (len(sized) - 1), height), "white")
    left = 0
    for image in sized:
        row.paste(image, (left, 0))
        left += image.width + gap
    return row


def main() -> None:
    """Draws and saves."""
    config = tyro.cli(Picture, description=__doc__)
    photos = {path.name: decode_image(path.read_bytes()) for path in photographs()}
    sam = load(config.model)
    images = [photos[name] for name in config.photographs]
    images += [scene(seed, style="microscopy").pixels for seed in config.scenes]
    tiles = [everything(config, sam, image) for image in images]
    config.output.parent.mkdir(parents=True, exist_ok=True)
    side_by_side(tiles, config.height).save(config.output, quality=88, optimize=True)
    print(f"{config.output}: {config.output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
