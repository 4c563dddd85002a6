from __future__ import annotations

from typing import get_args

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from tinysam.lake.codecs import Codec, decode_embedding, encode_embedding, encoded_size
from tinysam.lake.shards import serialize

CODECS = get_args(Codec)
SHAPES = hnp.array_shapes(min_dims=3, max_dims=3, max_side=6)
EMBEDDINGS = SHAPES.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=st.floats(-60_000, 60_000, width=32)))


@settings(deadline=None)
@given(EMBEDDINGS)
def test_fp16_error_is_within_its_bound(embedding: np.ndarray) -> None:
    decoded = decode_embedding(encode_embedding(embedding, "fp16"), embedding.shape, "fp16")
    error = np.abs(decoded.astype(np.float64) - embedding)
    assert (error <= np.maximum(np.abs(embedding.astype(np.float64)) / 2048, 2.0**-25)).all()


@pytest.mark.parametrize(("codec", "top"), [("int8", 127), ("int6", 31)])
@settings(deadline=None)
@given(EMBEDDINGS)
def test_error_of_integers_is_within_its_bound(codec: Codec, top: int, embedding: np.ndarray) -> None:
    decoded = decode_embedding(encode_embedding(embedding, codec), embedding.shape, codec)
    largest = np.abs(embedding.astype(np.float64)).max(axis=(1, 2), keepdims=True)
    error = np.abs(decoded.astype(np.float64) - embedding)
    # One part in a million for float32 arithmetic; the smallest float32 where a scale has no more precision left.
    assert (error <= largest / (2 * top) * (1 + 1e-6) + top * 2.0**-149).all()


@pytest.mark.parametrize(("codec", "per_image"), [("fp16", 2_097_152), ("int8", 1_049_600), ("int6", 1_049_600)])
def test_sams_embedding_takes_the_documented_bytes(codec: Codec, per_image: int, rng: np.random.Generator) -> None:
    embedding = rng.normal(size=(256, 64, 64)).astype(np.float32)
    assert len(encode_embedding(embedding, codec)) == encoded_size(embedding.shape, codec) == per_image


def test_int8_keeps_the_precision_of_a_quiet_channel_beside_a_loud_one() -> None:
    embedding = np.stack([np.full((2, 2), 1000.0), [[0.01, -0.005], [0.0, 0.002]]]).astype(np.float32)
    decoded = decode_embedding(encode_embedding(embedding, "int8"), embedding.shape, "int8")
    assert np.abs(decoded[1] - embedding[1]).max() <= 0.01 / 254 * 1.001


def test_typical_embeddings_lose_less_than_a_hundredth(rng: np.random.Generator) -> None:
    embedding = (rng.normal(size=(32, 16, 16)) * rng.uniform(0.01, 1, (32, 1, 1))).astype(np.float32)
    relative = {}
    for codec in CODECS:
        decoded = decode_embedding(encode_embedding(embedding, codec), embedding.shape, codec)
        relative[codec] = np.linalg.norm(decoded - embedding) / np.linalg.norm(embedding)
    assert relative["fp16"] < 3e-4
    assert relative["int8"] < 1e-2
    assert relative["int6"] < 4e-2


def test_a_shard_holds_int6_in_less_than_two_thirds_of_int8(rng: np.random.Generator) -> None:
    noise = rng.normal(size=(32, 32, 32))
    smooth = ndimage.gaussian_filter(noise, (0, 1, 1)).astype(np.float32)  # as encoders' neighbouring pixels are
    size = {}
    for codec in CODECS:
        column = pa.array([encode_embedding(smooth, codec)], pa.binary())
        size[codec] = len(serialize(pa.table({"embedding": column}), {}))
    assert size["int6"] < size["int8"] * 2 / 3 < size["fp16"] * 2 / 3


def test_int6_differences_wrap_around_without_loss() -> None:
    extremes = np.array([[[31.0, -31.0, 31.0, 0.0, -31.0]]], dtype=np.float32)
    assert np.array_equal(decode_embedding(encode_embedding(extremes, "int6"), (1, 1, 5), "int6"), extremes)


@pytest.mark.parametrize("codec", CODECS)
def test_encoding_again_changes_nothing(codec: Codec, rng: np.random.Generator) -> None:
    embedding = rng.normal(size=(4, 5, 6)).astype(np.float32)
    once = decode_embedding(encode_embedding(embedding, codec), embedding.shape, codec)
    assert once.dtype == np.float32
    assert once.flags.writeable
    assert np.allclose(decode_embedding(encode_embedding(once, codec), embedding.shape, codec), once, rtol=1e-6)


def test_fp16_bytes_need_no_library(rng: np.random.Generator) -> None:
    embedding = rng.normal(size=(4, 5, 6)).astype(np.float16)
    data = encode_embedding(np.asfortranarray(embedding), "fp16")
    assert np.array_equal(np.frombuffer(data, "<f2").reshape(4, 5, 6), embedding)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_overflow_of_the_encoder_is_not_stored(codec: Codec, bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        encode_embedding(np.full((1, 2, 2), bad, dtype=np.float32), codec)


def test_values_beyond_fp16_are_refused_rather_than_made_infinite() -> None:
    with pytest.raises(ValueError, match="use int8 or int6"):
        encode_embedding(np.full((1, 1, 1), 70_000, dtype=np.float32), "fp16")


def test_wrong_shapes_and_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(C, H, W\)"):
        encode_embedding(np.zeros((2, 2), dtype=np.float32), "fp16")
    with pytest.raises(ValueError, match="takes 8 bytes, not 7"):
        decode_embedding(bytes(7), (1, 2, 2), "fp16")


def test_unknown_codecs_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown codec 'fp8'"):
        encode_embedding(np.zeros((1, 1, 1), dtype=np.float32), "fp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown codec 'fp8'"):
        decode_embedding(b"", (1, 1, 1), "fp8")  # type: ignore[arg-type]
