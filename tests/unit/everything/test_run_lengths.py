from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as mask_utils
from segment_anything.utils.amg import mask_to_rle_pytorch

from tinysam.everything.run_lengths import decode_run_lengths, encode_run_lengths, to_segmentation

masks = st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(lambda size: arrays(bool, size))


@given(masks)
def test_run_lengths_are_segment_anythings_and_decode_to_the_mask(mask: np.ndarray) -> None:
    counts = encode_run_lengths(mask)
    assert counts.tolist() == mask_to_rle_pytorch(torch.from_numpy(mask)[None])[0]["counts"]
    np.testing.assert_array_equal(decode_run_lengths(counts, mask.shape), mask)


@given(masks)
def test_the_compressed_string_is_pycocotools(mask: np.ndarray) -> None:
    rle = to_segmentation(encode_run_lengths(mask), mask.shape, "coco_rle")
    expected = mask_utils.encode(np.asfortranarray(mask, np.uint8))
    assert rle == {"size": list(mask.shape), "counts": expected["counts"].decode()}
