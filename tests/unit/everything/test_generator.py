from __future__ import annotations

import copy
import sys
import types
from typing import Any

import numpy as np
import pytest
import segment_anything
import torch
from segment_anything.modeling import Sam

from tinysam import SamAutomaticMaskGenerator
from tinysam.everything import MaskGeneratorConfig, decoders

# Thresholds that the blobs of `blob_sam` pass in part.
BLOB_OPTIONS = {"points_per_side": 8, "pred_iou_thresh": 0.75, "stability_score_thresh": 0.6}


def assert_same_records(ours: list[dict[str, Any]], reference: list[dict[str, Any]], at_least: int = 1) -> None:
    """Equal records, but for rounding: a pixel whose logit is within rounding of the threshold may differ."""
    assert len(reference) >= at_least, "the reference found too little to compare"
    assert len(ours) == len(reference)
    for a, b in zip(ours, reference, strict=True):
        assert a.keys() == b.keys()
        mask, expected = a["segmentation"], b["segmentation"]
        assert mask.dtype == expected.dtype == bool
        assert mask.shape == expected.shape
        assert np.count_nonzero(mask != expected) <= 2
        assert a["area"] == mask.sum()
        assert abs(a["area"] - b["area"]) <= 2
        np.testing.assert_allclose(a["bbox"], b["bbox"], atol=1)
        assert a["crop_box"] == b["crop_box"]
        np.testing.assert_allclose(a["point_coords"], b["point_coords"], rtol=1e-12)
        assert a["predicted_iou"] == pytest.approx(b["predicted_iou"], abs=1e-5)
        assert a["stability_score"] == pytest.approx(b["stability_score"], abs=1e-2)
        assert [type(v) for v in a.values()] == [type(v) for v in b.values()]


@pytest.mark.parametrize("size", [(140, 96), (96, 140), (128, 128), (37, 61), (400, 301)])
def test_equals_segment_anything_at_any_size(blob_sam: Sam, photograph: np.ndarray, size: tuple[int, int]) -> None:
    image = np.array(np.resize(photograph, (*size, 3)))
    reference = segment_anything.SamAutomaticMaskGenerator(blob_sam, **BLOB_OPTIONS).generate(image)
    ours = SamAutomaticMaskGenerator(blob_sam, **BLOB_OPTIONS).generate(image)
    assert_same_records(ours, reference, at_least=20)


@pytest.mark.parametrize(
    "options",
    [
        {"points_per_batch": 7},
        {"box_nms_thresh": 0.3},
        {"stability_score_offset": 3.0, "stability_score_thresh": 0.3},
        {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.5},
        {"crop_n_layers": 1},
        {"crop_n_layers": 2, "crop_n_points_downscale_factor": 2, "crop_nms_thresh": 0.4},
        {"crop_n_layers": 1, "crop_overlap_ratio": 0.1, "points_per_batch": 10},
    ],
    ids=lambda options: ",".join(options),
)
def test_equals_segment_anything_with_any_option(
    blob_sam: Sam, photograph: np.ndarray, options: dict[str, Any]
) -> None:
    options = {**BLOB_OPTIONS, **options}
    reference = segment_anything.SamAutomaticMaskGenerator(blob_sam, **options).generate(photograph)
    ours = SamAutomaticMaskGenerator(blob_sam, **options).generate(photograph)
    assert_same_records(ours, reference, at_least=10)


@pytest.fixture(scope="module")
def leveled_sam(tiny_sam: Sam, photograph: np.ndarray) -> tuple[Sam, dict[str, Any]]:
    """tiny_sam and options that drop some of its masks: random weights have logits and qualities of any scale.

    The three masks' mean predicted IoU is moved to 1, so that a quantile of it does not just choose among the three.
    """
    sam = copy.deepcopy(tiny_sam).requires_grad_(False)
    predictor = segment_anything.SamPredictor(sam)
    predictor.set_image(photograph)
    points = torch.rand((25, 1, 2), generator=torch.Generator().manual_seed(0)) * 90
    logits, iou, _ = predictor.predict_torch(points, torch.ones(25, 1), return_logits=True)
    sam.mask_decoder.iou_prediction_head.layers[-1].bias[1:] += 1 - iou.mean(0)
    sam.mask_threshold = float(logits.quantile(0.5))
    return sam, {
        "points_per_side": 5,
        "pred_iou_thresh": float((iou - iou.mean(0) + 1).quantile(0.3)),
        "stability_score_thresh": 0.9,
        "stability_score_offset": float(logits.std() / 20),
    }


@pytest.mark.parametrize(
    ("options", "at_least"),
    [({"box_nms_thresh": 1.0}, 20), ({}, 1), ({"crop_n_layers": 1, "box_nms_thresh": 1.0, "crop_nms_thresh": 1.0}, 20)],
)
def test_equals_segment_anything_with_the_real_decoder(
    leveled_sam: tuple[Sam, dict[str, Any]], photograph: np.ndarray, options: dict[str, Any], at_least: int
) -> None:
    sam, thresholds = leveled_sam
    options = {**thresholds, **options}
    reference = segment_anything.SamAutomaticMaskGenerator(sam, **options).generate(photograph)
    ours = SamAutomaticMaskGenerator(sam, **options).generate(photograph)
    assert at_least <= len(reference) < 75 * (1 + 4 * options.get("crop_n_layers", 0)), "some pass and some do not"
    assert_same_records(ours, reference)


@pytest.mark.parametrize(
    ("options", "at_least"), [({"box_nms_thresh": 1.0}, 20), ({}, 1), ({"crop_n_layers": 1, "box_nms_thresh": 1.0}, 1)]
)
def test_equals_segment_anything_with_the_low_rank_decoder(
    leveled_sam: tuple[Sam, dict[str, Any]],
    photograph: np.ndarray,
    options: dict[str, Any],
    at_least: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # At this model's size the plain decoder is cheaper, and would be chosen.
    monkeypatch.setattr(decoders, "low_rank_pays", lambda *_: True)
    sam, thresholds = leveled_sam
    options = {**thresholds, **options}
    reference = segment_anything.SamAutomaticMaskGenerator(sam, **options).generate(photograph)
    ours = SamAutomaticMaskGenerator(sam, **options).generate(photograph)
    assert_same_records(ours, reference, at_least)


@pytest.mark.parametrize("low_rank", [True, False])
def test_bfloat16_finds_nearly_the_same_masks(
    leveled_sam: tuple[Sam, dict[str, Any]], photograph: np.ndarray, low_rank: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "low_rank_pays", lambda *_: low_rank)
    sam, options = leveled_sam
    options = {**options, "box_nms_thresh": 1.0}
    exact = SamAutomaticMaskGenerator(sam, **options).generate(photograph)
    rounded = SamAutomaticMaskGenerator(sam, **options, precision="bfloat16").generate(photograph)
    assert len(rounded) == pytest.approx(len(exact), rel=0.3)

    def best_match(record: dict[str, Any]) -> float:
        mask = record["segmentation"]
        others = [r["segmentation"] for r in exact if r["point_coords"] == record["point_coords"]]
        return max(((mask & other).sum() / (mask | other).sum() for other in others), default=0.0)

    assert np.median([best_match(record) for record in rounded]) > 0.95
    assert any(r["area"] not in [e["area"] for e in exact] for r in rounded), "bfloat16 should have an effect"


@pytest.mark.parametrize("output_mode", ["uncompressed_rle", "coco_rle"])
def test_run_lengths_equal_segment_anythings(blob_sam: Sam, photograph: np.ndarray, output_mode: str) -> None:
    from pycocotools import mask as mask_utils

    options = {**BLOB_OPTIONS, "output_mode": output_mode}
    reference = segment_anything.SamAutomaticMaskGenerator(blob_sam, **options).generate(photograph)
    ours = SamAutomaticMaskGenerator(blob_sam, **options).generate(photograph)
    binary = SamAutomaticMaskGenerator(blob_sam, **BLOB_OPTIONS).generate(photograph)
    assert len(ours) == len(reference) >= 20
    for a, b, c in zip(ours, reference, binary, strict=True):
        rle = a["segmentation"]
        assert rle["size"] == b["segmentation"]["size"] == [140, 96]
        assert type(rle["counts"]) is type(b["segmentation"]["counts"])
        if output_mode == "uncompressed_rle":
            rle = mask_utils.frPyObjects(rle, 140, 96)
        np.testing.assert_array_equal(mask_utils.decode(rle), c["segmentation"])


@pytest.fixture
def fake_cv2(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one function that segment-anything needs of OpenCV, which is not installed."""
    from skimage import measure

    def connected_components(mask: np.ndarray, connectivity: int) -> tuple[int, np.ndarray, np.ndarray, None]:
        labels, n = measure.label(mask, connectivity={4: 1, 8: 2}[connectivity], return_num=True)
        return n + 1, labels, np.bincount(labels.ravel(), minlength=n + 1)[:, None], None

    module = types.ModuleType("cv2")
    module.connectedComponentsWithStats = connected_components
    monkeypatch.setitem(sys.modules, "cv2", module)


@pytest.mark.usefixtures("fake_cv2")
@pytest.mark.parametrize(("min_area", "crop_n_layers"), [(5, 0), (60, 1), (100_000, 0)])
def test_small_regions_are_removed_as_segment_anything_does(
    blob_sam: Sam, photograph: np.ndarray, min_area: int, crop_n_layers: int
) -> None:
    options = {**BLOB_OPTIONS, "min_mask_region_area": min_area, "crop_n_layers": crop_n_layers}
    reference = segment_anything.SamAutomaticMaskGenerator(blob_sam, **options).generate(photograph)
    ours = SamAutomaticMaskGenerator(blob_sam, **options).generate(photograph)
    assert_same_records(ours, reference, at_least=1)
    plain = SamAutomaticMaskGenerator(blob_sam, **{**options, "min_mask_region_area": 0}).generate(photograph)
    assert sum(r["area"] for r in plain) != sum(r["area"] for r in ours)


def test_explicit_grids_are_used(blob_sam: Sam, photograph: np.ndarray, rng: np.random.Generator) -> None:
    options = {**BLOB_OPTIONS, "points_per_side": None, "crop_n_layers": 1}
    grids = [rng.random((11, 2)), rng.random((5, 2))]
    reference = segment_anything.SamAutomaticMaskGenerator(blob_sam, **options, point_grids=grids)
    ours = SamAutomaticMaskGenerator(blob_sam, **options, point_grids=grids)
    assert_same_records(ours.generate(photograph), reference.generate(photograph), at_least=5)


def test_a_batch_equals_its_images_one_by_one(blob_sam: Sam, photograph: np.ndarray) -> None:
    generator = SamAutomaticMaskGenerator(blob_sam, **BLOB_OPTIONS, crop_n_layers=1)
    images = [photograph, photograph[:50], np.ascontiguousarray(photograph[:, ::-1])]
    together = generator.generate_batch(images, encoder_batch_size=4)
    assert len(together) == 3
    for image, records in zip(images, together, strict=True):
        assert_same_records(records, generator.generate(image), at_least=3)
    assert generator.generate_batch([]) == []
    with pytest.raises(ValueError, match="encoder_batch_size"):
        generator.generate_batch(images, encoder_batch_size=-1)


def test_stages_are_timed(blob_sam: Sam, photograph: np.ndarray) -> None:
    generator = SamAutomaticMaskGenerator(blob_sam, **BLOB_OPTIONS)
    assert set(generator.seconds.values()) == {0.0}
    generator.generate(photograph)
    assert generator.seconds.keys() == {"encode", "decode", "masks"}
    assert min(generator.seconds.values()) > 0


def test_config_carries_every_option(blob_sam: Sam, photograph: np.ndarray) -> None:
    config = MaskGeneratorConfig(**BLOB_OPTIONS, crop_n_layers=1, output_mode="coco_rle")
    generator = SamAutomaticMaskGenerator.from_config(blob_sam, config)
    assert generator.config == config
    direct = SamAutomaticMaskGenerator(blob_sam, **BLOB_OPTIONS, crop_n_layers=1, output_mode="coco_rle")
    assert generator.generate(photograph) == direct.generate(photograph)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (1, 7), (2, 2), (31, 9), (3, 300)])
@pytest.mark.parametrize("crop_n_layers", [0, 2])
def test_tiny_and_elongated_images_are_segmented(blob_sam: Sam, size: tuple[int, int], crop_n_layers: int) -> None:
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    sam = copy.deepcopy(blob_sam)
    sam.mask_threshold = -8.0  # so that masks of single pixels survive
    generator = SamAutomaticMaskGenerator(
        sam, points_per_side=4, pred_iou_thresh=0, stability_score_thresh=0, crop_n_layers=crop_n_layers
    )
    records = generator.generate(image)
    assert records
    for record in records:
        assert record["segmentation"].shape == size
        assert record["area"] == record["segmentation"].sum() > 0


@pytest.mark.parametrize("value", [0, 127, 255])
def test_constant_images_are_segmented(blob_sam: Sam, value: int) -> None:
    image = np.full((64, 80, 3), value, np.uint8)
    assert SamAutomaticMaskGenerator(blob_sam, **BLOB_OPTIONS).generate(image)


@pytest.mark.parametrize(
    "options", [{"pred_iou_thresh": 10.0}, {"stability_score_thresh": 1.1}, {"crop_n_layers": 1, "pred_iou_thresh": 10}]
)
@pytest.mark.parametrize("output_mode", ["binary_mask", "coco_rle"])
def test_thresholds_that_keep_nothing_give_no_records(
    blob_sam: Sam, photograph: np.ndarray, options: dict[str, Any], output_mode: str
) -> None:
    options = {**BLOB_OPTIONS, **options, "output_mode": output_mode, "min_mask_region_area": 10}
    assert SamAutomaticMaskGenerator(blob_sam, **options).generate(photograph) == []


def test_no_points_give_no_records(blob_sam: Sam, photograph: np.ndarray) -> None:
    generator = SamAutomaticMaskGenerator(blob_sam, points_per_side=None, point_grids=[np.zeros((0, 2))])
    assert generator.generate(photograph) == []


def test_empty_masks_are_never_returned(blob_sam: Sam, photograph: np.ndarray) -> None:
    sam = copy.deepcopy(blob_sam)
    sam.mask_threshold = 1e6
    generator = SamAutomaticMaskGenerator(sam, points_per_side=4, pred_iou_thresh=0, stability_score_thresh=0)
    assert generator.generate(photograph) == []


@pytest.mark.parametrize("part", ["image_encoder", "mask_decoder"])
def test_damaged_weights_are_reported(tiny_sam: Sam, photograph: np.ndarray, part: str) -> None:
    sam = copy.deepcopy(tiny_sam)
    with torch.no_grad():
        next(p for p in getattr(sam, part).parameters() if p.ndim > 1).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="damaged"):
        SamAutomaticMaskGenerator(sam, points_per_side=2).generate(photograph)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points_per_side": 0}, "points_per_side"),
        ({"points_per_side": None}, "exactly one"),
        ({"point_grids": [np.zeros((1, 2))]}, "exactly one"),
        ({"points_per_side": None, "point_grids": [np.zeros((1, 2))], "crop_n_layers": 1}, "2 grids"),
        ({"points_per_side": None, "point_grids": [np.full((1, 2), 1.5)]}, r"0\.\.1"),
        ({"points_per_side": None, "point_grids": [np.zeros((2, 3))]}, "shape"),
        ({"points_per_side": 4, "crop_n_layers": 3, "crop_n_points_downscale_factor": 2}, "no point"),
        ({"points_per_batch": 0}, "points_per_batch"),
        ({"crop_n_layers": -1}, "crop_n_layers"),
        ({"box_nms_thresh": 1.5}, "box_nms_thresh"),
        ({"pred_iou_thresh": float("nan")}, "pred_iou_thresh"),
        ({"stability_score_offset": -1.0}, "stability_score_offset"),
        ({"min_mask_region_area": -1}, "min_mask_region_area"),
        ({"output_mode": "polygon"}, "output_mode"),
        ({"precision": "float16"}, "precision"),
    ],
)
def test_wrong_options_are_named(blob_sam: Sam, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamAutomaticMaskGenerator(blob_sam, **options)


def test_options_cannot_be_changed_in_silence(blob_sam: Sam) -> None:
    generator = SamAutomaticMaskGenerator(blob_sam)
    with pytest.raises(AttributeError):
        generator.pred_iou_thresh = 0.5


@pytest.mark.parametrize(
    ("image", "error"),
    [
        (np.zeros((4, 4), np.uint8), ValueError),
        (np.zeros((4, 4, 4), np.uint8), ValueError),
        (np.zeros((0, 4, 3), np.uint8), ValueError),
        (np.zeros((4, 4, 3), np.float32), TypeError),
        ("image.jpg", TypeError),
    ],
)
def test_what_is_no_image_is_refused(blob_sam: Sam, image: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="an image must"):
        SamAutomaticMaskGenerator(blob_sam).generate(image)
