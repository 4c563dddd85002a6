"""Checkpoints of a training run: weights as safetensors, the optimizer beside them, a pointer written last."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass

import safetensors.torch
import torch
from segment_anything.modeling import Sam

from tinysam.lake.filesystem import exists, join, open_filesystem, read_bytes, write_once
from tinysam.modeling.checkpoint import checkpoint_bytes

LATEST = "latest.json"
KEPT = 2


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    """Optimizer steps made."""
    epoch: int = 0
    """Epochs finished."""
    shards_done: int = 0
    """Shards of the present epoch's order that are finished."""


def save_progress(url: str, progress: Progress, student: Sam, averaged: Sam, optimizer: torch.optim.Optimizer) -> None:
    """Writes ``<url>/step-NNNNNNNN/`` and then ``<url>/latest.json``, so that a kill leaves the checkpoint before.

    Older checkpoints than the last two are deleted.
    """
    name = f"step-{progress.step:08d}"
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    write_once(join(url, name, "student.safetensors"), checkpoint_bytes(student))
    write_once(join(url, name, "averaged.safetensors"), checkpoint_bytes(averaged))
    write_once(join(url, name, "optimizer.pt"), buffer.getvalue())
    write_once(join(url, LATEST), json.dumps({"checkpoint": name, **asdict(progress)}).encode())
    fs, path = open_filesystem(url)
    folders = sorted(entry for entry in fs.ls(path, detail=False) if "step-" in entry.rstrip("/").rsplit("/", 1)[-1])
    for old in folders[:-KEPT]:
        fs.rm(old, recursive=True)


def load_progress(url: str, student: Sam, averaged: Sam, optimizer: torch.optim.Optimizer) -> Progress | None:
    """Restores the newest checkpoint in place; None if there is none."""
    if not exists(join(url, LATEST)):
        return None
    latest = json.loads(read_bytes(join(url, LATEST)))
    folder = join(url, latest.pop("checkpoint"))
    student.load_state_dict(safetensors.torch.load(read_bytes(join(folder, "student.safetensors"))))
    averaged.load_state_dict(safetensors.torch.load(read_bytes(join(folder, "averaged.safetensors"))))
    state = torch.load(io.BytesIO(read_bytes(join(folder, "optimizer.pt"))), map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state)
    return Progress(**latest)
