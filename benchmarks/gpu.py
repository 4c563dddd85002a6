"""Image encoders on a GPU: segment-anything's own against each engine of this project.

    python -m benchmarks.gpu --checkpoint vit_h --batch-size 8
    python -m benchmarks.gpu --checkpoint vit_t --batch-size 32

Images a second of batches that lie in the GPU's memory already, measured in turns; medians. The ceiling is what the GPU
reaches in a large product of bfloat16 matrices, so "of the ceiling" is the share of it that an encoder's own arithmetic
comes to. The error is that of the embedding, relative to float32. Weights may be random: they cost the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import segment_anything
import torch
import tyro
from rich.console import Console
from rich.table import Table
from segment_anything.modeling import Sam
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.inputs import load_or_random
from benchmarks.results import write_results
from tinysam.runtime.choice import TorchEngine, with_engine
from tinysam.runtime.engine import EngineError

REFERENCE = "segment-anything"
CEILING_SIDE = 8192
"""Of the matrices whose product tells the ceiling."""


@dataclass(frozen=True, kw_only=True)
class GpuBenchmark:
    """Speed of image encoders on a GPU."""

    checkpoint: str = "vit_h"
    """What tinysam.load takes, or the name of an architecture, which gets random weights."""
    batch_size: int = 8
    """Images that are encoded together."""
    engines: tuple[TorchEngine, ...] = get_args(TorchEngine)
    """Of this project, in bfloat16."""
    repeats: int = 9
    """Measurements of each encoder."""
    output: Path | None = None
    """JSON file for the results."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.repeats < 1:
            raise ValueError("--batch-size and --repeats must be at least 1")


def reference_encoder(config: GpuBenchmark, sam: Sam) -> nn.Module | None:
    """segment-anything's own encoder with the same weights; None for architectures that it has not."""
    build = segment_anything.sam_model_registry.get(config.checkpoint)
    if build is None:
        return None
    encoder: nn.Module = build().image_encoder
    encoder.load_state_dict(sam.image_encoder.state_dict())
    return encoder.eval()


def encoders(config: GpuBenchmark, sam: Sam, console: Console) -> dict[str, tuple[nn.Module, bool]]:
    """Encoders by name, and whether they are called in bfloat16; float32 torch first. Names what cannot run here."""
    found: dict[str, tuple[nn.Module, bool]] = {"torch float32": (sam.image_encoder, False)}
    reference = reference_encoder(config, sam)
    if reference is not None:
        reference = reference.to(sam.device)
        found |= {f"{REFERENCE} float32": (reference, False), f"{REFERENCE} bfloat16": (reference, True)}
    for engine in config.engines:
        try:
            found[f"{engine} bfloat16"] = (with_engine(sam, engine).image_encoder, True)
        except EngineError as error:
            console.print(f"left out: {error}", markup=False, highlight=False)
    return found


def milliseconds(call: Callable[[], Any]) -> float:
    """Of one call, on the GPU's own clock."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def ceiling(repeats: int) -> float:
    """Operations a second of a large product in bfloat16."""
    matrix = torch.randn(CEILING_SIDE, CEILING_SIDE, device="cuda", dtype=torch.bfloat16)
    times = [milliseconds(lambda: matrix @ matrix) for _ in range(repeats + 2)][2:]
    return 2 * CEILING_SIDE**3 / (statistics.median(times) / 1000)


@torch.inference_mode()
def measure(config: GpuBenchmark, console: Console) -> list[dict[str, Any]]:
    """A row an encoder."""
    torch.manual_seed(0)
    sam = load_or_random(config.checkpoint).to("cuda")
    side = sam.image_encoder.img_size
    images = torch.randn(config.batch_size, 3, side, side, device="cuda")
    with FlopCounterMode(display=False) as counter:
        sam.image_encoder(images[:1])
    variants = encoders(config, sam, console)

    def encode(name: str) -> torch.Tensor:
        encoder, bf16 = variants[name]
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            embeddings: torch.Tensor = encoder(images)
        return embeddings.float()

    exact = encode("torch float32")
    errors = {name: float((encode(name) - exact).norm() / exact.norm()) for name in variants}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(config.repeats + 1):  # the first time warms up
        for name in variants:
            spent = milliseconds(lambda name=name: encode(name))
            if number:
                times[name].append(spent)
    most = ceiling(config.repeats) / counter.get_total_flops()
    rows = []
    for name, values in times.items():
        rate = 1000 * config.batch_size / statistics.median(values)
        rows.append(
            {
                "variant": name,
                "images_per_second": rate,
                "share_of_ceiling": rate / most,
                "relative_error": errors[name],
            }
        )
    return rows


def as_table(config: GpuBenchmark, rows: list[dict[str, Any]]) -> Table:
    """The results for people."""
    title = f"{config.checkpoint}, batches of {config.batch_size}, {torch.cuda.get_device_name()}"
    table = Table("encoder", "images/s", "of the ceiling", "relative error", title=title)
    for row in rows:
        rate, share = f"{row['images_per_second']:.1f}", f"{row['share_of_ceiling']:.0%}"
        table.add_row(row["variant"], rate, share, f"{row['relative_error']:.4f}")
    return table


def main() -> None:
    """Measures, prints a table, and writes the results."""
    config = tyro.cli(GpuBenchmark, description=__doc__)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu needs a GPU that torch can use; this machine has none")
    console = Console(width=max(Console().width, 110))
    rows = measure(config, console)
    console.print(as_table(config, rows))
    if config.output is not None:
        write_results(config.output, config, rows)


if __name__ == "__main__":
    main()
