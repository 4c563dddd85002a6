"""A small cache as pipelines/cache_teacher.py writes it: shards of bright rectangles on dark ground, and an index."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tinysam.lake import schema
from tinysam.lake.codecs import encode_embedding
from tinysam.lake.images import encode_jpeg
from tinysam.lake.rle import encode_rle
from tinysam.lake.shards import read_shard, write_shard

SIZE = 128
CHANNELS = 32


def write_cache(
    folder: Path,
    *,
    shards: int = 3,
    images: int = 4,
    embeddings: bool = True,
    masks: bool = True,
    metadata: dict[str, str] | None = None,
) -> str:
    """Writes ``shards`` shards of ``images`` images and a bad one each, and returns the folder.

    Args:
        embeddings: of random numbers, of a teacher called "t" unless ``metadata`` says otherwise.
        masks: whether the images have ground truth.
        metadata: of the shards, on top of what a cache has.
    """
    rng = np.random.default_rng(0)
    ids: list[str] = []
    for number in range(shards):
        rows = [_row(rng, f"{number}-{i}", embeddings, masks) for i in range(images)]
        rows.append({"image_id": f"{number}-bad", "uri": "bad", "status": "truncated", "error": "cut short"})
        facts = {"image_size": str(SIZE), "preprocessing": "p"}
        if embeddings:
            facts |= {"embedding_shape": f"{CHANNELS},8,8", "codec": "fp16", "teacher_sha256": "t", "teacher": "t"}
        table = pa.Table.from_pylist(rows, schema=schema.EMBEDDING)
        write_shard(str(folder / "shards"), f"shard-{number}", table, facts | (metadata or {}))
        ids += [f"shard-{number}"] * len(rows)
    pq.write_table(pa.table({"shard_id": ids}), folder / "index.parquet")
    return str(folder)


def spoil_embedding(shard: str, row: int) -> str:
    """Makes an embedding NaN in a shard, and returns the id of its image."""
    table = read_shard(shard)
    embeddings = table["embedding"].to_pylist()
    embeddings[row] = np.full(CHANNELS * 8 * 8, np.nan, np.float16).tobytes()
    changed = table.set_column(table.schema.get_field_index("embedding"), "embedding", pa.array(embeddings))
    pq.write_table(changed, shard)
    return table["image_id"][row].as_py()


def _row(rng: np.random.Generator, name: str, embeddings: bool, masks: bool) -> dict[str, object]:
    pixels = rng.integers(20, 60, (SIZE, SIZE, 3)).astype(np.uint8)
    entries = []
    for _ in range(3):
        x, y, w, h = (int(v) for v in (*rng.integers(0, SIZE - 48, 2), *rng.integers(20, 48, 2)))
        pixels[y : y + h, x : x + w] = rng.integers(180, 255, 3)
        frame = np.zeros((SIZE // 2, SIZE // 2), bool)
        frame[y // 2 : (y + h) // 2, x // 2 : (x + w) // 2] = True
        entries.append({**encode_rle(frame), "bbox": [x, y, w, h], "area": float(w * h), "point_coords": []})
    embedding = rng.normal(size=(CHANNELS, 8, 8)).astype(np.float32)
    return {
        "image_id": name,
        "uri": f"{name}.jpg",
        "height": SIZE,
        "width": SIZE,
        "input_height": SIZE,
        "input_width": SIZE,
        "status": schema.OK,
        "image": encode_jpeg(pixels),
        "embedding": encode_embedding(embedding, "fp16") if embeddings else None,
        "masks": entries if masks else None,
    }
