"""Strides of what a student is trained on, in pixels of the model's input."""

from __future__ import annotations

from tinysam.lake import schema

EMBEDDING_STRIDE = 16
LOW_RES_STRIDE = 4
"""Of the mask decoder's logits."""
TARGET_STRIDE = schema.MASK_STRIDE
"""Of the ground truth: half the logits', which are resized to it, so that a student learns where within its pixels a
boundary runs."""
