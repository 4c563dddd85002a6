"""Fixtures shared by every suite."""

from __future__ import annotations

import os
from collections.abc import Iterator

# A test machine has few cores: one thread each keeps parallel Ray workers from fighting over them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray starts its workers at niceness 15: beside any other load they get a thirtieth of a core, and every wait times out.
os.environ.setdefault("RAY_worker_niceness", "0")

import numpy as np
import pytest
import torch
from segment_anything.modeling import Sam


@pytest.fixture(scope="session", autouse=True)
def _home_of_this_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Checkpoints and graphs that a test fetches or exports are not those of the user."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TINYSAM_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Gives every parameter and buffer a non-trivial value: zero biases and unit scales would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if not value.is_floating_point() or name.startswith("pixel_"):
                continue
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("running_var"):
                value.copy_(1 + 0.3 * noise.abs())
            elif value.ndim < 2:
                value.add_(0.1 * noise)
            elif value.std() < 1e-4:
                value.copy_(0.02 * noise)


@pytest.fixture(scope="session")
def tiny_sam() -> Sam:
    """A small Sam of vit_t's architecture: image size 128, prompt_embed_dim 32, random weights. Do not modify."""
    from tinysam.modeling.registry import SamConfig, TinyViTConfig, build_sam

    torch.manual_seed(0)
    config = SamConfig(
        image_size=128,
        prompt_embed_dim=32,
        decoder_mlp_dim=64,
        encoder=TinyViTConfig(embed_dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), num_heads=(2, 2, 3, 4)),
    )
    sam = build_sam(config)
    randomise(sam)
    return sam.eval()
