"""Random weights that do in everything mode what trained ones do: large masks with edges, a share of which is kept.

As they are, they give logits of almost nothing with the texture of the transposed convolutions, so that either no mask
passes a filter or every mask is dust. What is changed costs no arithmetic more or less, so times stay those of the
architecture.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from segment_anything.modeling import Sam
from segment_anything.utils.amg import build_point_grid, calculate_stability_score

from tinysam.everything.decoding import embed_points, encode

SPREAD = 12.0
"""Standard deviation of a mask's logits."""

AREA = 0.2
"""Share of the image that a mask covers."""


@torch.no_grad()
def make_realistic(sam: Sam, image: np.ndarray, keep: float) -> dict[str, float]:
    """Changes a Sam of random weights in place, and chooses thresholds at which about ``keep`` of its masks survive.

    Args:
        image: (H, W, 3) uint8, on which that holds.
        keep: half of what is lost is lost to predicted IoU, half to stability, more or less.

    Returns:
        ``pred_iou_thresh`` and ``stability_score_thresh``.
    """
    decoder = sam.mask_decoder
    for convolution in (decoder.output_upscaling[0], decoder.output_upscaling[3]):
        convolution.weight.copy_(convolution.weight.mean((2, 3), keepdim=True).expand_as(convolution.weight))
    last_layers = [mlp.layers[-1] for mlp in decoder.output_hypernetworks_mlps]

    [encoded] = encode(sam, [image])
    sparse = embed_points(sam, encoded, build_point_grid(4) * encoded.size[::-1])
    upscaled: list[torch.Tensor] = []
    hook = decoder.output_upscaling.register_forward_hook(lambda *call: upscaled.append(call[-1]))
    _decode(sam, encoded.embedding, sparse)
    hook.remove()
    # What all pixels have in common only shifts a mask's logits: first nothing of it, then as much as the area needs.
    common = torch.cat(upscaled).mean((0, 2, 3))
    direction = common / common.norm()
    for layer in last_layers:
        layer.weight.sub_(torch.outer(direction, direction @ layer.weight))
        layer.bias.sub_(direction * (direction @ layer.bias))
    logits, _ = _decode(sam, encoded.embedding, sparse)
    scale = SPREAD / logits.std((2, 3)).mean()
    shift = np.quantile((scale * logits).numpy(force=True), 1 - AREA)
    for layer in last_layers:
        layer.weight.mul_(scale)
        layer.bias.mul_(scale).sub_(shift * direction / common.norm())

    logits, predicted_iou = _decode(sam, encoded.embedding, sparse)
    passing = keep**0.5
    stability = calculate_stability_score(logits.flatten(0, 1), sam.mask_threshold, 1.0)
    threshold = 0.88
    head = decoder.iou_prediction_head.layers[-1]
    head.bias[1:] += threshold - predicted_iou.quantile(1 - passing, dim=0)
    return {"pred_iou_thresh": threshold, "stability_score_thresh": float(stability.quantile(1 - passing))}


def _decode(sam: Sam, embedding: torch.Tensor, sparse: torch.Tensor) -> tuple[Any, Any]:
    """Low-resolution logits and predicted IoU of prompts."""
    no_mask = sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
    return sam.mask_decoder(
        image_embeddings=embedding,
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=no_mask.expand(len(sparse), *embedding.shape[1:]),
        multimask_output=True,
    )
