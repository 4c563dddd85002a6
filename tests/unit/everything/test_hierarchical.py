from __future__ import annotations

import copy
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import segment_anything
import torch
from segment_anything.modeling import Sam
from segment_anything.utils.amg import build_point_grid, calculate_stability_score

from tinysam import SamAutomaticMaskGenerator, SamHierarchicalMaskGenerator
from tinysam.everything import HierarchicalConfig
from tinysam.everything.config import PRESETS
from tinysam.everything.promise import ENOUGH

OPTIONS = {"points_per_side": 8, "pred_iou_thresh": 0.75, "stability_score_thresh": 0.6}
PAPER = OPTIONS | {"preset": "paper"}


def summary(records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(r["area"], r["bbox"], r["point_coords"], r["crop_box"]) for r in records]


def uncovered(sam: Sam, image: np.ndarray, coarse: np.ndarray, dense: np.ndarray, tau: float) -> np.ndarray:
    """The dense points that round 1 leaves, by the definition: full-resolution logits of its kept masks."""
    height, width = image.shape[:2]
    predictor = segment_anything.SamPredictor(sam)
    predictor.set_image(image)
    points = torch.as_tensor(predictor.transform.apply_coords(coarse * (width, height), (height, width)))
    logits, iou, _ = predictor.predict_torch(points[:, None], torch.ones(len(points), 1), return_logits=True)
    logits, iou = logits.flatten(0, 1), iou.flatten(0, 1)
    kept = (iou > OPTIONS["pred_iou_thresh"]) & (
        calculate_stability_score(logits, sam.mask_threshold, 1.0) >= OPTIONS["stability_score_thresh"]
    )
    covered = (logits[kept] > tau).any(0).numpy()
    left = [p for p in dense if not covered[int(p[1] * height), int(p[0] * width)]]
    assert 0 < len(left) < len(dense), "the threshold should cover a part of the image"
    return np.array(left)


@pytest.mark.parametrize(
    ("coarse_ratio", "coarse_side", "size"),
    [(4, 2, (140, 96)), (2, 4, (140, 96)), (2.6, 3, (61, 90)), (1.6, 5, (140, 96))],
)
def test_the_second_round_prompts_what_the_first_left_uncovered(
    blob_sam: Sam, photograph: np.ndarray, coarse_ratio: float, coarse_side: int, size: tuple[int, int]
) -> None:
    image = np.ascontiguousarray(photograph[: size[0], : size[1]])
    coarse, dense = build_point_grid(coarse_side), build_point_grid(8)
    left = uncovered(blob_sam, image, coarse, dense, tau=3.0)
    expected = segment_anything.SamAutomaticMaskGenerator(
        blob_sam, **{**OPTIONS, "points_per_side": None}, point_grids=[np.concatenate([coarse, left])]
    ).generate(image)
    ours = SamHierarchicalMaskGenerator(
        blob_sam, **PAPER, coarse_ratio=coarse_ratio, high_score_thresh=3.0, points_per_batch=5
    ).generate(image)
    assert len(ours) == len(expected) >= 5
    for a, b in zip(ours, expected, strict=True):
        assert np.count_nonzero(a["segmentation"] != b["segmentation"]) <= 2
        np.testing.assert_allclose(a["point_coords"], b["point_coords"], rtol=1e-12)


def test_a_middle_round_spares_points_of_the_dense_one(blob_sam: Sam, photograph: np.ndarray) -> None:
    coarse, middle, dense = (build_point_grid(side) for side in (4, 6, 8))
    left = uncovered(blob_sam, photograph, coarse, middle, tau=3.0)
    prompted = np.concatenate([coarse, left])
    last = uncovered(blob_sam, photograph, prompted, dense, tau=3.0)
    assert len(last) < len(uncovered(blob_sam, photograph, coarse, dense, tau=3.0))
    expected = segment_anything.SamAutomaticMaskGenerator(
        blob_sam, **{**OPTIONS, "points_per_side": None}, point_grids=[np.concatenate([prompted, last])]
    ).generate(photograph)
    ours = SamHierarchicalMaskGenerator(
        blob_sam, **PAPER, rounds=3, coarse_ratio=2, high_score_thresh=3.0, points_per_batch=5
    ).generate(photograph)
    assert len(ours) == len(expected) >= 5
    for a, b in zip(ours, expected, strict=True):
        assert np.count_nonzero(a["segmentation"] != b["segmentation"]) <= 2
        np.testing.assert_allclose(a["point_coords"], b["point_coords"], rtol=1e-12)


def test_one_round_is_the_flat_grid(blob_sam: Sam, photograph: np.ndarray) -> None:
    ours = SamHierarchicalMaskGenerator(blob_sam, **OPTIONS, rounds=1).generate(photograph)
    assert summary(ours) == summary(SamAutomaticMaskGenerator(blob_sam, **OPTIONS).generate(photograph))


def grid_of_both_rounds(points_per_side: int, coarse_side: int) -> np.ndarray:
    return np.concatenate([build_point_grid(coarse_side), build_point_grid(points_per_side)])


@pytest.mark.parametrize("crop_n_layers", [0, 1])
def test_a_threshold_that_covers_nothing_gives_both_grids(
    blob_sam: Sam, photograph: np.ndarray, crop_n_layers: int
) -> None:
    options = {**OPTIONS, "crop_n_layers": crop_n_layers}
    generator = SamHierarchicalMaskGenerator(blob_sam, **options, preset="paper", high_score_thresh=np.inf)
    ours = generator.generate(photograph)
    grids = [grid_of_both_rounds(8, 2)] * (crop_n_layers + 1)
    options["points_per_side"] = None
    flat = SamAutomaticMaskGenerator(blob_sam, **options, point_grids=grids).generate(photograph)
    assert summary(ours) == summary(flat)
    assert len({tuple(r["crop_box"]) for r in ours}) > crop_n_layers


@pytest.mark.parametrize("crop_n_layers", [0, 1])
def test_a_first_round_that_covers_everything_ends_it(
    blob_sam: Sam, photograph: np.ndarray, crop_n_layers: int
) -> None:
    # No stability filter, so that every crop's first round keeps a mask.
    options = {**OPTIONS, "crop_n_layers": crop_n_layers, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}
    generator = SamHierarchicalMaskGenerator(blob_sam, **options, preset="paper", high_score_thresh=-1e9)
    ours = generator.generate(photograph)
    flat = SamAutomaticMaskGenerator(blob_sam, **{**options, "points_per_side": 2}).generate(photograph)
    assert summary(ours) == summary(flat)
    assert ours


def test_a_first_round_that_finds_nothing_leaves_the_dense_grid(blob_sam: Sam, photograph: np.ndarray) -> None:
    class Picky(torch.nn.Module):
        """Rejects all masks of the first call."""

        def __init__(self, decoder: torch.nn.Module) -> None:
            super().__init__()
            self.decoder, self.calls = decoder, 0

        def forward(self, **prompts: Any) -> tuple[torch.Tensor, torch.Tensor]:
            masks, iou = self.decoder(**prompts)
            self.calls += 1
            return masks, iou if self.calls > 1 else torch.zeros_like(iou)

    sam = copy.deepcopy(blob_sam)
    sam.mask_decoder = Picky(blob_sam.mask_decoder)
    ours = SamHierarchicalMaskGenerator(sam, **PAPER, high_score_thresh=-1e9).generate(photograph)
    flat = SamAutomaticMaskGenerator(blob_sam, **OPTIONS).generate(photograph)
    assert summary(ours) == summary(flat)
    assert ours


def test_thresholds_that_keep_nothing_give_no_records(blob_sam: Sam, photograph: np.ndarray) -> None:
    options = {**OPTIONS, "pred_iou_thresh": 10.0}
    assert SamHierarchicalMaskGenerator(blob_sam, **options, output_mode="coco_rle").generate(photograph) == []


def test_no_points_give_no_records(blob_sam: Sam, photograph: np.ndarray) -> None:
    generator = SamHierarchicalMaskGenerator(blob_sam, points_per_side=None, point_grids=[np.zeros((0, 2))])
    assert generator.generate(photograph) == []


def test_explicit_grids_are_the_dense_round(blob_sam: Sam, photograph: np.ndarray) -> None:
    options = {**PAPER, "points_per_side": None}
    explicit = SamHierarchicalMaskGenerator(blob_sam, **options, point_grids=[build_point_grid(8)])
    regular = SamHierarchicalMaskGenerator(blob_sam, **PAPER)
    assert summary(explicit.generate(photograph)) == summary(regular.generate(photograph))


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 300)])
def test_tiny_and_elongated_images_are_segmented(blob_sam: Sam, size: tuple[int, int]) -> None:
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    sam = copy.deepcopy(blob_sam)
    sam.mask_threshold = -8.0  # so that masks of single pixels survive
    generator = SamHierarchicalMaskGenerator(
        sam, points_per_side=4, pred_iou_thresh=0, stability_score_thresh=0, crop_n_layers=1, high_score_thresh=-7.0
    )
    records = generator.generate(image)
    assert records
    assert all(record["segmentation"].shape == size for record in records)


def test_the_papers_schedule_is_a_preset(blob_sam: Sam) -> None:
    config = SamHierarchicalMaskGenerator(blob_sam, preset="paper").config
    assert config == HierarchicalConfig(preset="paper")
    schedule = config.schedule
    assert (schedule.rounds, schedule.coarse_ratio, schedule.high_score_thresh) == (2, 4, 8.5)
    assert not schedule.nested
    assert schedule.iou_margin == np.inf
    assert (config.points_per_side, config.pred_iou_thresh, config.stability_score_thresh) == (32, 0.88, 0.95)
    assert config.box_nms_thresh == 0.7


def test_options_take_the_place_of_the_presets() -> None:
    assert HierarchicalConfig().schedule == PRESETS["adaptive"]
    assert HierarchicalConfig(preset="paper", rounds=3).schedule == replace(PRESETS["paper"], rounds=3)
    given = HierarchicalConfig(**asdict(PRESETS["paper"]))
    assert given.decisive() == HierarchicalConfig(preset="paper").decisive() != HierarchicalConfig().decisive()


def prompted(sam: Sam, image: np.ndarray, left_iou: float, **options: Any) -> np.ndarray:
    """The points (x, y) in 0..1 that are decoded where those on the left have ``left_iou`` and others 0.9."""
    sam = copy.deepcopy(sam)
    seen = []
    size = sam.image_encoder.img_size
    encode_points, decode = sam.prompt_encoder.forward, sam.mask_decoder.forward
    embedding = torch.randn((1, sam.prompt_encoder.embed_dim, size // 16, size // 16)) * 0.1
    embedding[..., size // 32 :] += 3
    sam.image_encoder.forward = lambda images: embedding

    def note(points: Any, boxes: None, masks: None) -> Any:
        seen.append(points[0][:, 0].numpy() / size)
        return encode_points(points=points, boxes=boxes, masks=masks)

    def answer(**prompts: Any) -> tuple[torch.Tensor, torch.Tensor]:
        masks, iou = decode(**prompts)
        on_left = torch.from_numpy(seen[-1][:, 0] < 0.5)
        return masks, torch.where(on_left[:, None], left_iou, 0.9).expand_as(iou)

    sam.prompt_encoder.forward, sam.mask_decoder.forward = note, answer
    SamHierarchicalMaskGenerator(sam, **options).generate(image)
    return np.concatenate(seen)


def test_points_like_those_that_gave_no_mask_are_left_out(blob_sam: Sam) -> None:
    image = np.zeros((90, 90, 3), np.uint8)
    options: dict[str, Any] = {"points_per_side": 24, "pred_iou_thresh": 0.75, "high_score_thresh": np.inf}
    options |= {"rounds": 3, "coarse_ratio": 4}
    dense, coarse = 24 * 24, ENOUGH
    poor = prompted(blob_sam, image, left_iou=0.6, **options)
    assert len(poor) == dense / 2 + coarse / 2
    assert (poor[:, 0] < 0.5).sum() == coarse / 2
    assert len(np.unique(poor.round(6), axis=0)) == len(poor)
    # Within the margin, without one, or without a threshold, none is left out.
    assert len(prompted(blob_sam, image, left_iou=0.7, **options)) == dense
    assert len(prompted(blob_sam, image, left_iou=0.6, **options, iou_margin=np.inf)) == dense
    assert len(prompted(blob_sam, image, left_iou=-5.0, **options | {"pred_iou_thresh": 0.0})) == dense
    # A few points are no ground to leave others out.
    assert len(prompted(blob_sam, image, left_iou=-5.0, **options | {"points_per_side": 6})) == 6 * 6


def test_config_carries_every_option(blob_sam: Sam, photograph: np.ndarray) -> None:
    config = HierarchicalConfig(**OPTIONS, coarse_ratio=2, high_score_thresh=3.0)
    generator = SamHierarchicalMaskGenerator.from_config(blob_sam, config)
    assert generator.config == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coarse_ratio": 0.5}, "coarse_ratio"),
        ({"coarse_ratio": float("nan")}, "coarse_ratio"),
        ({"high_score_thresh": float("nan")}, "high_score_thresh"),
        ({"points_per_side": 0}, "points_per_side"),
        ({"rounds": 0}, "rounds"),
        ({"iou_margin": -0.1}, "iou_margin"),
        ({"preset": "fast"}, "preset must be one of adaptive, paper"),
    ],
)
def test_wrong_options_are_named(blob_sam: Sam, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamHierarchicalMaskGenerator(blob_sam, **options)
