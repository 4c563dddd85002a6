"""What the low-rank decoder keeps instead of every prompt's image tokens; ``low_rank`` derives it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SharedImage(NamedTuple):
    """What all prompts of an image have in common. Matrices of N image tokens are split by head, or by tile as well."""

    keys_0: Tensor  # (H, d, N) of layer 0's attention from tokens to image
    values_0: Tensor  # (H, N, d)
    queries_0: Tensor  # (H, d, N) of layer 0's attention from image to tokens
    squares_0: Tensor  # (N,) |(K0 + 1 b_o)^|^2
    cross_0: Tensor  # (H, d, N) twice (K0 + 1 b_o)^ by the centred output projection
    keys_1: Tensor  # as above, for S1
    values_1: Tensor
    queries_1: Tensor
    squares_1: Tensor  # (N,) |S1^|^2
    offset_1: Tensor  # (N,) S1^ by (b + b_o)^
    cross_10: Tensor  # (H, d, N) twice S1^ by the rows that layer 0's update added
    cross_11: Tensor  # (H, d, N) twice S1^ by the rows that layer 1's update adds
    keys_2: Tensor  # for S2 and the final attention
    values_2: Tensor
    upscaled: Tensor  # (N, C) S2 through the first transposed convolution


class Update(NamedTuple):
    """The image tokens of B prompts after an update: inverse * (previous * S + columns' rows + 1 offset) + 1 bias."""

    inverse: Tensor  # (B, 1, N) r
    previous: Tensor | None  # (B, 1, N); None for ones
    columns: Tensor  # (B, R, N)
    rows: Tensor  # (B, R, C)
    offset: Tensor | None  # (C,); None for zeros


class DecodedTokens(NamedTuple):
    """The decoder's answer to B prompts, before masks are made of it."""

    predicted_iou: Tensor  # (B, masks)
    hyper: Tensor  # (B, masks, C / 8), what each mask multiplies the upscaled embedding by
    image: Update

    def select(self, prompts: Tensor) -> DecodedTokens:
        """The prompts at those positions (K,)."""
        image = Update(
            inverse=self.image.inverse[prompts],
            previous=None if self.image.previous is None else self.image.previous[prompts],
            columns=self.image.columns[prompts],
            rows=self.image.rows[prompts],
            offset=self.image.offset,
        )
        return DecodedTokens(self.predicted_iou[prompts], self.hyper[prompts], image)
