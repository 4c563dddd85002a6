"""The options of everything mode: segment-anything's, by its names and with its defaults."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

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
    """Of the network's large products. bfloat16 is faster where a processor has it (on a CPU, for the decoder: Intel's
    AMX), and masks change slightly."""

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

    def decisive(self) -> dict[str, Any]:
        """The options that decide about the masks: all but those that change memory and speed alone."""
        options = asdict(self)
        del options["points_per_batch"]
        return options


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which points the hierarchical mode prompts, and when. Values outside the stated ranges raise ValueError."""

    rounds: int
    """Grids in all, from the coarse one to the dense one in steps of equal ratio: 3 with a coarse_ratio of 4 gives 8,
    16 and 32. 1 is the flat grid."""

    coarse_ratio: float
    """The first round's grid has points_per_side divided by this along each side, rounded; 3.2 gives 10 before 32."""

    high_score_thresh: float
    """Pixels whose logit is above this in a mask kept by one round get no point in the later ones."""

    nested: bool
    """Rounds before the last take their points from the dense grid, those nearest to their own grid's, so that no
    round adds any. Otherwise they prompt their own grid's, in addition to the dense one's."""

    iou_margin: float
    """Once enough points have been prompted, others are left out that are expected to give no mask: of the prompted
    ones most alike in the image embedding, none was predicted an IoU within this of pred_iou_thresh. inf leaves none
    out."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, not {self.rounds}")
        if not 1 <= self.coarse_ratio < math.inf:
            raise ValueError(f"coarse_ratio must be at least 1, not {self.coarse_ratio}")
        if math.isnan(self.high_score_thresh):
            raise ValueError("high_score_thresh must be a number, not NaN")
        if not self.iou_margin >= 0:
            raise ValueError(f"iou_margin must not be negative, not {self.iou_margin}")


Preset = Literal["adaptive", "paper"]
PRESETS: dict[Preset, Schedule] = {
    # Our choice: grids of 6, 8, 11, 16 and 23 a side, then what is left of the dense one.
    "adaptive": Schedule(rounds=6, coarse_ratio=5.66, high_score_thresh=12.0, nested=True, iou_margin=0.1),
    # TinySAM, arXiv 2312.13789, section 3.3: a grid of 8 by 8, then what is left of one of 32 by 32.
    "paper": Schedule(rounds=2, coarse_ratio=4, high_score_thresh=8.5, nested=False, iou_margin=math.inf),
}


@dataclass(frozen=True, kw_only=True)
class HierarchicalConfig(MaskGeneratorConfig):
    """Options of the hierarchical mode: those of the flat grid, and a schedule."""

    preset: Preset = "adaptive"
    """The schedule: adaptive spares more points for the same masks, paper is TinySAM's. The options below, where given,
    take the place of the preset's; ``Schedule`` describes them."""

    rounds: int | None = None
    """Grids in all, from the coarse one to the dense one; 1 is SAM's flat grid."""

    coarse_ratio: float | None = None
    """points_per_side of the last round divided by that of the first."""

    high_score_thresh: float | None = None
    """Pixels whose logit is above this in a mask that was kept get no point in later rounds."""

    nested: bool | None = None
    """Whether all rounds share the points of the dense grid."""

    iou_margin: float | None = None
    """Points are left out where the predicted IoU is expected to miss pred_iou_thresh by more than this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, not {self.preset!r}")
        _ = self.schedule  # refuses values out of range

    @property
    def schedule(self) -> Schedule:
        """The preset's, with the options that were given."""
        given = {field.name: getattr(self, field.name) for field in fields(Schedule)}
        return replace(PRESETS[self.preset], **{name: value for name, value in given.items() if value is not None})

    def decisive(self) -> dict[str, Any]:
        """As for the flat grid; a preset and the same options by hand are equal."""
        options = super().decisive() | asdict(self.schedule)
        del options["preset"]
        return options
