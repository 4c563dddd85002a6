from __future__ import annotations

import copy

import pytest
import torch
from segment_anything.modeling import TwoWayTransformer

from tinysam.distill.two_way import two_way


@pytest.fixture
def transformer() -> TwoWayTransformer:
    torch.manual_seed(0)
    transformer = TwoWayTransformer(depth=2, embedding_dim=32, num_heads=4, mlp_dim=48).double()
    with torch.no_grad():  # as built, biases are nearly and LayerNorms quite without effect
        for value in transformer.parameters():
            value.add_(torch.randn_like(value) * 0.3)
    return transformer


@pytest.mark.parametrize("shared", [True, False])
def test_it_is_segment_anythings_transformer_to_its_gradients(transformer: TwoWayTransformer, shared: bool) -> None:
    images, prompts, height, width = 2, 3, 5, 4
    torch.manual_seed(1)
    image = torch.randn(images if shared else images * prompts, 32, height, width).double()
    positions = torch.randn(images, 32, height, width).double()
    tokens = torch.randn(images * prompts, 7, 32).double()
    reference = copy.deepcopy(transformer)
    repeated = [x if len(x) == len(tokens) else x.repeat_interleave(prompts, 0) for x in (image, positions)]
    leaves = [x.clone().requires_grad_() for x in (*repeated, tokens)]
    expected = reference(*leaves)
    mine = [x.clone().requires_grad_() for x in (image, positions, tokens)]
    found = two_way(transformer, mine[0].flatten(2).mT, mine[1].flatten(2).mT, mine[2])
    torch.testing.assert_close(found, expected)

    towards = [torch.randn_like(x) for x in expected]
    for outputs in (found, expected):
        sum((a * b).sum() for a, b in zip(outputs, towards, strict=True)).backward()
    for ours, theirs in zip(mine, leaves, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad.unflatten(0, (len(ours), -1)).sum(1))
    for (name, value), other in zip(transformer.named_parameters(), reference.parameters(), strict=True):
        # A bias of keys moves all scores that a softmax compares: its gradient is nothing, or None.
        gradient = torch.zeros_like(value) if value.grad is None else value.grad
        torch.testing.assert_close(gradient, other.grad, msg=name)


def test_autocast_is_as_exact_as_segment_anythings(transformer: TwoWayTransformer) -> None:
    torch.manual_seed(2)
    image, positions, tokens = torch.randn(2, 32, 6, 6), torch.randn(2, 32, 6, 6), torch.randn(8, 7, 32)
    repeated = image.repeat_interleave(4, 0), positions.repeat_interleave(4, 0)
    exact = transformer(*(x.double() for x in repeated), tokens.double())
    transformer.float()
    with torch.autocast("cpu", torch.bfloat16):
        theirs = transformer(*repeated, tokens)
        ours = two_way(transformer, image.flatten(2).mT, positions.flatten(2).mT, tokens)
    for mine, other, right in zip(ours, theirs, exact, strict=True):
        assert (mine - right).abs().mean() < 1.3 * (other - right).abs().mean()
