"""What a point may be expected to give, before it is prompted (our choice).

Points that look alike to the image encoder are answered alike: on background, say, no mask is predicted to be good. So
the answers to the points prompted so far tell which others are worth the decoder's time, at the cost of one product of
their embeddings. The highest of a few neighbours' answers counts, as a missed object costs more than a wasted prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS = 4
"""Prompted points that are asked about another one."""

ENOUGH = 36
"""Points to prompt before their answers count: after fewer, whatever is unlike all of them is missed for good."""


def expected_iou(asked: Tensor, prompted: Tensor, best_iou: Tensor) -> Tensor:
    """The highest predicted IoU among the prompted points that are most like each point asked for.

    Args:
        asked: (A, C) image embedding at the points asked for.
        prompted: (P, C) at those prompted already; P is at least 1.
        best_iou: (P,) highest predicted IoU of their masks.

    Returns:
        (A,).
    """
    nearest = torch.cdist(asked, prompted).topk(min(NEIGHBOURS, len(prompted)), largest=False).indices
    return best_iou[nearest].amax(1)
