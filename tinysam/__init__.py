"""TinySAM: distil Segment Anything, quantize it, and segment everything with it. Needs no Ray."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinysam.everything import SamAutomaticMaskGenerator, SamHierarchicalMaskGenerator
    from tinysam.modeling.checkpoint import load, save_checkpoint
    from tinysam.modeling.errors import CheckpointError
    from tinysam.modeling.registry import SamConfig, TinyViTConfig, ViTConfig, build_sam, sam_model_registry
    from tinysam.predictor import SamPredictor
    from tinysam.runtime.choice import with_engine

__all__ = [
    "CheckpointError",
    "SamAutomaticMaskGenerator",
    "SamConfig",
    "SamHierarchicalMaskGenerator",
    "SamPredictor",
    "TinyViTConfig",
    "ViTConfig",
    "build_sam",
    "load",
    "sam_model_registry",
    "save_checkpoint",
    "with_engine",
]

# Resolved on first use: `tinysam --help` and the lake layer need not wait seconds for torch.
_HOME_OF = {
    "SamAutomaticMaskGenerator": "tinysam.everything",
    "SamHierarchicalMaskGenerator": "tinysam.everything",
    "SamPredictor": "tinysam.predictor",
    "CheckpointError": "tinysam.modeling.errors",
    "load": "tinysam.modeling.checkpoint",
    "save_checkpoint": "tinysam.modeling.checkpoint",
    "SamConfig": "tinysam.modeling.registry",
    "TinyViTConfig": "tinysam.modeling.registry",
    "ViTConfig": "tinysam.modeling.registry",
    "build_sam": "tinysam.modeling.registry",
    "sam_model_registry": "tinysam.modeling.registry",
    "with_engine": "tinysam.runtime.choice",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
