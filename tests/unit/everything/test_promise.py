from __future__ import annotations

import pytest
import torch

from tinysam.everything.promise import NEIGHBOURS, expected_iou


def test_the_best_of_the_nearest_answers_is_expected() -> None:
    generator = torch.Generator().manual_seed(3)
    asked, prompted = (torch.randn((n, 7), generator=generator) for n in (11, 23))
    best_iou = torch.rand(23, generator=generator)
    found = expected_iou(asked, prompted, best_iou)
    for point, value in zip(asked, found, strict=True):
        nearest = sorted(range(23), key=lambda i: float((prompted[i] - point).square().sum()))[:NEIGHBOURS]
        assert value == max(best_iou[i] for i in nearest)


@pytest.mark.parametrize(("asked", "prompted"), [(3, 1), (3, NEIGHBOURS - 1), (0, 5)])
def test_few_points_are_enough(asked: int, prompted: int) -> None:
    best_iou = torch.rand(prompted)
    found = expected_iou(torch.rand(asked, 4), torch.rand(prompted, 4), best_iou)
    assert found.shape == (asked,)
    if prompted < NEIGHBOURS:
        assert (found == best_iou.max()).all()
