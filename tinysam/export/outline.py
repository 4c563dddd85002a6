"""Outlines of masks as polygons along the edges of pixels, from which the very same mask can be filled."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

_STEPS = ((0, 1), (1, 0), (0, -1), (-1, 0))  # right, down, left, up, as (row, column)


def outline(mask: np.ndarray) -> np.ndarray:
    """Traces a mask, holes and separate parts included, as one polygon.

    Corners are corners of pixels. Outer borders run clockwise (rows pointing down) and borders of holes against it;
    they are joined by lines there and back, so that they enclose nothing. A pixel is in the mask if, and only if, its
    centre is in the polygon, by the even-odd and by the nonzero rule.

    Args:
        mask: (H, W) bool.

    Returns:
        (N, 2) int64 corners (x, y), 0 to W and 0 to H; (0, 2) for an empty mask.
    """
    loops = _loops(mask)
    if not loops:
        return np.zeros((0, 2), dtype=np.int64)
    joined = list(loops[0])
    anchor = joined[0]
    for loop in loops[1:]:
        joined += [anchor, *loop, loop[0]]
    corners = np.array(joined, dtype=np.int64)
    return corners[:, ::-1]


def _loops(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """Closed borders as corners (row, column), each without the repeated first one."""
    following = _edges(mask)
    loops = []
    while following:
        start = next(iter(following))
        direction = following[start][0]
        corner = start
        loop: list[tuple[int, int]] = []
        while True:
            choices = following[corner]
            # Where two pixels touch at a corner alone, the border turns right: parts stay apart.
            turn = (direction + 1) % 4
            taken = turn if len(choices) > 1 and turn in choices else choices[0]
            if taken != direction or not loop:
                loop.append(corner)
            choices.remove(taken)
            if not choices:
                del following[corner]
            direction = taken
            corner = (corner[0] + _STEPS[taken][0], corner[1] + _STEPS[taken][1])
            if corner == start:
                break
        loops.append(loop)
    return loops


def _edges(mask: np.ndarray) -> dict[tuple[int, int], list[int]]:
    """Directions of the border's unit edges by the corner that they start from, the mask on their right."""
    padded = np.pad(mask.astype(np.int8), 1)
    down = np.diff(padded, axis=0)[:, 1:-1]  # +1 where the mask begins below a corner row
    across = np.diff(padded, axis=1)[1:-1, :]
    following: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row, column in np.argwhere(down == 1).tolist():
        following[row, column].append(0)
    for row, column in np.argwhere(down == -1).tolist():
        following[row, column + 1].append(2)
    for row, column in np.argwhere(across == -1).tolist():
        following[row, column].append(1)
    for row, column in np.argwhere(across == 1).tolist():
        following[row + 1, column].append(3)
    return dict(following)
