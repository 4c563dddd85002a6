"""Image embeddings as bytes.

======== ==================== ============================================ =================================
codec    bytes per image      largest error of a value x in channel c      bytes of (256, 64, 64), SAM's own
======== ==================== ============================================ =================================
``fp16`` 2 C H W              abs(x) / 2048, or 2^-25 where that is larger 2,097,152
``int8`` C H W + 4 C          max(abs(channel c)) / 254                    1,049,600
``int6`` C H W + 4 C          max(abs(channel c)) / 62                     1,049,600, much less in a shard
======== ==================== ============================================ =================================

``fp16`` is C order, little endian, so ``numpy.frombuffer(data, "<f2")`` reads it without this module. ``int8`` is C
float32 scales (little endian), then C H W signed bytes in C order; a value is its byte times its channel's scale.
One scale a channel, because channels of SAM's neck differ in range by an order of magnitude.

``int6`` is the same with values up to 31 in place of 127, of which each row holds the first and then the differences
from one to the next. As neighbours are alike, those are small, and the shard's zstd stores them in less than 5 bits.
What each costs in a shard, and what it does to the teacher's masks: ``benchmarks/codecs.py``. All our choice.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np

Codec = Literal["fp16", "int8", "int6"]

_TOPS: dict[Codec, int] = {"int8": 127, "int6": 31}


def encode_embedding(embedding: np.ndarray, codec: Codec) -> bytes:
    """Encodes an image embedding.

    Args:
        embedding: (C, H, W) float32 or float16, finite; for ``fp16`` within ±65504.
        codec: The module's table tells size and error of each.

    Returns:
        ``encoded_size(embedding.shape, codec)`` bytes.

    Raises:
        ValueError: If the embedding is not three-dimensional, not finite, too large for ``fp16``, or the codec unknown.
    """
    if embedding.ndim != 3:
        raise ValueError(f"an embedding is (C, H, W), not {embedding.shape}")
    if not np.isfinite(embedding).all():
        raise ValueError("the embedding holds NaN or infinity: the encoder overflowed; run it in float32 or bfloat16")
    if codec == "fp16":
        if np.abs(embedding).max(initial=0.0) > np.finfo(np.float16).max:
            raise ValueError("the embedding exceeds fp16's range of ±65504; use int8 or int6")
        return np.ascontiguousarray(embedding, dtype="<f2").tobytes()
    top = _top(codec)
    values = embedding.astype(np.float32)
    scales = (np.abs(values).max(axis=(1, 2), initial=0.0) / top).astype("<f4")
    divisors = np.where(scales > 0, scales, 1).astype(np.float32)[:, None, None]
    quantized = np.clip(np.rint(values / divisors), -top, top).astype(np.int8)
    if codec == "int6":
        quantized = np.diff(quantized, axis=2, prepend=np.int8(0))
    return scales.tobytes() + quantized.tobytes()


def decode_embedding(data: bytes, shape: tuple[int, int, int], codec: Codec) -> np.ndarray:
    """Decodes what ``encode_embedding`` made.

    Args:
        data: The bytes.
        shape: (C, H, W).
        codec: The codec that made them.

    Returns:
        (C, H, W) float32, writable.

    Raises:
        ValueError: If the number of bytes is not that of the shape and codec, or the codec is unknown.
    """
    expected = encoded_size(shape, codec)
    if len(data) != expected:
        raise ValueError(f"a {codec} embedding of shape {tuple(shape)} takes {expected} bytes, not {len(data)}")
    if codec == "fp16":
        return np.frombuffer(data, dtype="<f2").reshape(shape).astype(np.float32)
    scales = np.frombuffer(data, dtype="<f4", count=shape[0]).astype(np.float32)
    quantized = np.frombuffer(data, dtype=np.int8, offset=scales.nbytes).reshape(shape)
    if codec == "int6":
        quantized = np.cumsum(quantized, axis=2, dtype=np.int8)
    return np.multiply(quantized, scales[:, None, None], dtype=np.float32)


def encoded_size(shape: tuple[int, int, int], codec: Codec) -> int:
    """Tells how many bytes an embedding of ``shape`` (C, H, W) takes.

    Raises:
        ValueError: If the codec is unknown.
    """
    if codec == "fp16":
        return 2 * math.prod(shape)
    _top(codec)
    return math.prod(shape) + 4 * shape[0]


def _top(codec: Codec) -> int:
    """The largest integer that a codec stores."""
    if codec not in _TOPS:
        raise ValueError(f"unknown codec {codec!r}; choose {', '.join(get_args(Codec))}")
    return _TOPS[codec]
