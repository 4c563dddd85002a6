"""Prompts through a Sam's decoder, many at once, and box prompts scored against ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from segment_anything.modeling import Sam

from tinysam.eval.masks import Rle, at_original_size
from tinysam.everything.decoders import ImageDecoders
from tinysam.everything.decoding import EncodedImage
from tinysam.predictor import ResizeLongestSide


@torch.no_grad()
def decode_prompts(
    sam: Sam,
    image: EncodedImage,
    *,
    boxes: np.ndarray | None = None,
    points: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    mask_input: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All four of the decoder's masks for a batch of prompts, in one pass.

    SAM's ``multimask_output=False`` is index 0 of the result and ``multimask_output=True`` the rest; taking both
    from one pass halves the cost of reporting both protocols.

    Args:
        sam: in eval mode.
        image: after the encoder, from ``tinysam.everything.decoding.encode``.
        boxes: (B, 4) XYXY in the original frame.
        points: (B, K, 2) x, y in the original frame, with ``labels`` (B, K): 1 inside, 0 outside.
        labels: see ``points``.
        mask_input: (B, 1, S/4, S/4) logits of an earlier step.

    Returns:
        Logits (B, 4, S/4, S/4) and predicted IoUs (B, 4).

    Raises:
        ValueError: for points without labels.
        FloatingPointError: from the low-rank decoder, as from everything mode: damaged weights.
    """
    transform = ResizeLongestSide(sam.image_encoder.img_size)
    device = sam.device
    point_prompt = box_prompt = None
    if points is not None:
        if labels is None:
            raise ValueError("points need labels")
        coords = transform.apply_coords(points, image.size)
        point_prompt = (
            torch.as_tensor(coords, dtype=torch.float, device=device),
            torch.as_tensor(labels, dtype=torch.int, device=device),
        )
    if boxes is not None:
        box_prompt = torch.as_tensor(transform.apply_boxes(boxes, image.size), dtype=torch.float, device=device)
    sparse, dense = sam.prompt_encoder(points=point_prompt, boxes=box_prompt, masks=mask_input)
    if mask_input is None:  # prompts of one image that share all but their few tokens
        decoder = ImageDecoders(sam).low_rank_of(image.embedding, prompts=len(sparse), tokens=sparse.shape[1])
        if decoder is not None:
            return decoder.decode_all(sparse)
    return sam.mask_decoder.predict_masks(
        image_embeddings=image.embedding,
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
    )


@dataclass(frozen=True, kw_only=True)
class BoxPredictions:
    """Masks at original resolution for N boxes, by protocol."""

    multimask: list[Rle]
    """Of the three multi-mask outputs, the one with the highest predicted IoU: the papers' protocol."""
    multimask_scores: np.ndarray
    """(N,) its predicted IoU."""
    singlemask: list[Rle]
    """SAM's single-mask output, which it is trained to use for unambiguous prompts."""
    singlemask_scores: np.ndarray
    """(N,) its predicted IoU."""

    def __len__(self) -> int:
        return len(self.multimask)


def predict_boxes(sam: Sam, image: EncodedImage, boxes: np.ndarray, *, prompts_per_batch: int = 64) -> BoxPredictions:
    """Segments every box, by both protocols.

    Args:
        sam: in eval mode.
        image: after the encoder, from ``tinysam.everything.decoding.encode``.
        boxes: (N, 4) XYXY in the original frame; N may be 0.
        prompts_per_batch: prompts in one decoder pass.
    """
    rles: tuple[list[Rle], list[Rle]] = ([], [])
    scores: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for start in range(0, len(boxes), prompts_per_batch):
        logits, ious = decode_prompts(sam, image, boxes=boxes[start : start + prompts_per_batch])
        best_of_three = 1 + ious[:, 1:].argmax(dim=1)
        rows = torch.arange(len(ious), device=ious.device)
        for protocol, chosen in enumerate((best_of_three, torch.zeros_like(best_of_three))):
            scores[protocol].append(ious[rows, chosen].float().cpu().numpy())
            rles[protocol].extend(at_original_size(sam, image, logits[rows, chosen]))
    multimask_scores, singlemask_scores = (np.concatenate([np.zeros(0, np.float32), *part]) for part in scores)
    return BoxPredictions(
        multimask=rles[0],
        multimask_scores=multimask_scores,
        singlemask=rles[1],
        singlemask_scores=singlemask_scores,
    )


def check_sizes(masks: Sequence[Rle], original_size: tuple[int, int]) -> None:
    """Refuses ground truth of another image's size.

    Raises:
        ValueError: naming both sizes.
    """
    for mask in masks:
        size = tuple(mask["size"])
        if size != tuple(original_size):
            raise ValueError(f"a ground-truth mask of size {size} for an image of {tuple(original_size)}")
