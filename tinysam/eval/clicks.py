"""Interactive segmentation with simulated clicks.

The protocol is SAM's (appendix D.1, which follows RITM, Sofiiuk et al. 2022): the first click is the point of the
object farthest from its boundary; each next one is the point of the error region farthest from that region's boundary,
positive where the mask misses the object and negative where it spills over. The first click is ambiguous, so it takes
the multi-mask output of highest predicted IoU; all later ones take the single-mask output. The low-resolution logits
of the previous step go back in as ``mask_input``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pycocotools import mask as mask_utils
from scipy import ndimage
from segment_anything.modeling import Sam

from tinysam.eval.masks import Rle, at_original_size, paired_iou
from tinysam.eval.prompts import decode_prompts
from tinysam.everything.decoding import EncodedImage


@dataclass(frozen=True, kw_only=True)
class ClickConfig:
    """How clicks are simulated."""

    clicks: int = 5
    """How many clicks each object gets."""
    first_click: Literal["center", "random"] = "center"
    """The deepest interior point, or a random pixel of the object: SAM's harder variant."""
    next_click: Literal["error", "missed"] = "error"
    """Centre of the largest error region (SAM, RITM), or of what the mask misses, as TinySAM's training prompts are
    drawn; where nothing is missed the spill-over is clicked."""
    feed_logits: bool = True
    """Give the previous step's low-resolution logits to the next one as mask input, as SAM's evaluation does."""
    seed: int = 0
    """Of the random first click; the same object gets the same click in every model."""

    def __post_init__(self) -> None:
        if self.clicks < 1:
            raise ValueError(f"clicks must be at least 1, not {self.clicks}")


def deepest_point(region: np.ndarray) -> tuple[tuple[int, int], float]:
    """The pixel of a region that is farthest from its outside; beyond the image's edge is outside.

    Args:
        region: (H, W) bool, not empty.

    Returns:
        (x, y) and the distance in pixels (1 for a single pixel). The first such pixel in row order where several tie.

    Raises:
        ValueError: if the region is empty.
    """
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    if not len(rows):
        raise ValueError("an empty region has no interior point")
    top, left = int(rows[0]), int(columns[0])
    crop = np.pad(region[top : rows[-1] + 1, left : columns[-1] + 1], 1)
    distance = ndimage.distance_transform_edt(crop)
    y, x = np.unravel_index(int(distance.argmax()), distance.shape)
    return (left + int(x) - 1, top + int(y) - 1), float(distance[y, x])


def next_click(
    truth: np.ndarray, prediction: np.ndarray, policy: Literal["error", "missed"] = "error"
) -> tuple[int, int, int] | None:
    """Where a user would click to repair a mask.

    Args:
        truth: (H, W) bool.
        prediction: (H, W) bool.
        policy: see ``ClickConfig.next_click``.

    Returns:
        (x, y, label) with label 1 where the object is missed and 0 where the mask spills over; None for a perfect
        mask. Regions of equal depth go to the negative click, as in RITM.
    """
    missed, spilled = truth & ~prediction, prediction & ~truth
    candidates = []
    if missed.any():
        (x, y), depth = deepest_point(missed)
        candidates.append((depth, 1, x, y))
    if spilled.any() and not (policy == "missed" and candidates):
        (x, y), depth = deepest_point(spilled)
        candidates.append((depth, 0, x, y))
    if not candidates:
        return None
    _, label, x, y = max(candidates, key=lambda candidate: (candidate[0], -candidate[1]))
    return x, y, label


def first_click(truth: np.ndarray, policy: Literal["center", "random"] = "center", seed: int = 0) -> tuple[int, int]:
    """(x, y) of an object's first click; ``truth`` is (H, W) bool and not empty."""
    if policy == "center":
        return deepest_point(truth)[0]
    inside = np.flatnonzero(truth)
    y, x = divmod(int(np.random.default_rng(seed).choice(inside)), truth.shape[1])
    return x, y


def click_ious(
    sam: Sam,
    image: EncodedImage,
    truths: Sequence[Rle],
    config: ClickConfig | None = None,
    *,
    prompts_per_batch: int = 64,
) -> np.ndarray:
    """IoU of each object after each click: (objects, clicks) float64.

    An object whose mask is perfect gets no further click and keeps its 1.0.

    Args:
        sam: in eval mode.
        image: after the encoder, from ``tinysam.everything.decoding.encode``.
        truths: COCO RLEs of non-empty masks in the original frame.
        config: SAM's protocol with 5 clicks by default.
        prompts_per_batch: objects in one decoder pass.
    """
    config = config or ClickConfig()
    result = np.ones((len(truths), config.clicks))
    for start in range(0, len(truths), prompts_per_batch):
        batch = truths[start : start + prompts_per_batch]
        result[start : start + len(batch)] = _click_batch(sam, image, batch, config, start)
    return result


def _click_batch(
    sam: Sam, image: EncodedImage, truths: Sequence[Rle], config: ClickConfig, first_index: int
) -> np.ndarray:
    result = np.ones((len(truths), config.clicks))
    active = np.arange(len(truths))  # objects whose mask is not perfect yet; rows of points, labels and logits
    points = np.array(
        [
            [first_click(_decode(truth), config.first_click, config.seed + first_index + i)]
            for i, truth in enumerate(truths)
        ],
        dtype=np.float64,
    )
    labels = np.ones((len(truths), 1), dtype=np.int64)
    logits: torch.Tensor | None = None
    for step in range(config.clicks):
        mask_input = logits if config.feed_logits else None
        all_logits, ious = decode_prompts(sam, image, points=points, labels=labels, mask_input=mask_input)
        rows = torch.arange(len(ious), device=ious.device)
        chosen = 1 + ious[:, 1:].argmax(dim=1) if step == 0 else torch.zeros_like(rows)
        logits = all_logits[rows, chosen][:, None]
        masks = at_original_size(sam, image, logits[:, 0])
        targets = [truths[i] for i in active.tolist()]
        result[active, step] = paired_iou(masks, targets)
        if step + 1 == config.clicks:
            break
        clicks = [
            next_click(_decode(target), _decode(mask), config.next_click)
            for target, mask in zip(targets, masks, strict=True)
        ]
        going = np.array([i for i, click in enumerate(clicks) if click is not None], dtype=np.int64)
        if not len(going):
            break
        added = np.array([click for click in clicks if click is not None])
        points = np.concatenate([points[going], added[:, None, :2].astype(np.float64)], axis=1)
        labels = np.concatenate([labels[going], added[:, None, 2]], axis=1)
        logits, active = logits[torch.as_tensor(going, device=logits.device)], active[going]
    return result


def _decode(rle: Rle) -> np.ndarray:
    return mask_utils.decode(rle).astype(bool)
