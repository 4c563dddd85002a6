"""The tables of the pages, made from what the benchmarks measured.

    python -m benchmarks.tables

On the pages, ``<!-- table:NAME -->`` and ``<!-- /table -->`` enclose what ``benchmarks/results/NAME.json`` comes to,
with the command that measured it and the machine. What has no such file is left as it is.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = tuple(ROOT / name for name in ("README.md", "docs/BENCHMARKS.md", "cluster/SIZING.md"))

Row = Mapping[str, Any]
Cell = Callable[[Row], str]
Columns = Mapping[str, Cell]
"""Cells by title; the first column names the row."""

BLOCK = re.compile(r"(<!-- table:(\w+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)
SA1B_IMAGES = 11.2e6
SAM_EMBEDDING = 256 * 64 * 64


def number(key: str, style: str = ".2f", scale: float = 1.0) -> Cell:
    """The figure ``key``, times ``scale``."""
    return lambda row: format(scale * row[key], style)


def text(key: str) -> Cell:
    """The entry ``key`` as it is."""
    return lambda row: str(row[key])


def _scores(key: str, title: str) -> Columns:
    """Of the ablation: a score in points of mIoU, its gain over the row above, the share of the gap that is closed."""

    def gain(row: Row) -> str:
        value = row[key]["gain"]
        return f"{100 * value['mean']:+.2f} ± {100 * value['half_width']:.2f}" if value else ""

    def gap_closed(row: Row) -> str:
        return "" if row[key]["gap_closed"] is None else f"{row[key]['gap_closed']:.0%}"

    return {
        title: lambda row: f"{100 * row[key]['score']['mean']:.2f}",
        f"gain, {title}": gain,
        f"gap closed, {title}": gap_closed,
    }


def _job_columns(first: str) -> Columns:
    return {
        first: text(first),
        "images/s": number("images/s"),
        "seconds to the first shard": number("to the first shard, s", ".0f"),
    }


def _with_deviation(key: str, style: str) -> Cell:
    """A mean and its standard deviation, where there are several draws."""

    def cell(row: Row) -> str:
        deviation = row[f"{key}_deviation"]
        return format(row[key], style) + ("" if deviation is None else f" ± {format(deviation, style)}")

    return cell


_SCALES: Columns = {
    "bits": text("bits"),
    "scales by": text("method"),
    "box mIoU": _with_deviation("box_miou", ".4f"),
    "IoU with the float model's masks": _with_deviation("agreement", ".4f"),
    "CPU s": number("seconds", ".0f"),
}
_GPU: Columns = {
    "encoder": text("variant"),
    "images/s": number("images_per_second", ".1f"),
    "of the ceiling": number("share_of_ceiling", ".0%"),
    "relative error": number("relative_error", ".4f"),
}
_LOOP = _job_columns("variant") | {"of the plain loop": number("share", ".1%")}

TABLES: dict[str, Columns] = {
    "everything": {
        "variant": text("variant"),
        "photograph": text("photograph"),
        "encoder": number("encode"),
        "decoder": number("decode"),
        "masks": number("masks"),
        "all, CPU s": number("cpu_seconds"),
        "speed-up": number("speedup", ".1f"),
        "peak memory, GiB": number("peak_mib", ".1f", 1 / 1024),
        "masks found": text("n_masks"),
        "mean IoU with segment-anything's": number("mean_iou", ".3f"),
    },
    "rounds": {
        "setting": text("setting"),
        "mIoU": number("miou", ".3f"),
        "AR@1000": number("ar_1000", ".3f"),
        "masks an image": number("masks", ".0f"),
        "of the flat grid's mIoU": number("share_of_miou", ".1%"),
        "of its time": number("share_of_time", ".0%"),
    },
    "predictor": {
        "variant": text("variant"),
        "set_image, CPU ms": number("set_image_cpu_seconds", ".0f", 1000),
        "speed-up": number("set_image_speedup", ".1f"),
        "a point, CPU ms": number("point_cpu_seconds", ".0f", 1000),
        "a box, CPU ms": number("box_cpu_seconds", ".0f", 1000),
        "speed-up of a box": number("box_speedup", ".1f"),
        "IoU": number("iou", ".4f"),
    },
    "quantization": {
        "encoder": text("variant"),
        "ms of CPU": number("cpu_ms", ".0f"),
        "speed-up": number("speedup", ".1f"),
        "bytes of the whole model": number("share_of_bytes", ".0%"),
    },
    "scales": _SCALES,
    "integer_scales": _SCALES,
    "training": {
        "variant": text("variant"),
        "images/s": number("images_per_second"),
        "of the plain loop": number("share_of_plain", ".0%"),
        "waiting for data": number("waiting_share", ".1%"),
    },
    "gpu_vit_h": _GPU,
    "gpu_vit_t": _GPU,
    "distillation": {
        "recipe": text("recipe"),
        **_scores("box", "box"),
        **_scores("click", "1 click"),
        **_scores("click_3", "3 clicks"),
    },
    "codecs": {
        "codec": text("codec"),
        "bytes a value": number("bytes_per_value"),
        "SA-1B, TB": number("bytes_per_value", ".1f", SA1B_IMAGES * SAM_EMBEDDING / 1e12),
        "relative error": number("relative_error", ".2%"),
        "box: IoU with the exact mask": number("box_iou_with_exact", ".4f"),
        "box: with the truth": number("box_iou", ".4f"),
        "click: with the exact mask": number("click_iou_with_exact", ".4f"),
        "click: with the truth": number("click_iou", ".4f"),
    },
    "planning": {
        "step": text("step"),
        "seconds": number("seconds", ".1f"),
        "peak MiB of the process": number("peak MiB", ".0f"),
    },
    "driving": _job_columns("workers") | {"of the possible": number("efficiency", ".1%")},
    "cache_teacher": _LOOP,
    "label_images": _LOOP,
}


def render(name: str, results: Mapping[str, Any]) -> str:
    """A benchmark's results as Markdown, with a line below that says where they come from."""
    columns = TABLES[name]
    lines = [" | ".join(columns), " | ".join(["---", *["---:"] * (len(columns) - 1)])]
    lines += [" | ".join(cell(row) for cell in columns.values()) for row in results["results"]]
    table = "\n".join(f"| {line} |" for line in lines)
    return f"{table}\n\n`{results['command']}`, {_machine(results)}\n"


def _machine(results: Mapping[str, Any]) -> str:
    machine, versions = results["machine"], results["versions"]
    gpus = machine.get("gpus")
    parts = [machine["processor"], f"{machine['cpus']} CPU{'s' * (machine['cpus'] != 1)}", *(gpus or ())]
    return f"on {', '.join(parts)}; torch {versions['torch']}, Ray {versions['ray']}."


def refresh(page: str, results: Path = RESULTS) -> str:
    """A page with every table that has results made anew."""

    def block(found: re.Match[str]) -> str:
        begin, name, _, end = found.groups()
        path = results / f"{name}.json"
        if not path.exists():
            return found[0]
        return begin + render(name, json.loads(path.read_text(encoding="utf-8"))) + end

    return BLOCK.sub(block, page)


def main() -> int:
    """Brings the pages up to date and names those that changed."""
    for path in PAGES:
        before = path.read_text(encoding="utf-8")
        after = refresh(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            sys.stdout.write(f"{path.relative_to(ROOT)}: tables brought up to date\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
