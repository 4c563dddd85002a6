"""What can be wrong with a model's file; apart from the code that reads it, which needs torch."""

from __future__ import annotations


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message names the file, what is off and what to do."""
