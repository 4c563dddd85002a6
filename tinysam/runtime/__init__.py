"""Engines that run an image encoder's ONNX graph, and the module that lets a Sam carry one."""

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
