"""Engines that run ONNX graphs, and the module that lets a Sam carry one as its image encoder."""

from __future__ import annotations

from tinysam.runtime.encoder import EngineImageEncoder
from tinysam.runtime.engine import (
    Engine,
    EngineConfig,
    EngineError,
    ExecutedLayer,
    count_precisions,
    open_engine,
)

__all__ = [
    "Engine",
    "EngineConfig",
    "EngineError",
    "EngineImageEncoder",
    "ExecutedLayer",
    "count_precisions",
    "open_engine",
]
