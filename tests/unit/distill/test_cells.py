from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tinysam.distill.cells import choose_cells


@given(total=st.integers(1, 40), count=st.integers(2, 50), seed=st.integers(0, 2**31))
def test_each_cell_is_chosen_at_most_once_the_most_important_always_and_all_are_stood_for(
    total: int, count: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    importance, chances = torch.rand(2, 3, total, generator=generator)
    cells, weights = choose_cells(importance, chances, count)
    assert cells.shape == weights.shape == (3, min(count, total))
    assert all(len(set(row)) == len(row) for row in cells.tolist())
    torch.testing.assert_close(weights.sum(1), torch.full((3,), float(total)))
    certain = count // 2 if count < total else total
    for row, order in zip(cells, importance.argsort(1, descending=True), strict=True):
        assert set(order[:certain].tolist()) <= set(row.tolist())


def test_weighted_sums_expect_the_sum_over_all_cells() -> None:
    generator = torch.Generator().manual_seed(0)
    values, importance = torch.rand(2, 1, 30, generator=generator)
    chances = torch.rand(20_000, 30, generator=generator)
    cells, weights = choose_cells(importance.expand_as(chances), chances, 10)
    sums = (values[0][cells] * weights).sum(1)
    error = sums.std() / len(sums) ** 0.5
    assert (sums.mean() - values.sum()).abs() < 4 * error
