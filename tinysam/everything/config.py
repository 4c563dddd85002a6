"""The options of everything mode: segment-anything's, by its names and with its defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

OutputMode = Literal["binary_mask", "uncompressed_rle", "coco_rle"]
Precision = Literal["float32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
OUTPUT_MODES: tuple[OutputMode, ...] = ("binary_mask", "uncompressed_rle", "coco_rle")


@dataclass(frozen=True, kw_only=True)
class MaskGeneratorConfig:
    """Options of the flat grid. Values outside the stated ranges raise ValueError."""

    points_per_side: int | None = 32
    """Points along each side of the grid, at the centres of its cells. None where explicit grids are given."""

    points_per_batch: int = 64
    """Prompts that are decoded together: more need more memory."""

    pred_iou_thresh: float = 0.88
    """Masks whose predicted IoU is not above this are dropped; 0 or less keeps all."""

    stability_score_thresh: float = 0.95
    """Masks whose stability score is below this are dropped; 0 or less keeps all but empty masks."""

    stability_score_offset: float = 1.0
    """Stability is the IoU between the masks thresholded this many logits above and below the threshold."""

    box_nms_thresh: float = 0.7
    """Of two masks of one crop whose boxes have a higher IoU than this, the one of lower predicted IoU is dropped."""

    crop_n_layers: int = 0
    """Runs the image's crops too: layer i has 2**i by 2**i of them."""

    crop_nms_thresh: float = 0.7
    """The same as box_nms_thresh between crops, where the smaller crop's mask is kept."""

    crop_overlap_ratio: float = 512 / 1500
    """Overlap of the first layer's crops, as a fraction of the image's shorter side; later layers scale it down."""

    crop_n_points_downscale_factor: int = 1
    """Layer i has points_per_side divided by this to the power i."""

    min_mask_region_area: int = 0
    """Holes and islands of fewer pixels are removed from the masks, and boxes are suppressed again; 0 leaves them."""

    output_mode: OutputMode = "binary_mask"
    """How a record holds its mask: an (H, W) bool array, a dict of run lengths, or COCO's compressed string."""

    precision: Precision = "float32"
    """Of the network's large products. bfloat16 is faster on processors that have it, and masks change slightly."""

    def __post_init__(self) -> None:
        for name, least in (
            ("points_per_batch", 1),
            ("crop_n_layers", 0),
            ("crop_n_points_downscale_factor", 1),
            ("min_mask_region_area", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        for name in ("box_nms_thresh", "crop_nms_thresh", "crop_overlap_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0..1, not {getattr(self, name)}")
        for name in ("pred_iou_thresh", "stability_score_thresh"):
            if math.isnan(getattr(self, name)):
                raise ValueError(f"{name} must be a number, not NaN")
        if not 0 <= self.stability_score_offset < math.inf:
            raise ValueError(f"stability_score_offset must not be negative, not {self.stability_score_offset}")
        if self.output_mode not in OUTPUT_MODES:
            raise ValueError(f"output_mode must be one of {', '.join(OUTPUT_MODES)}, not {self.output_mode!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {self.precision!r}")
        if self.points_per_side is not None:
            if self.points_per_side < 1:
                raise ValueError(f"points_per_side must be at least 1, not {self.points_per_side}")
            if self.points_per_side < self.crop_n_points_downscale_factor**self.crop_n_layers:
                raise ValueError(
                    f"points_per_side={self.points_per_side} leaves no point in crop layer {self.crop_n_layers} with "
                    f"crop_n_points_downscale_factor={self.crop_n_points_downscale_factor}"
                )


@dataclass(frozen=True, kw_only=True)
class HierarchicalConfig(MaskGeneratorConfig):
    """Options of the hierarchical mode: the paper's defaults (a grid of 8, then of 32, and a threshold of 8.5)."""

    rounds: int = 2
    """Grids in all, from the coarse one to the dense one in steps of equal ratio: 3 gives 8, 16 and 32. The paper has
    2; with more, what a middle round finds spares points of the dense one (our choice)."""

    coarse_ratio: float = 4
    """The first round's grid has points_per_side divided by this along each side, rounded; 3.2 gives 10 before 32."""

    high_score_thresh: float = 8.5
    """Pixels whose logit is above this in a mask kept by one round get no point in the later ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, not {self.rounds}")
        if not 1 <= self.coarse_ratio < math.inf:
            raise ValueError(f"coarse_ratio must be at least 1, not {self.coarse_ratio}")
        if math.isnan(self.high_score_thresh):
            raise ValueError("high_score_thresh must be a number, not NaN")
