"""Outputs of jobs, small and made up."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tests.plans import plan_of
from tinysam.lake import schema
from tinysam.lake.index import IndexConfig, build_index
from tinysam.lake.plan import write_index
from tinysam.lake.rle import encode_rle, rle_area, rle_bbox
from tinysam.lake.run_record import RunRecord
from tinysam.lake.shards import COUNTS_KEY, FINGERPRINT_KEY, SCHEMA_VERSION_KEY, SHARDS_FOLDER, write_shard

SIZE = (48, 64)
FINGERPRINT = "0123456789abcdef"

MakeLabels = Callable[..., Path]


def make_mask(rng: np.random.Generator, predicted_iou: float, size: tuple[int, int] = SIZE) -> dict[str, Any]:
    """A random box as a row's mask."""
    height, width = size
    top, left = rng.integers(0, height - 8), rng.integers(0, width - 8)
    mask = np.zeros(size, bool)
    mask[top : top + rng.integers(3, 8), left : left + rng.integers(3, 8)] = True
    rle = encode_rle(mask)
    return {
        **rle,
        "bbox": rle_bbox(rle),
        "area": rle_area(rle),
        "predicted_iou": predicted_iou,
        "stability_score": 0.97,
        "point_coords": [[float(left), float(top)]],
    }


@pytest.fixture
def make_labels(tmp_path: Path, rng: np.random.Generator) -> MakeLabels:
    """Makes a lake, and the output that a label job would leave.

    ``images`` maps image ids to the predicted IoU of each mask, or to a status and an error. ``done`` leaves out all
    but the first shards. ``record`` leaves out ``run.json`` if False.
    """

    def make(
        images: Mapping[str, Sequence[float] | tuple[str, str]],
        *,
        done: int | None = None,
        record: bool = True,
        images_per_shard: int = 5,
    ) -> Path:
        lake, output = tmp_path / "lake", tmp_path / "labels"
        for name, what in images.items():
            path = lake / name
            path.parent.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(buffer, "PNG")
            broken = len(what) == 2 and what[0] == "truncated"
            path.write_bytes(buffer.getvalue()[:100] if broken else buffer.getvalue())
        plan = plan_of(build_index(IndexConfig(lake=str(lake))), images_per_shard=images_per_shard)
        counts: dict[str, int] = {}
        for shard in plan[:done]:
            rows = []
            for row in shard.rows.to_pylist():
                what = images[row["image_id"]]
                out = {"image_id": row["image_id"], "uri": row["uri"], "status": schema.OK}
                if what and isinstance(what[0], str):
                    out |= {"status": what[0], "error": what[1]}
                else:
                    out |= {"height": SIZE[0], "width": SIZE[1], "masks": [make_mask(rng, float(v)) for v in what]}
                counts[out["status"]] = counts.get(out["status"], 0) + 1
                rows.append(out)
            metadata = {
                FINGERPRINT_KEY: FINGERPRINT,
                SCHEMA_VERSION_KEY: str(schema.SCHEMA_VERSION),
                COUNTS_KEY: json.dumps(Counter(row["status"] for row in rows)),
            }
            table = pa.Table.from_pylist(rows, schema=schema.MASKS)
            write_shard(str(output / SHARDS_FOLDER), shard.shard_id, table, metadata)
        write_index(str(output), plan)
        if record:
            RunRecord(
                job="label_images",
                config={"lake": str(lake), "quantized": None, "student": "demo_student"},
                fingerprint=FINGERPRINT,
                counts=counts,
                seconds=12.5,
                images_per_second=3.2,
                time_split={"segment": 20.0, "read": 1.0},
                extra={"finished": done is None, "num_workers": 2, "bytes_read": 4096},
            ).write(str(output))
        return output

    return make


@pytest.fixture
def make_stages(tmp_path: Path) -> Callable[[], dict[str, Path]]:
    """Makes the outputs of the other jobs, as far as the report reads them."""

    def metric(value: float | None) -> dict[str, Any]:
        bound = None if value is None else value
        return {"value": value, "low": bound, "high": bound, "n": 12, "images": 4}

    def make() -> dict[str, Path]:
        folders = {name: tmp_path / name for name in ("cache", "student", "quantized", "scores")}
        for folder in folders.values():
            folder.mkdir()
        RunRecord(
            job="cache_teacher",
            config={},
            fingerprint="a",
            seconds=5.0,
            images_per_second=8.0,
            time_split={"embed": 9.0},
        ).write(str(folders["cache"]))
        RunRecord(job="distill", config={}, fingerprint="b", seconds=60.0).write(str(folders["student"]))
        (folders["student"] / "history.csv").write_text(
            "step,loss,embedding,val_box\n1,4.0,1.0,\n2,2.0,,\n2,,,0.5\n3,nan,0.25,\n4,1.0,broken,\n4,,,0.75\n"
        )
        RunRecord(
            job="quantize",
            config={"api_key": "hunter2"},
            fingerprint="c",
            extra={
                "finished": True,
                "engine": "openvino",
                "calibration_bytes": 3 << 20,
                "layers": 40,
                "layers_int8": 38,
                "bytes_float_encoder": 8 << 20,
                "bytes_int8_encoder": 2 << 20,
                "mask_iou": 0.9712,
                "mask_iou_90": 0.95,
                "torch_fp32_ms": 200.0,
                "engine_fp32_ms": 100.0,
                "int8_ms": 50.0,
            },
        ).write(str(folders["quantized"]))
        models = {"demo_teacher": 0.9, "demo_student": 0.8}
        results = {
            "evaluation": {},
            "datasets": {
                "held out": {
                    "images": 4,
                    "checkpoints": {
                        name: {
                            "metrics": {
                                "box_miou": metric(value),
                                "click_miou_1": metric(value - 0.2),
                                "click_miou_2": metric(value - 0.1),
                                "ap": metric(None),
                                "masks_per_image": metric(31.5),
                            }
                        }
                        for name, value in models.items()
                    },
                }
            },
        }
        (folders["scores"] / "results.json").write_text(json.dumps(results))
        RunRecord(job="evaluate", config={}, fingerprint="d", seconds=30.0).write(str(folders["scores"]))
        for name in models:
            RunRecord(
                job=f"evaluate {name}",
                config={},
                fingerprint="e",
                seconds=15.0,
                images_per_second=0.25,
                time_split={"encoder": 3.0, "decoder": 5.0},
            ).write(str(folders["scores"] / name))
        return folders

    return make
