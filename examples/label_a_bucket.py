"""Masks for every image of a folder or bucket, and how to read them. Without --lake, for a few synthetic scenes.

python examples/label_a_bucket.py --lake s3://bucket/images --output s3://bucket/masks
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found without an installation

import tyro
from pycocotools import mask as coco_mask

from pipelines import label_images
from tinysam.lake.filesystem import join, list_files
from tinysam.lake.shards import read_shard
from tinysam.synthetic import write_scenes


def main(
    lake: str | None = None,
    output: str = "runs/label_a_bucket",
    model: str = "demo_student",
    points_per_side: int = 16,
    scenes: int = 8,
) -> int:
    """Labels a lake and prints its masks by image.

    Args:
        lake: Folder or URL of images. None: synthetic scenes, below the output.
        output: Folder or URL of the masks. Running the same command again goes on from what is there.
        model: A name that `tinysam weights` lists, or a checkpoint.
        points_per_side: Of everything mode's grid.
        scenes: How many, where there is no lake.
    """
    if lake is None:
        lake = join(output, "images")
        write_scenes(lake, scenes)
    masks = join(output, "masks")
    code = label_images.main(
        [
            *("--lake", lake, "--output", masks, "--student", model, "--images-per-shard", "4"),
            *("--everything.points-per-side", str(points_per_side), "--everything.pred-iou-thresh", "0.5"),
            *("--everything.stability-score-thresh", "0.7"),  # SAM's own are too strict for the demo models
        ]
    )
    if code:
        return code
    # A shard is a parquet file with one row an image; any parquet reader will do.
    for url in list_files(join(masks, "shards"), "*.parquet"):
        for row in read_shard(url).to_pylist():
            if row["status"] != "ok":
                print(f"{row['image_id']}: {row['status']}, {row['error']}")
                continue
            pixels = [coco_mask.decode(found) for found in row["masks"]]  # (H, W) uint8 each, 0 or 1
            covered = sum(pixels).clip(max=1).mean() if pixels else 0.0
            print(f"{row['image_id']}: {len(pixels)} masks over {covered:.0%} of the image")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
