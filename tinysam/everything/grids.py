"""Where the points and the crops lie.

Grids are (N, 2) float64 arrays of (x, y) in 0..1. Points sit at the centres of the grid's cells, as segment-anything
has them, in both rounds of the hierarchical mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial import cKDTree
from segment_anything.utils.amg import build_all_layer_point_grids, build_point_grid, generate_crop_boxes

from tinysam.everything.config import MaskGeneratorConfig


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A rectangle of an image that is segmented on its own; layer 0 is the whole image."""

    x0: int
    y0: int
    x1: int
    y1: int
    layer: int

    @property
    def box(self) -> list[int]:
        """XYXY in pixels of the original image, the last column and row excluded."""
        return [self.x0, self.y0, self.x1, self.y1]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.y1 - self.y0, self.x1 - self.x0


def crops_of(image_size: tuple[int, int], n_layers: int, overlap_ratio: float) -> list[Crop]:
    """segment-anything's crops of an (H, W) image, less those that have no pixel (a side of 1 cannot be halved)."""
    boxes, layers = generate_crop_boxes(image_size, n_layers, overlap_ratio)
    crops = [
        Crop(x0=x0, y0=y0, x1=x1, y1=y1, layer=layer) for (x0, y0, x1, y1), layer in zip(boxes, layers, strict=True)
    ]
    return [crop for crop in crops if min(crop.size) > 0]


def layer_grids(config: MaskGeneratorConfig, point_grids: Sequence[ArrayLike] | None) -> list[np.ndarray]:
    """The grid of every crop layer: ``point_grids`` where given, otherwise regular ones.

    Raises:
        ValueError: both or neither of ``point_grids`` and ``points_per_side``, too few grids, or points outside 0..1.
    """
    if (config.points_per_side is None) == (point_grids is None):
        raise ValueError("give exactly one of points_per_side and point_grids (points_per_side=None with point_grids)")
    if point_grids is None:
        return build_all_layer_point_grids(
            config.points_per_side, config.crop_n_layers, config.crop_n_points_downscale_factor
        )
    if len(point_grids) <= config.crop_n_layers:
        raise ValueError(f"point_grids must hold {config.crop_n_layers + 1} grids, one a crop layer")
    grids = [np.asarray(grid, dtype=np.float64) for grid in point_grids]
    for grid in grids:
        if grid.ndim != 2 or grid.shape[1] != 2:
            raise ValueError(f"a point grid must have shape (N, 2), not {grid.shape}")
        if not ((grid >= 0) & (grid <= 1)).all():
            raise ValueError("the points of a grid must lie in 0..1")
    return grids


def round_grids(dense: np.ndarray, ratio: float, rounds: int) -> list[np.ndarray]:
    """The grids of all rounds, the last of them ``dense``.

    The ones before are regular. The first has ``ratio`` times fewer points a side, the others lie between in steps of
    equal ratio; each has at least one point, unless ``dense`` has none.
    """
    if len(dense) == 0:
        return [dense]
    side = len(dense) ** 0.5
    left = [ratio ** (1 - i / (rounds - 1)) for i in range(rounds - 1)]
    return [*(build_point_grid(max(1, round(side / r))) for r in left), dense]


def nested_grids(dense: np.ndarray, ratio: float, rounds: int) -> list[np.ndarray]:
    """The points of ``dense``, parted into rounds.

    Each round but the last takes those nearest to the points of its grid in ``round_grids``, if no earlier round has
    them; the last takes the rest.
    """
    grids = round_grids(dense, ratio, rounds)
    left = np.ones(len(dense), bool)
    parts = []
    for coarse in grids[:-1]:
        nearest = np.zeros(len(dense), bool)
        nearest[cKDTree(dense).query(coarse)[1]] = True
        parts.append(dense[nearest & left])
        left &= ~nearest
    return [*parts, dense[left]]


def pixels_of(points: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The rows and columns (N,) of the pixels that hold ``points``, (N, 2) as (x, y) in an image of (height, width)."""
    height, width = size
    rows = np.clip(np.floor(points[:, 1]).astype(np.intp), 0, height - 1)
    columns = np.clip(np.floor(points[:, 0]).astype(np.intp), 0, width - 1)
    return rows, columns
