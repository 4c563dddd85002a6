from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from segment_anything.modeling import Sam

from tinysam.distill.cache import Cache, open_cache
from tinysam.distill.student import check_own_embeddings
from tinysam.modeling.checkpoint import CheckpointError, save_checkpoint


@pytest.fixture
def own_cache(make_cache: Callable[..., str], tiny_sam: Sam, tmp_path: Path) -> Cache:
    """As its metadata say, of ``tiny_sam``'s embeddings."""
    path = str(tmp_path / "tiny.safetensors")
    save_checkpoint(tiny_sam, path)
    return open_cache([make_cache("own", metadata={"teacher": path})])


def test_embeddings_stay_a_models_own_while_its_decoder_learns(own_cache: Cache, tiny_sam: Sam) -> None:
    student = copy.deepcopy(tiny_sam)
    with torch.no_grad():
        student.mask_decoder.iou_token.weight.add_(1)
    check_own_embeddings(student, "tuned", own_cache)


def test_embeddings_of_another_encoder_are_refused_with_the_job_that_makes_the_right_ones(
    own_cache: Cache, tiny_sam: Sam
) -> None:
    student = copy.deepcopy(tiny_sam)
    with torch.no_grad():
        next(student.image_encoder.parameters()).add_(1e-3)
    with pytest.raises(CheckpointError, match=r"those of .*cache_teacher.py --teacher other"):
        check_own_embeddings(student, "other", own_cache)


def test_a_cache_without_embeddings_is_refused(make_cache: Callable[..., str], tiny_sam: Sam) -> None:
    cache = open_cache([make_cache("c", embeddings=False)])
    with pytest.raises(CheckpointError, match="holds none"):
        check_own_embeddings(tiny_sam, "m", cache)
