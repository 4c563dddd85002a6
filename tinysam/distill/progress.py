"""Checkpoints of a training run: weights as safetensors, the optimizer beside them, a pointer written last."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass

import torch
from segment_anything.modeling import Sam

from tinysam.distill.dense import DenseHead
from tinysam.distill.difficulty import Difficulty, load_difficulty, save_difficulty
from tinysam.lake.filesystem import exists, join, open_filesystem, read_bytes, write_once
from tinysam.modeling.checkpoint import CheckpointError, checkpoint_bytes, load_weights

LATEST = "latest.json"
BEST = "best.safetensors"
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
    best_score: float | None = None
    """The highest score in validation so far."""


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What a checkpoint holds beside the progress; restored in place."""

    student: Sam
    averaged: Sam
    optimizer: torch.optim.Optimizer
    dense_head: DenseHead | None = None


def save_progress(
    url: str, progress: Progress, state: TrainingState, difficulty: Difficulty, weights: dict[str, float]
) -> None:
    """Writes ``<url>/step-NNNNNNNN/`` and then ``<url>/latest.json``, so that a kill leaves the checkpoint before.

    Older checkpoints than the last two are deleted.
    """
    name = f"step-{progress.step:08d}"
    buffer = io.BytesIO()
    head = {} if state.dense_head is None else state.dense_head.state_dict()
    torch.save({"optimizer": state.optimizer.state_dict(), "dense_head": head}, buffer)
    write_once(join(url, name, "student.safetensors"), checkpoint_bytes(state.student))
    write_once(join(url, name, "averaged.safetensors"), checkpoint_bytes(state.averaged))
    write_once(join(url, name, "optimizer.pt"), buffer.getvalue())
    if difficulty.values:
        save_difficulty(join(url, name, "difficulty.parquet"), difficulty, weights)
    write_once(join(url, LATEST), json.dumps({"checkpoint": name, **asdict(progress)}).encode())
    fs, path = open_filesystem(url)
    folders = sorted(entry for entry in fs.ls(path, detail=False) if "step-" in entry.rstrip("/").rsplit("/", 1)[-1])
    for old in folders[:-KEPT]:
        fs.rm(old, recursive=True)


def save_best(url: str, averaged: Sam, scores: dict[str, float]) -> None:
    """Writes ``<url>/best.safetensors``, with the scores in its metadata."""
    metadata = {name: f"{value:.6g}" for name, value in scores.items()}
    write_once(join(url, BEST), checkpoint_bytes(averaged, metadata))


def load_progress(url: str, state: TrainingState) -> tuple[Progress, Difficulty, dict[str, float]]:
    """Restores the newest checkpoint in place; a run that has none is at its beginning.

    Returns:
        The progress, the difficulties, and the weights that the present epoch draws images with.

    Raises:
        CheckpointError: if the checkpoint is of another architecture or cannot be read; the message names it.
    """
    if not exists(join(url, LATEST)):
        return Progress(), Difficulty(), {}
    latest = json.loads(read_bytes(join(url, LATEST)))
    folder = join(url, latest.pop("checkpoint"))
    load_weights(state.student, join(folder, "student.safetensors"))
    load_weights(state.averaged, join(folder, "averaged.safetensors"))
    optimizer_url = join(folder, "optimizer.pt")
    try:
        saved = torch.load(io.BytesIO(read_bytes(optimizer_url)), map_location="cpu", weights_only=True)
        state.optimizer.load_state_dict(saved["optimizer"])
        if state.dense_head is not None:
            state.dense_head.load_state_dict(saved["dense_head"])
    except (RuntimeError, ValueError, KeyError, EOFError) as error:
        raise CheckpointError(
            f"{optimizer_url}: not the optimizer of this student ({error}). --overwrite starts over."
        ) from error
    return Progress(**latest), *load_difficulty(join(folder, "difficulty.parquet"))
