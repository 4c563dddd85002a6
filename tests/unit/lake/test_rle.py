from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_mask
from segment_anything.utils.amg import mask_to_rle_pytorch
from torch import from_numpy

from tinysam.lake.rle import decode_rle, encode_rle, rle_area, rle_bbox, rle_to_uncompressed, run_lengths

MASKS = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40))


@given(MASKS)
def test_decoding_undoes_encoding(mask: np.ndarray) -> None:
    rle = encode_rle(mask)
    assert np.array_equal(decode_rle(rle), mask)
    assert decode_rle(json.loads(json.dumps(rle))).dtype == bool


@given(MASKS)
def test_encoding_is_pycocotools(mask: np.ndarray) -> None:
    expected = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert encode_rle(mask) == {"size": list(mask.shape), "counts": expected["counts"].decode()}


@given(MASKS)
def test_uncompressed_form_is_segment_anythings(mask: np.ndarray) -> None:
    assert rle_to_uncompressed(encode_rle(mask)) == mask_to_rle_pytorch(from_numpy(mask)[None])[0]


def compress(runs: list[int]) -> str:
    """pycocotools' rleToString, which itself writes past its buffer where all runs are long."""
    text = ""
    for i, run in enumerate(runs):
        number = run - runs[i - 2] if i > 2 else run
        more = True
        while more:
            bits, number = number & 0x1F, number >> 5
            more = number != (-1 if bits & 0x10 else 0)
            text += chr(48 + bits + 0x20 * more)
    return text


@given(MASKS)
def test_the_tests_own_compression_is_pycocotools(mask: np.ndarray) -> None:
    rle = encode_rle(mask)
    assert compress(run_lengths(rle["counts"]).tolist()) == rle["counts"]


@given(st.lists(st.integers(0, 2**29 - 1), min_size=1, max_size=8))
def test_run_lengths_of_large_images_are_decoded(runs: list[int]) -> None:
    assert run_lengths(compress(runs)).tolist() == runs


@pytest.mark.parametrize("text", ["\x7f", "P", "1o", "\x01", "PPPPPP0", "o" * 50 + "0"])
def test_text_that_is_not_run_lengths_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a compressed run-length string"):
        run_lengths(text)


@pytest.mark.parametrize("counts", [[15], [17], [0], [3, 3]])
def test_runs_that_do_not_fill_the_mask_are_refused(counts: list[int]) -> None:
    compressed = coco_mask.frPyObjects({"size": [1, sum(counts)], "counts": counts}, 1, sum(counts))
    with pytest.raises(ValueError, match="add up to"):
        decode_rle({"size": [4, 4], "counts": compressed["counts"]})


def test_an_empty_text_has_no_runs() -> None:
    assert run_lengths("").size == 0


@given(MASKS)
def test_area_and_box_are_those_of_the_pixels(mask: np.ndarray) -> None:
    rle = encode_rle(mask)
    assert rle_area(rle) == mask.sum()
    if not mask.any():
        assert rle_bbox(rle)[2:] == [0, 0]
        return
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    assert rle_bbox(rle) == [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
