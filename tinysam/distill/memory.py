"""Activation checkpointing: memory for arithmetic, by computing activations a second time in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


def recomputed(function: Callable[..., T], *args: Any) -> T:
    """``function(*args)``, which keeps its arguments and results for the backward pass and nothing in between.

    The function must draw no random numbers.
    """
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def recompute_blocks(encoder: nn.Module) -> None:
    """Makes each block of an image encoder (TinyViT's or SAM's ViT) forget its activations, in place.

    A block is what lies in a list of modules named ``blocks``. Keys of the state dict stay as they are.
    """
    for name, blocks in encoder.named_modules():
        if name.rsplit(".", 1)[-1] == "blocks" and isinstance(blocks, nn.Sequential | nn.ModuleList):
            for block in blocks:
                # Assigned on the instance: a wrapping module would rename the weights.
                block.forward = partial(
                    checkpoint, block.forward, use_reentrant=False, context_fn=partial(_contexts, block)
                )


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _running_statistics_kept(block)


@contextmanager
def _running_statistics_kept(block: nn.Module) -> Iterator[None]:
    """The second pass sees the same batch; counting it again would hurry BatchNorm's running statistics."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    counts = [count for norm in norms if (count := norm.num_batches_tracked) is not None]
    before = [count.clone() for count in counts]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for count, old in zip(counts, before, strict=True):
            count.copy_(old)
