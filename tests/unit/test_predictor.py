from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import segment_anything
import torch
from segment_anything.modeling import Sam

from tinysam import SamPredictor
from tinysam.predictor import ResizeLongestSide

POINTS, LABELS, BOX = np.array([[30, 40], [60.5, 20.25]]), np.array([1, 0]), np.array([10, 12, 80, 60])


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (75, 110, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "prompt",
    [
        {"point_coords": POINTS, "point_labels": LABELS},
        {"point_coords": POINTS[:1], "point_labels": LABELS[:1], "multimask_output": False},
        {"box": BOX},
        {"box": BOX[None], "return_logits": True},
        {"box": BOX, "point_coords": POINTS, "point_labels": LABELS},
        {"mask_input": np.linspace(-9, 9, 32 * 32).reshape(1, 32, 32)},
        {"mask_input": np.linspace(-9, 9, 32 * 32).reshape(1, 32, 32), "box": BOX},
        {},
    ],
    ids=lambda prompt: ",".join(prompt) or "nothing",
)
@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_equals_segment_anythings_predictor(
    tiny_sam: Sam, image: np.ndarray, prompt: dict[str, Any], image_format: str
) -> None:
    ours, reference = SamPredictor(tiny_sam), segment_anything.SamPredictor(tiny_sam)
    ours.set_image(image, image_format)
    reference.set_image(image, image_format)
    torch.testing.assert_close(ours.get_image_embedding(), reference.get_image_embedding(), rtol=0, atol=0)
    for a, b in zip(ours.predict(**prompt), reference.predict(**prompt), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_batched_prompts_equal_segment_anythings(tiny_sam: Sam, image: np.ndarray) -> None:
    ours, reference = SamPredictor(tiny_sam), segment_anything.SamPredictor(tiny_sam)
    ours.set_image(image)
    reference.set_image(image)
    boxes = ours.transform.apply_boxes_torch(torch.tensor([[5.0, 5, 40, 30], [20, 10, 100, 70]]), image.shape[:2])
    for a, b in zip(
        ours.predict_torch(None, None, boxes=boxes), reference.predict_torch(None, None, boxes=boxes), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 700)])
def test_tiny_and_elongated_images_are_embedded(tiny_sam: Sam, size: tuple[int, int]) -> None:
    predictor = SamPredictor(tiny_sam)
    predictor.set_image(np.zeros((*size, 3), np.uint8))
    masks, iou, low_res = predictor.predict(point_coords=[[0, 0]], point_labels=[1])
    assert masks.shape == (3, *size)
    assert np.isfinite(iou).all()
    assert np.isfinite(low_res).all()


@pytest.mark.parametrize("size", [(1500, 2250), (2250, 1500), (3, 3), (77, 1024)])
def test_ordinary_images_are_resized_as_segment_anything_does(size: tuple[int, int]) -> None:
    reference = segment_anything.utils.transforms.ResizeLongestSide.get_preprocess_shape(*size, 1024)
    assert ResizeLongestSide.get_preprocess_shape(*size, 1024) == reference


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (np.zeros((8, 8), np.uint8), ValueError),
        (np.zeros((8, 8, 4), np.uint8), ValueError),
        (np.zeros((0, 8, 3), np.uint8), ValueError),
        (np.zeros((8, 8, 3), np.float32), TypeError),
        ([[1, 2, 3]], TypeError),
    ],
)
def test_what_is_no_image_is_refused(tiny_sam: Sam, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="an image must"):
        SamPredictor(tiny_sam).set_image(value)


def test_an_unknown_channel_order_is_refused(tiny_sam: Sam, image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="image_format"):
        SamPredictor(tiny_sam).set_image(image, "RGBA")


@pytest.mark.parametrize("shape", [(3, 75, 128), (1, 4, 75, 128), (1, 3, 75, 110), (1, 3, 0, 128)])
def test_transformed_images_of_another_size_are_refused(tiny_sam: Sam, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="longest side of 128"):
        SamPredictor(tiny_sam).set_torch_image(torch.zeros(shape), (75, 110))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"point_coords": POINTS}, "together"),
        ({"point_labels": LABELS}, "together"),
        ({"point_coords": POINTS, "point_labels": LABELS[:1]}, "point_labels must have shape"),
        ({"point_coords": POINTS[0], "point_labels": LABELS[:1]}, "point_coords must have shape"),
        ({"point_coords": [[np.nan, 1]], "point_labels": [1]}, "finite"),
        ({"box": np.zeros((2, 4))}, "predict_torch"),
        ({"mask_input": np.zeros((1, 256, 256))}, r"\(1, 32, 32\)"),
    ],
)
def test_wrong_prompts_are_named(tiny_sam: Sam, image: np.ndarray, prompt: dict[str, Any], message: str) -> None:
    predictor = SamPredictor(tiny_sam)
    predictor.set_image(image)
    with pytest.raises(ValueError, match=message):
        predictor.predict(**prompt)


def test_a_prediction_needs_an_image(tiny_sam: Sam, image: np.ndarray) -> None:
    predictor = SamPredictor(tiny_sam)
    with pytest.raises(RuntimeError, match="set_image"):
        predictor.predict(box=BOX)
    predictor.set_image(image)
    predictor.reset_image()
    with pytest.raises(RuntimeError, match="set_image"):
        predictor.predict(box=BOX)
