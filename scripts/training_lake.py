"""Builds the lake that the shipped models are trained on.

    python scripts/training_lake.py --data DATA --output LAKE --synthetic-train 1500 --synthetic-val 60

``DATA`` holds ``nuclei/`` and ``coco_mini_train/``, each an ``instances.json`` in COCO's form beside ``images/``. The
lake is one tree in SA-1B's layout: ``train/DOMAIN/x.jpg`` beside ``x.json`` and the same under ``val/``, for the
domains ``nuclei``, ``photos`` and ``synthetic``; ``val/DOMAIN/instances.json`` holds the same masks in COCO's form.

Cached embeddings cannot be augmented, so a student of few images may be given more of them beforehand: with
``--variants N``, ``train/DOMAIN_variants`` holds each real training image N times, mirrored, turned and cropped.

Photographs are taken only where their licence allows shipping what was trained on them. The split is by a hash of the
file's name, so that it never depends on what else is in the folder. The nuclei come from fewer slides than files, and
nothing in the data says which files share one: near-duplicate crops of a slide can land on both sides, so figures on
the validation nuclei tell how a model does on known slides.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import tyro
from PIL import Image
from rich.console import Console
from rich.progress import track

from tinysam.lake.annotations import read_annotations
from tinysam.lake.coco import CocoFile
from tinysam.lake.filesystem import LakeError, join, list_files, read_bytes, write_once
from tinysam.lake.images import ImageError, decode_image
from tinysam.lake.rle import decode_rle, encode_rle
from tinysam.synthetic.sa1b import sidecar, write_instances, write_png
from tinysam.synthetic.write import SceneSet, iter_write

SHIPPABLE_LICENSES = frozenset({4, 5, 7, 8})
"""COCO's ids of CC BY, CC BY-SA, no known restrictions, and work of the US government."""

SPLITS = ("train", "val")


@dataclass(frozen=True, kw_only=True)
class TrainingLake:
    """What the lake is built from."""

    data: str
    """Folder or URL that holds nuclei/ and coco_mini_train/."""
    output: str
    """Folder or URL of the lake."""
    synthetic_train: int = 1500
    """Synthetic scenes to train on; about a third of them microscopy."""
    synthetic_val: int = 60
    """Synthetic scenes to validate on, of a seed of their own."""
    val_share: float = 0.1
    """Share of the real images that is held out."""
    variants: int = 0
    """How many variants of each real training image are written."""
    variant_share: tuple[float, float] = (0.6, 1.0)
    """Least and greatest part of an image's sides that a variant shows."""
    seed: int = 0
    """Of the synthetic scenes and of the variants."""
    workers: int = 2
    """Processes that paint scenes."""

    def __post_init__(self) -> None:
        if not 0 <= self.val_share < 1:
            raise ValueError(f"val_share must be in [0, 1), got {self.val_share}")
        if self.variants < 0:
            raise ValueError(f"variants must not be negative, got {self.variants}")
        if not 0 < self.variant_share[0] <= self.variant_share[1] <= 1:
            raise ValueError(f"variant_share needs 0 < least <= greatest <= 1, got {self.variant_share}")


def split_of(domain: str, file_name: str, val_share: float) -> str:
    """``"val"`` for a fixed pseudo-random share of the names of a domain, ``"train"`` for the others."""
    digest = hashlib.sha256(f"{domain}/{file_name}".encode()).digest()
    return "val" if int.from_bytes(digest[:4], "big") / 2**32 < val_share else "train"


def as_jpeg_or_png(data: bytes) -> tuple[bytes, str]:
    """An image file and its extension: JPEG and PNG as they are, anything else turned into PNG without loss."""
    if data.startswith(b"\xff\xd8\xff"):
        return data, ".jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data, ".png"
    buffer = io.BytesIO()
    Image.fromarray(decode_image(data)).save(buffer, "PNG")
    return buffer.getvalue(), ".png"


def convert_coco(
    source: str, domain: str, config: TrainingLake, console: Console, licenses: frozenset[int] | None = None
) -> None:
    """Converts one COCO folder (``instances.json``, ``images/``), of ``licenses`` only where they are given."""
    coco = CocoFile.read(join(source, "instances.json"))
    for name, entry in track(coco.images.items(), domain, console=console):
        if licenses is not None and entry.get("license") not in licenses:
            continue
        data, extension = as_jpeg_or_png(read_bytes(join(source, "images", name)))
        row = {"annotations": json.dumps(coco.annotations[entry["id"]])}
        size = int(entry["height"]), int(entry["width"])
        rles = read_annotations(row, *size) or []
        stem = PurePosixPath(name).stem
        split = split_of(domain, name, config.val_share)
        folder = join(config.output, split, domain)
        write_once(join(folder, f"{stem}.json"), sidecar(f"{stem}{extension}", int(entry["id"]), size, rles))
        write_once(join(folder, f"{stem}{extension}"), data)
        if split == "train" and config.variants:
            write_variants(f"{folder}_variants", stem, int(entry["id"]), decode_image(data), rles, config)


def write_variants(
    folder: str, stem: str, image_id: int, image: np.ndarray, rles: Sequence[Mapping[str, Any]], config: TrainingLake
) -> None:
    """Writes variants of an image (H, W, 3) and of its masks."""
    masks = np.stack([decode_rle(rle) for rle in rles], 2) if rles else np.zeros((*image.shape[:2], 0), np.uint8)
    for number in range(config.variants):
        rng = np.random.default_rng((config.seed, image_id, number))
        pixels, cut = altered(image, masks, config.variant_share, rng)
        shown = [encode_rle(cut[..., i]) for i in np.flatnonzero(cut.any((0, 1)))]
        write_png(folder, f"{stem}_{number}", image_id * config.variants + number, pixels, shown)


def altered(
    image: np.ndarray, masks: np.ndarray, share: tuple[float, float], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The same part, mirrored and turned alike, of an image (H, W, 3) and of masks (H, W, N)."""
    height, width = image.shape[:2]
    sides = [max(1, round(side * share)) for side, share in zip((height, width), rng.uniform(*share, 2), strict=True)]
    y, x = (int(rng.integers(0, whole - side + 1)) for whole, side in zip((height, width), sides, strict=True))
    turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
    parts = (array[y : y + sides[0], x : x + sides[1]] for array in (image, masks))
    turned = (np.rot90(part[:, ::-1] if mirrored else part, turns) for part in parts)
    pixels, cut = (np.ascontiguousarray(part) for part in turned)
    return pixels, cut


def build(config: TrainingLake, console: Console) -> None:
    """Builds the lake; files of an earlier run of the same configuration are replaced by the same bytes."""
    convert_coco(join(config.data, "nuclei"), "nuclei", config, console)
    convert_coco(join(config.data, "coco_mini_train"), "photos", config, console, SHIPPABLE_LICENSES)
    counts = {"train": config.synthetic_train, "val": config.synthetic_val}
    for number, split in enumerate(SPLITS):
        output = join(config.output, split, "synthetic")
        scenes = SceneSet(output=output, count=counts[split], seed=2 * config.seed + number, workers=config.workers)
        for _ in track(iter_write(scenes), f"synthetic {split}", total=scenes.count, console=console):
            pass
    for domain in ("nuclei", "photos", "synthetic"):
        write_instances(join(config.output, "val", domain))
        for split in SPLITS:
            files = list_files(join(config.output, split, domain))
            images = sum(not url.endswith(".json") for url in files)
            console.print(f"{split}/{domain}: {images} images", highlight=False)


def main() -> int:
    """Runs the command line and returns its exit code."""
    console = Console(stderr=True)
    try:
        build(tyro.cli(TrainingLake, description=__doc__), console)
    except (LakeError, ImageError, ValueError) as error:
        console.print(f"[red]error:[/red] {error}", highlight=False)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
