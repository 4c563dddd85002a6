"""What is trained: a fresh student, with the teacher's decoder to begin with, or one to go on from."""

from __future__ import annotations

from dataclasses import replace

import torch
from segment_anything.modeling import Sam

from tinysam.distill.cache import Cache
from tinysam.modeling.checkpoint import CheckpointError, is_untrained, load
from tinysam.modeling.registry import CONFIGS, build_sam


def build_student(name: str, cache: Cache, teacher: Sam | None, *, fresh: bool = False) -> Sam:
    """A student that fits the cache.

    Args:
        name: an architecture without weights, or a shipped model or checkpoint to go on from.
        cache: decides about the image size of a student with random weights.
        teacher: whose prompt encoder and mask decoder a student with random weights takes over, if they are of the
            same shape; None leaves them random.
        fresh: random weights in any case.

    Raises:
        CheckpointError: if the student does not fit the cache; the message says what to do.
    """
    if fresh or is_untrained(name):
        config = CONFIGS[name] if name in CONFIGS else load(name).config
        student = build_sam(replace(config, image_size=cache.image_size))
        if teacher is not None and _decoder_shapes(teacher) == _decoder_shapes(student):
            student.prompt_encoder.load_state_dict(teacher.prompt_encoder.state_dict())
            student.mask_decoder.load_state_dict(teacher.mask_decoder.state_dict())
    else:
        student = load(name)
    if student.image_encoder.img_size != cache.image_size:
        raise CheckpointError(
            f"the student {name} works at {student.image_encoder.img_size} pixels, the cache at {cache.image_size}; "
            f"cache the lake with --image-size {student.image_encoder.img_size}"
        )
    channels = student.prompt_encoder.embed_dim
    if cache.embedding_shape is not None and channels != cache.embedding_shape[0]:
        raise CheckpointError(
            f"the student {name} has embeddings of {channels} channels, the cache of {cache.embedding_shape[0]}; "
            "choose a student of the teacher's width"
        )
    return student


def check_own_embeddings(student: Sam, name: str, cache: Cache) -> None:
    """Checks that a cache's embeddings are those of the student's image encoder, whatever its decoder has learnt since.

    Raises:
        CheckpointError: if they are another encoder's, or the cache has none; the message says what to do.
    """
    held = "none"
    if cache.embedding_shape is not None:
        cached, own = load(cache.teacher).image_encoder.state_dict(), student.image_encoder.state_dict()
        if cached.keys() == own.keys() and all(torch.equal(cached[key], own[key]) for key in own):
            return
        held = f"those of {cache.teacher}"
    raise CheckpointError(
        f"--trainer.freeze-encoder trains on embeddings of the student's own encoder; the cache holds {held}. "
        f"Cache the lake with pipelines/cache_teacher.py --teacher {name}."
    )


def _decoder_shapes(sam: Sam) -> dict[str, tuple[int, ...]]:
    parts = {**sam.prompt_encoder.state_dict(prefix="prompt."), **sam.mask_decoder.state_dict(prefix="mask.")}
    return {key: tuple(value.shape) for key, value in parts.items()}
