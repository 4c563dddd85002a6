from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as mask_utils

from tinysam.eval.masks import areas, at_original_size, boxes_xyxy, iou_matrix, paired_iou, to_rles
from tinysam.everything.decoding import encode

SHAPES = st.tuples(st.integers(0, 6), st.integers(1, 19), st.integers(1, 23))


def dense_iou(a: np.ndarray, b: np.ndarray) -> float:
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 0.0


@given(st.data(), SHAPES)
def test_overlaps_of_run_lengths_are_those_of_the_pixels(data, shape):
    a, b = (data.draw(arrays.arrays(bool, shape)) for _ in range(2))
    expected = np.array([[dense_iou(x, y) for y in b] for x in a]).reshape(len(a), len(b))
    np.testing.assert_allclose(iou_matrix(to_rles(a), to_rles(b)), expected, atol=1e-12)
    np.testing.assert_allclose(paired_iou(to_rles(a), to_rles(b)), expected.diagonal(), atol=1e-12)


@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 19), st.integers(1, 23))))
def test_any_non_zero_value_is_inside(masks):
    rles = to_rles(masks)
    np.testing.assert_array_equal(areas(rles), (masks != 0).sum(axis=(1, 2)))
    np.testing.assert_array_equal([mask_utils.decode(rle) for rle in rles], masks != 0)


def test_areas_of_more_masks_than_a_byte_counts():
    assert areas(to_rles(np.ones((300, 2, 3), bool))).tolist() == [6.0] * 300


def test_run_lengths_pass_unchanged():
    rles = to_rles(np.eye(3, dtype=bool)[None])
    assert to_rles(rles) == rles


def test_masks_of_another_rank_are_refused():
    with pytest.raises(ValueError, match=r"\(N, H, W\)"):
        to_rles(np.zeros((4, 5), bool))


def test_boxes_have_exclusive_right_and_bottom_edges():
    mask = np.zeros((1, 9, 11), bool)
    mask[0, 2:5, 3:10] = True
    np.testing.assert_array_equal(boxes_xyxy(to_rles(mask)), [[3, 2, 10, 5]])
    assert boxes_xyxy([]).shape == (0, 4)


@settings(max_examples=10, deadline=None)
@given(height=st.integers(1, 90), width=st.integers(1, 90), masks=st.integers(0, 5))
def test_upscaling_is_sams(tiny_sam, height, width, masks):
    [image] = encode(tiny_sam, [np.zeros((height, width, 3), np.uint8)])
    logits = torch.randn(masks, 32, 32, generator=torch.Generator().manual_seed(height))
    found = at_original_size(tiny_sam, image, logits)
    expected = tiny_sam.postprocess_masks(logits[:, None], image.input_size, (height, width))[:, 0]
    assert len(found) == masks
    for rle, values in zip(found, expected, strict=True):
        doubtful = values.abs().numpy() < 1e-5
        np.testing.assert_array_equal((mask_utils.decode(rle) > 0) | doubtful, (values > 0).numpy() | doubtful)
