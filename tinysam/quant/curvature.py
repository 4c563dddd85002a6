"""How sensitive a Sam's outputs are to each product: the Hessian's part in the Hessian-guided distance.

The paper weights a product's error with the squared gradient of the task loss, KL(float, quantized) of the mask outputs
plus that of the IoU outputs. At the float model itself this gradient is zero, as KL has its minimum there. What is left
is its curvature, and the diagonal of that is the expected squared gradient of the log-likelihood of outcomes drawn from
the float model's own outputs (its Fisher information). That is what is taken here: our reading of the paper.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam


def click_grid(sam: Sam, points_per_side: int, input_size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt embeddings of a grid of clicks, each alone, over an image of ``input_size`` = (H, W) input pixels."""
    cells = (torch.arange(points_per_side) + 0.5) / points_per_side
    y, x = torch.meshgrid(cells * input_size[0], cells * input_size[1], indexing="ij")
    points = torch.stack([x.flatten(), y.flatten()], dim=-1)[:, None]
    sparse, dense = sam.prompt_encoder(points=(points, torch.ones(len(points), 1)), boxes=None, masks=None)
    return sparse, dense


def log_likelihood(masks: torch.Tensor, ious: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Of an outcome drawn from the outputs; a scalar that can be differentiated.

    A mask's pixels are Bernoulli variables of its logits, and which of a prompt's masks is best is drawn from the
    softmax of the predicted IoUs (our choice). Pixels are scaled so that a mask counts as the mean of its pixels.

    Args:
        masks: (B, 4, h, w) logits.
        ious: (B, 4) predicted IoUs.
        generator: of the draw.
    """
    with torch.no_grad():
        inside = (torch.rand(masks.shape, generator=generator) < masks.sigmoid()).float()
        best = torch.multinomial(ious.softmax(-1), 1, generator=generator)
    # Squared, gradients of independent pixels add up; so the root of a mean's factor.
    pixels = -F.binary_cross_entropy_with_logits(masks, inside, reduction="sum") / (masks[0, 0].numel() ** 0.5)
    return pixels + ious.log_softmax(-1).gather(1, best).sum()
