from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segment_anything.utils.amg import batched_mask_to_box, calculate_stability_score, mask_to_rle_pytorch
from torch import Tensor
from torch.nn import functional as F

from tinysam.everything.grids import Crop
from tinysam.everything.mask_pass import MaskFrame, mask_frame, measure, probe
from tinysam.everything.run_lengths import decode_run_lengths
from tinysam.predictor import ResizeLongestSide

MODEL_SIZE = 128


def whole(height: int, width: int) -> Crop:
    return Crop(x0=0, y0=0, x1=width, y1=height, layer=0)


def frame_of(crop: Crop, image_size: tuple[int, int], low_size: int = MODEL_SIZE // 4) -> MaskFrame:
    input_size = ResizeLongestSide.get_preprocess_shape(*crop.size, MODEL_SIZE)
    return mask_frame(crop, image_size, input_size, MODEL_SIZE, (low_size, low_size))


def resized(low_res: Tensor, crop: Crop) -> Tensor:
    """``Sam.postprocess_masks`` in float32."""
    height, width = ResizeLongestSide.get_preprocess_shape(*crop.size, MODEL_SIZE)
    square = F.interpolate(low_res[:, None], (MODEL_SIZE, MODEL_SIZE), mode="bilinear", align_corners=False)
    return F.interpolate(square[..., :height, :width], crop.size, mode="bilinear", align_corners=False)[:, 0]


def assert_measures_agree(
    low_res: Tensor, crop: Crop, image_size: tuple[int, int], threshold: float, offset: float
) -> None:
    logits = resized(low_res, crop)
    measured = measure(low_res, frame_of(crop, image_size, low_res.shape[1]), threshold, offset)
    height, width = image_size
    for i, values in enumerate(logits.numpy()):
        assert measured.run_lengths[i].dtype == np.uint32
        mask = decode_run_lengths(measured.run_lengths[i], image_size)
        # Run lengths are canonical: no empty run but a first one.
        assert mask_to_rle_pytorch(torch.from_numpy(mask.copy())[None])[0]["counts"] == measured.run_lengths[i].tolist()
        expected = np.zeros((height, width), bool)
        expected[crop.y0 : crop.y1, crop.x0 : crop.x1] = values > threshold
        doubtful = np.zeros((height, width), bool)
        doubtful[crop.y0 : crop.y1, crop.x0 : crop.x1] = np.abs(values - threshold) < 1e-4
        np.testing.assert_array_equal(mask | doubtful, expected | doubtful)
        assert measured.areas[i] == mask.sum()
        assert measured.boxes[i].tolist() == batched_mask_to_box(torch.from_numpy(mask.copy())[None])[0].tolist()
        high, low = (values > threshold + offset).sum(), (values > threshold - offset).sum()
        near = (np.abs(np.abs(values - threshold) - offset) < 1e-4).sum()
        if low == 0:
            assert np.isnan(measured.stability_score[i]) or near
        else:
            assert measured.stability_score[i] == pytest.approx(high / low, abs=near / low + 1e-6)


def blobs(n: int, side: int, seed: int) -> Tensor:
    """Smooth random logits with a standard deviation of about 4, each mask with another share of foreground."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn((n, 1, 5, 5), generator=generator)
    smooth = F.interpolate(coarse, (side, side), mode="bicubic")[:, 0]
    return 5 * (smooth + torch.linspace(-2.5, 2.5, n)[:, None, None])


@pytest.mark.parametrize(
    "size", [(128, 128), (96, 140), (301, 77), (61, 37), (9, 8), (1, 1), (1, 300), (300, 1), (17, 400), (500, 333)]
)
def test_equals_resizing_twice_and_thresholding(size: tuple[int, int]) -> None:
    assert_measures_agree(blobs(8, 32, seed=0), whole(*size), size, 0.0, 1.0)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.tuples(*[st.integers(0, 9)] * 4),
    st.floats(-2, 2),
    st.floats(0, 3),
    st.integers(0, 1000),
    st.sampled_from([8, 32, 40]),
)
def test_equals_the_reference_for_any_size_and_crop(
    height: int,
    width: int,
    margins: tuple[int, int, int, int],
    threshold: float,
    offset: float,
    seed: int,
    low_size: int,
) -> None:
    top, bottom, left, right = margins
    crop = Crop(x0=left, y0=top, x1=left + width, y1=top + height, layer=1)
    noise = torch.randn((2, low_size, low_size), generator=torch.Generator().manual_seed(seed))
    low_res = torch.cat([blobs(3, low_size, seed), 3 * noise])
    assert_measures_agree(low_res, crop, (top + height + bottom, left + width + right), threshold, offset)


@pytest.mark.parametrize("value", [-50.0, 50.0])
@pytest.mark.parametrize("margin", [0, 3])
def test_empty_and_full_masks(value: float, margin: int) -> None:
    crop = Crop(x0=margin, y0=margin, x1=margin + 20, y1=margin + 30, layer=0)
    size = (30 + 2 * margin, 20 + 2 * margin)
    assert_measures_agree(torch.full((1, 32, 32), value), crop, size, 0.0, 1.0)
    measured = measure(torch.full((1, 32, 32), value), frame_of(crop, size), 0.0, 1.0)
    assert measured.areas[0] == (600 if value > 0 else 0)
    assert measured.boxes[0].tolist() == ([margin, margin, margin + 19, margin + 29] if value > 0 else [0, 0, 0, 0])


def test_single_pixels_and_checkerboards() -> None:
    low_res = torch.full((3, 32, 32), -9.0)
    low_res[0, 3, 30] = 200.0
    low_res[1, ::2, ::2] = 30.0
    low_res[1, 1::2, 1::2] = 30.0
    low_res[2, 31, 31] = 200.0
    for size in ((128, 128), (256, 200), (33, 64)):
        assert_measures_agree(low_res, whole(*size), size, 0.0, 1.0)


def test_more_runs_than_the_first_buffer_holds() -> None:
    noise = 9 * torch.randn((2, 32, 32), generator=torch.Generator().manual_seed(5))
    measured = measure(noise, frame_of(whole(600, 500), (600, 500)), 0.0, 1.0)
    assert max(len(counts) for counts in measured.run_lengths) > 2000
    assert_measures_agree(noise, whole(600, 500), (600, 500), 0.0, 1.0)


def test_the_stability_score_is_segment_anythings() -> None:
    low_res = blobs(8, 32, seed=1)
    measured = measure(low_res, frame_of(whole(128, 90), (128, 90)), 0.5, 1.5)
    expected = calculate_stability_score(resized(low_res, whole(128, 90)), 0.5, 1.5).numpy()
    np.testing.assert_allclose(measured.stability_score, expected, atol=1e-3)
    assert measured.stability_score.dtype == np.float32


def test_threads_change_nothing() -> None:
    low_res = blobs(9, 32, seed=2)
    frame = frame_of(whole(200, 150), (200, 150))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = measure(low_res, frame, 0.0, 1.0)
        torch.set_num_threads(3)
        together = measure(low_res, frame, 0.0, 1.0)
    finally:
        torch.set_num_threads(threads)
    assert [c.tolist() for c in alone.run_lengths] == [c.tolist() for c in together.run_lengths]
    np.testing.assert_array_equal(alone.boxes, together.boxes)


def test_no_masks_measure_to_nothing() -> None:
    measured = measure(torch.zeros(0, 32, 32), frame_of(whole(20, 30), (20, 30)), 0.0, 1.0)
    assert measured.run_lengths == []
    assert measured.boxes.shape == (0, 4)
    assert measured.areas.shape == measured.stability_score.shape == (0,)


@pytest.mark.parametrize("size", [(128, 128), (301, 77), (9, 8), (1, 1)])
def test_probed_logits_are_those_of_the_resized_mask(size: tuple[int, int], rng: np.random.Generator) -> None:
    low_res = blobs(4, 32, seed=3)
    rows, columns = rng.integers(0, size[0], 50), rng.integers(0, size[1], 50)
    probed = probe(low_res, frame_of(whole(*size), size), rows, columns)
    np.testing.assert_allclose(probed, resized(low_res, whole(*size))[:, rows, columns].numpy(), atol=1e-4)
