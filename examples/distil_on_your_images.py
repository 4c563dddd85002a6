"""A student of your own images from a teacher's embeddings. Without --lake, of a few synthetic scenes.

python examples/distil_on_your_images.py --lake s3://bucket/images --teacher sam_vit_h --student vit_t
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found without an installation

import tyro

from pipelines import cache_teacher, distill
from tinysam import load
from tinysam.lake.filesystem import join
from tinysam.synthetic import write_scenes


def main(
    lake: str | None = None,
    output: str = "runs/distil_on_your_images",
    teacher: str = "demo_teacher",
    student: str = "demo_student",
    epochs: int = 2,
    scenes: int = 16,
) -> int:
    """Caches the teacher's embeddings, then distils the student from them.

    Args:
        lake: Folder or URL of images, with ground truth masks (SA-1B's JSON beside them). None: synthetic scenes.
        output: Folder or URL of cache and student. Running the same command again goes on from what is there.
        teacher: A name that `tinysam weights` lists, or a checkpoint.
        student: The same; training goes on from its weights. `vit_t` begins with none, with the teacher's decoder.
        epochs: Over the images.
        scenes: How many, where there is no lake.
    """
    if lake is None:
        lake = join(output, "images")
        write_scenes(lake, scenes)
    cache, trained = join(output, "cache"), join(output, "student")

    # The teacher sees each image once, however many epochs follow.
    code = cache_teacher.main(["--lake", lake, "--output", cache, "--teacher", teacher, "--images-per-shard", "8"])
    if code:
        return code

    # --samples.crop-size 256 would be faster; but training has to end with whole images, and this one is short.
    code = distill.main(
        [
            *("--cache", cache, "--output", trained, "--student", student),
            *("--trainer.epochs", str(epochs), "--trainer.batch-size", "2"),
            *("--prompts.per-image", "8", "--prompts.max-rounds", "1", "--optimizer.learning-rate", "1e-4"),
        ]
    )
    if code:
        return code
    path = join(trained, distill.STUDENT_FILE)
    parameters = sum(parameter.numel() for parameter in load(path).parameters())
    print(f"{path}: {parameters / 1e6:.1f} million parameters; the loss of every step is in curves.html beside it")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
