"""Which parts of a mask are compared with the ground truth, where comparing all of it costs too much.

Most of an image lies far from a prompted object, and a decoder soon knows it. PointRend and Mask2Former compare masks
at sampled points, most of them where it matters; here whole cells of the embedding are drawn, as SAM upscales each cell
by itself (our choice).
"""

from __future__ import annotations

import torch


def choose_cells(importance: torch.Tensor, chances: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Half of ``count`` cells by importance, the others at random, weighed so that sums over them expect the whole's.

    Args:
        importance: ``(N, S)`` of the S cells.
        chances: ``(N, S)`` uniformly drawn from [0, 1).
        count: K; at least S chooses all.

    Returns:
        ``(N, K)`` int64 indices, and ``(N, K)`` float32 weights whose sum is S: 1 for the most important ones, and
        for each of the others as many as it stands for.
    """
    total = importance.shape[1]
    certain = total if count >= total else count // 2
    drawn = min(count, total) - certain
    first = importance.topk(certain, sorted=False).indices
    others = chances.scatter(1, first, -1.0).topk(drawn, sorted=False).indices
    weights = chances.new_ones(len(chances), certain + drawn)
    weights[:, certain:] = (total - certain) / max(1, drawn)
    return torch.cat([first, others], 1), weights
