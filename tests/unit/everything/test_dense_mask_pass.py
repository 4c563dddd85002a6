from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tinysam.everything.dense_mask_pass import BYTES_PER_PIXEL, sweep_dense
from tinysam.everything.grids import Crop
from tinysam.everything.mask_pass import mask_frame, measure
from tinysam.everything.run_lengths import decode_run_lengths
from tinysam.predictor import ResizeLongestSide

MODEL_SIZE, LOW_SIZE = 128, 32


def blobs(n: int, seed: int) -> torch.Tensor:
    """Smooth random logits; the first mask is empty and the last one full."""
    coarse = torch.randn((n, 1, 5, 5), generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(coarse, (LOW_SIZE, LOW_SIZE), mode="bicubic")[:, 0]
    return 5 * (smooth + torch.linspace(-9, 9, n)[:, None, None])


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 150), st.integers(1, 150), st.tuples(*[st.integers(0, 9)] * 4), st.integers(0, 1000))
def test_finds_what_the_sweep_by_columns_finds(
    height: int, width: int, margins: tuple[int, int, int, int], seed: int
) -> None:
    top, bottom, left, right = margins
    crop = Crop(x0=left, y0=top, x1=left + width, y1=top + height, layer=1)
    size = (top + height + bottom, left + width + right)
    low_res = blobs(6, seed)
    input_size = ResizeLongestSide.get_preprocess_shape(*crop.size, MODEL_SIZE)
    frame = mask_frame(crop, size, input_size, MODEL_SIZE, (LOW_SIZE, LOW_SIZE))
    expected = measure(low_res, frame, 0.0, 1.0)
    run_lengths, statistics = sweep_dense(low_res, frame.rows, frame.columns, crop, size, (-1.0, 0.0, 1.0))
    for i in range(len(low_res)):
        assert run_lengths[i].dtype == np.uint32
        if run_lengths[i].tolist() == expected.run_lengths[i].tolist():
            assert statistics[i, :4].tolist() == expected.boxes[i].tolist()
            assert statistics[i, 4] == expected.areas[i]
        else:  # sums in another order: a pixel whose logit is 0 but for rounding
            ours, theirs = (decode_run_lengths(r[i], size) for r in (run_lengths, expected.run_lengths))
            assert np.count_nonzero(ours != theirs) <= 1
        if statistics[i, 6]:
            assert statistics[i, 5] / statistics[i, 6] == pytest.approx(expected.stability_score[i], abs=0.01)


def test_the_limit_on_memory_changes_nothing() -> None:
    crop = Crop(x0=0, y0=0, x1=70, y1=50, layer=0)
    frame = mask_frame(crop, crop.size, (91, 128), MODEL_SIZE, (LOW_SIZE, LOW_SIZE))
    arguments = (frame.rows, frame.columns, crop, crop.size, (-1.0, 0.0, 1.0))
    at_once = sweep_dense(blobs(7, 0), *arguments)
    one_by_one = sweep_dense(blobs(7, 0), *arguments, max_bytes=BYTES_PER_PIXEL * 50 * 70)
    assert [r.tolist() for r in at_once[0]] == [r.tolist() for r in one_by_one[0]]
    np.testing.assert_array_equal(at_once[1], one_by_one[1])


def test_no_masks_give_nothing() -> None:
    crop = Crop(x0=0, y0=0, x1=70, y1=50, layer=0)
    frame = mask_frame(crop, crop.size, (91, 128), MODEL_SIZE, (LOW_SIZE, LOW_SIZE))
    run_lengths, statistics = sweep_dense(
        torch.zeros(0, LOW_SIZE, LOW_SIZE), frame.rows, frame.columns, crop, crop.size, (-1.0, 0.0, 1.0)
    )
    assert run_lengths == []
    assert statistics.shape == (0, 7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_masks_on_a_gpu_are_measured_there() -> None:
    crop = Crop(x0=0, y0=0, x1=70, y1=50, layer=0)
    frame = mask_frame(crop, crop.size, (91, 128), MODEL_SIZE, (LOW_SIZE, LOW_SIZE))
    expected, found = measure(blobs(7, 0), frame, 0.0, 1.0), measure(blobs(7, 0).cuda(), frame, 0.0, 1.0)
    np.testing.assert_allclose(found.areas, expected.areas, atol=1)
    np.testing.assert_array_equal(found.boxes, expected.boxes)
