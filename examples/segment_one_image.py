"""The object at a point, and then every object, in one photograph. Without --photo, in a synthetic scene.

python examples/segment_one_image.py --photo photo.jpg --point 320 240
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found without an installation

import numpy as np
import tyro
from PIL import Image

from tinysam import SamHierarchicalMaskGenerator, SamPredictor, load
from tinysam.lake.images import decode_image
from tinysam.overlay import draw_masks, draw_prompts
from tinysam.synthetic import scene


def main(
    photo: Path | None = None,
    point: tuple[float, float] | None = None,
    model: str = "demo_student",
    points_per_side: int = 16,
    output: Path = Path("runs/segment_one_image"),
) -> None:
    """Writes point.png and everything.png.

    Args:
        photo: An image. None: a synthetic scene.
        point: X and Y in pixels from the top left. None: the middle.
        model: A name that `tinysam weights` lists, or a checkpoint.
        points_per_side: Of everything mode's grid.
        output: Folder of the two pictures.
    """
    image = decode_image(photo.read_bytes()) if photo else scene(7, style="photo").pixels  # (H, W, 3) uint8 RGB
    height, width = image.shape[:2]
    output.mkdir(parents=True, exist_ok=True)
    sam = load(model)

    # One object: three masks from small to large, of which the model thinks one the best.
    x, y = point or (width / 2, height / 2)
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    masks, scores, _ = predictor.predict(point_coords=np.array([[x, y]]), point_labels=np.array([1]))
    best = int(scores.argmax())
    print(f"mask at ({x:g}, {y:g}): {masks[best].sum()} pixels, predicted IoU {scores[best]:.2f}")
    drawn = draw_prompts(draw_masks(image, [masks[best]]), points=[(x, y)], labels=[1])
    Image.fromarray(drawn).save(output / "point.png")

    # Every object. SAM's thresholds presume a model as sure of itself as SAM; the demo models are not.
    generator = SamHierarchicalMaskGenerator(
        sam, points_per_side=points_per_side, pred_iou_thresh=0.5, stability_score_thresh=0.7
    )
    records = generator.generate(image)
    print(f"everything: {len(records)} masks")
    Image.fromarray(draw_masks(image, records)).save(output / "everything.png")


if __name__ == "__main__":
    tyro.cli(main)
