"""TinySAM: distil Segment Anything, quantize it, and segment everything with it. Needs no Ray."""

from tinysam.modeling.checkpoint import CheckpointError, load, save_checkpoint
from tinysam.modeling.registry import SamConfig, TinyViTConfig, ViTConfig, build_sam, sam_model_registry

__all__ = [
    "CheckpointError",
    "SamConfig",
    "TinyViTConfig",
    "ViTConfig",
    "build_sam",
    "load",
    "sam_model_registry",
    "save_checkpoint",
]
