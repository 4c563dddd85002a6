"""Synthetic scenes with exact instance masks: what the demo models start from, and what the tests look at."""

from __future__ import annotations

from tinysam.synthetic.scene import Scene, Style, scene
from tinysam.synthetic.write import write_scenes

__all__ = ["Scene", "Style", "scene", "write_scenes"]
