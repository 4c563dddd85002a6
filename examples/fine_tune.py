"""A model trained further on your own masks, without a teacher, and measured before and after on other images.

    python examples/fine_tune.py --train images --train-annotations train.json --val others --val-annotations val.json

Without arguments, on synthetic microscopy.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found without an installation

import tyro

import tinysam
from pipelines import cache_teacher, distill, evaluate
from tinysam.lake.filesystem import join
from tinysam.synthetic import write_scenes


def main(
    train: str | None = None,
    train_annotations: str | None = None,
    val: str | None = None,
    val_annotations: str | None = None,
    output: str = "runs/fine_tune",
    model: str = "demo_student",
    epochs: int = 2,
    scenes: int = 16,
) -> int:
    """Trains on one lake, and compares the model before and after on another.

    Args:
        train: Folder or URL of images to train on. None: synthetic scenes for both lakes.
        train_annotations: Their COCO file. None: SA-1B's JSON files beside them.
        val: Folder or URL of images to measure on; none of them may be among those of `train`.
        val_annotations: Their COCO file. None: SA-1B's JSON files beside them.
        output: Folder or URL of all results. Running the same command again goes on from what is there.
        model: A name that `tinysam weights` lists, or a checkpoint.
        epochs: Over the images.
        scenes: How many to train on, where there is no lake; a quarter of that to measure on.
    """
    if train is None or val is None:
        train, val = join(output, "train"), join(output, "val")
        write_scenes(train, scenes, seed=0, style="microscopy")
        write_scenes(val, max(1, scenes // 4), seed=1, style="microscopy")
    cache, trained, scores = join(output, "cache"), join(output, "student"), join(output, "scores")

    # No embeddings to keep to, so training may flip, recolour and zoom.
    masks = ["--annotations", train_annotations] if train_annotations else []
    flags = ["--lake", train, *masks, "--output", cache, "--teacher", "none"]
    flags += ["--image-size", str(tinysam.load(model).image_encoder.img_size)]
    code = cache_teacher.main([*flags, "--images-per-shard", "8"])
    code = code or distill.main(
        [
            *("--cache", cache, "--output", trained, "--student", model),
            *("--trainer.epochs", str(epochs), "--trainer.batch-size", "2"),
            *("--samples.flip", "--samples.color-jitter", "0.1"),
            *("--prompts.per-image", "8", "--prompts.max-rounds", "1", "--optimizer.learning-rate", "1e-4"),
        ]
    )
    masks = ["--annotations", val_annotations] if val_annotations else []
    after = join(trained, distill.STUDENT_FILE)
    flags = ["--lake", val, *masks, "--output", scores, "--tasks", "box", "--ap-bootstrap-samples", "0"]
    return code or evaluate.main([*flags, "--checkpoints", model, after])  # prints the models side by side


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
