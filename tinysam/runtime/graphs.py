"""ONNX graphs that are exported once on a machine."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from tinysam.lake.filesystem import read_bytes, write_once
from tinysam.weights import weights_folder


def default_folder() -> Path:
    """Where graphs are kept: not beside the checkpoint, which may lie in a bucket."""
    return weights_folder() / "graphs"


def cached_graph(path: Path, export: Callable[[], bytes]) -> bytes:
    """The graph at ``path``, which is exported there if it is missing."""
    if path.exists():
        return read_bytes(str(path))
    graph = export()
    # Whole or not at all: other workers of this machine may look for it right now.
    write_once(str(path), graph)
    return graph


def require_finite(module: nn.Module, what: str) -> None:
    """Refuses damaged weights, which engines may hide: their maximum of NaN and 0 is 0.

    Raises:
        FloatingPointError: a weight is NaN or infinite.
    """
    for name, value in module.state_dict().items():
        if not torch.isfinite(value).all():
            raise FloatingPointError(f"{what} is damaged: its weight {name} holds NaN or infinity")


def identity(module: nn.Module, *facts: object) -> str:
    """A hash of all that a graph of ``module`` depends on: its structure and weights, torch, and ``facts``."""
    digest = hashlib.sha256(f"{torch.__version__} {facts} {module}".encode())
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Holds back the exporter's progress messages and its warnings about torch itself."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        exporter.setLevel(logging.ERROR)
        try:
            yield
        finally:
            exporter.setLevel(level)
