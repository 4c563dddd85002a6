"""Storing embeddings: bytes and error of each codec, and what it does to the masks that a student is taught.

    python -m benchmarks.codecs --cache cache/train

The teacher encodes the cached images once more, in float32. Each codec's embeddings are then compared with those, and
the masks that the teacher's decoder makes of them with the masks of the exact ones and with the ground truth: prompts
are the objects' boxes (single-mask output) and clicks in their middle (the output of highest predicted IoU). Bytes are
those of a shard's embedding column, so what its compression gains is in them. Nothing here depends on how busy the
machine is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from segment_anything.modeling import Sam

from benchmarks.results import write_results
from tinysam import load
from tinysam.distill.cache import open_cache
from tinysam.distill.decoding import at_target_stride, decode, dense_positions
from tinysam.distill.losses import mask_iou
from tinysam.distill.prompts import box_prompts, point_prompts
from tinysam.distill.samples import Sample
from tinysam.distill.step import SINGLE_MASK, preprocess
from tinysam.distill.validation import centres, validation_batches
from tinysam.lake.codecs import Codec, decode_embedding, encode_embedding
from tinysam.lake.shards import serialize

EXACT = "float32"


@dataclass(frozen=True, kw_only=True)
class CodecBenchmark:
    """Size, error and effect of the codecs of embeddings."""

    cache: tuple[str, ...]
    """Outputs of pipelines/cache_teacher.py with ground truth."""
    images: int = 32
    """Drawn from each of them."""
    device: str = "cpu"
    """Where the teacher runs."""
    output: Path | None = None
    """JSON file for the results."""


Encode = Callable[[np.ndarray], tuple[bytes, np.ndarray]]
"""From an embedding, (C, H, W) float32, to what is stored of it and what is read back."""


def stored(codec: Codec, embedding: np.ndarray) -> tuple[bytes, np.ndarray]:
    """A codec of the shards."""
    data = encode_embedding(embedding, codec)
    return data, decode_embedding(data, embedding.shape, codec)


def planes(values: np.ndarray) -> bytes:
    """All first bytes, then all second ones, as parquet's BYTE_STREAM_SPLIT has them."""
    return values.reshape(-1, 1).view(np.uint8).T.tobytes()


def fp16_planes(embedding: np.ndarray) -> tuple[bytes, np.ndarray]:
    """fp16, byte planes."""
    values = embedding.astype("<f2")
    return planes(values), values.astype(np.float32)


def bf16_planes(embedding: np.ndarray) -> tuple[bytes, np.ndarray]:
    """bfloat16, byte planes."""
    values = torch.from_numpy(embedding).bfloat16()
    return planes(values.view(torch.int16).numpy()), values.float().numpy()


def rounded(embedding: np.ndarray, *, bits: int, differences: bool) -> tuple[bytes, np.ndarray]:
    """Integers of so many bits, a byte each, under one scale a channel; or their differences from left to right."""
    top = 2 ** (bits - 1) - 1
    scales = (np.abs(embedding).max((1, 2), keepdims=True) / top).clip(np.finfo(np.float32).tiny)
    values = np.rint(embedding / scales).astype(np.int8)
    shown = np.diff(values, axis=2, prepend=np.int8(0)) if differences else values
    return scales.tobytes() + shown.tobytes(), values * scales


CODECS: dict[str, Encode] = {
    EXACT: lambda embedding: (embedding.tobytes(), embedding),
    "fp16": partial(stored, "fp16"),
    "fp16, byte planes": fp16_planes,
    "bf16, byte planes": bf16_planes,
    "int8": partial(stored, "int8"),
    "8 bits, differences": partial(rounded, bits=8, differences=True),
    "7 bits, differences": partial(rounded, bits=7, differences=True),
    "6 bits": partial(rounded, bits=6, differences=False),
    "int6": partial(stored, "int6"),
    "5 bits, differences": partial(rounded, bits=5, differences=True),
    "4 bits, differences": partial(rounded, bits=4, differences=True),
}


@torch.inference_mode()
def masks(sam: Sam, sample: Sample, embedding: torch.Tensor) -> dict[str, torch.Tensor]:
    """The teacher's logits, ``(N, 1, h, w)`` at the ground truth's stride, for each kind of prompt."""
    positions = dense_positions(sam, sample.origin, embedding.shape[-1])
    boxed = decode(sam, embedding, positions, box_prompts(sample.boxes.flatten(0, 1)))
    clicked = decode(sam, embedding, positions, point_prompts(centres(sample.targets.flatten(0, 1) > 0.5)))
    chosen = 1 + clicked.predicted_iou[:, 1:].argmax(1)
    logits = {
        "box": boxed.logits[:, SINGLE_MASK, None],
        "click": clicked.logits[torch.arange(len(chosen)), chosen, None],
    }
    return {kind: at_target_stride(values) for kind, values in logits.items()}


def agreement(logits: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """IoU of (N, 1, h, w) logits with others, (N,), where two empty masks agree."""
    empty = ~((logits > 0) | (exact > 0)).flatten(1).any(1)
    return torch.where(empty, 1.0, mask_iou(logits, (exact > 0).float())[:, 0])


def measure(config: CodecBenchmark) -> list[dict[str, Any]]:
    """One row a codec."""
    cache = open_cache(config.cache)
    if cache.embedding_shape is None:
        raise SystemExit(f"{config.cache[0]} was made with --teacher none: it names nobody whose embeddings these were")
    sam = load(cache.teacher).to(config.device).eval()
    blobs: dict[str, list[bytes]] = {name: [] for name in CODECS}
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in CODECS}
    for sample in track(validation_batches(config.cache, images=config.images, image_size=cache.image_size)):
        sample = sample.to(config.device)
        with torch.inference_mode():
            exact = sam.image_encoder(preprocess(sam, sample.image, sample.content_size))
        keep = sample.weight.flatten() > 0
        targets = sample.targets.flatten(0, 1)[keep, None].float()
        expected = {kind: logits[keep] for kind, logits in masks(sam, sample, exact).items()}
        for name, encode in CODECS.items():
            data, read = encode(exact[0].numpy(force=True))
            embedding = torch.from_numpy(read)[None].to(config.device)
            blobs[name].append(data)
            found = {"relative_error": [float((embedding - exact).norm() / exact.norm())]}
            for kind, logits in masks(sam, sample, embedding).items():
                logits = logits[keep]
                found[f"{kind}_iou_with_exact"] = agreement(logits, expected[kind]).tolist()
                found[f"{kind}_iou"] = mask_iou(logits, targets)[:, 0].tolist()
            for key, values in found.items():
                figures[name].setdefault(key, []).extend(values)
    return [
        {
            "codec": name,
            "bytes_per_value": column_bytes(blobs[name]) / math.prod(cache.embedding_shape),
            **{key: float(np.mean(values)) for key, values in figures[name].items()},
            "prompts": len(figures[name]["box_iou"]),
        }
        for name in CODECS
    ]


def column_bytes(blobs: Sequence[bytes]) -> float:
    """What each of some embeddings takes in a shard, compressed as there."""
    return len(serialize(pa.table({"embedding": pa.array(blobs, pa.binary())}), {})) / len(blobs)


def main() -> None:
    """Measures, prints a table, and writes the results."""
    config = tyro.cli(CodecBenchmark, description=__doc__)
    rows = measure(config)
    table = Table(title=" ".join(config.cache))
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(
            *(f"{value:.5f}" if isinstance(value, float) and value < 10 else str(value) for value in row.values())
        )
    Console(width=max(Console().width, 130)).print(table)
    if config.output is not None:
        write_results(config.output, config, rows)


if __name__ == "__main__":
    main()
