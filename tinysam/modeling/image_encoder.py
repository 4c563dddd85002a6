"""The student's image encoder: timm's TinyViT at stride 16, followed by SAM's neck."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from segment_anything.modeling.common import LayerNorm2d
from timm.models.tiny_vit import TinyVit
from torch import nn


@dataclass(frozen=True, kw_only=True)
class TinyViTConfig:
    """TinyViT-5M, the encoder of TinySAM and MobileSAM."""

    embed_dims: tuple[int, int, int, int] = (64, 128, 160, 320)
    """Channels of the four stages."""
    depths: tuple[int, int, int, int] = (2, 2, 6, 2)
    """Blocks of the four stages."""
    num_heads: tuple[int, int, int, int] = (2, 4, 5, 10)
    """Attention heads of the four stages; the first stage is convolutional and ignores its number."""
    window_sizes: tuple[int, int, int, int] = (7, 7, 14, 7)
    """Side of the attention windows, in tokens."""
    drop_path_rate: float = 0.0
    """Stochastic depth of the last block while training; the earlier ones get proportionally less."""

    def __post_init__(self) -> None:
        for dim, heads in zip(self.embed_dims[1:], self.num_heads[1:], strict=True):
            if dim % heads:
                raise ValueError(f"TinyViTConfig: embed_dims {dim} cannot be split into {heads} heads")


class TinyViTEncoder(nn.Module):
    """Image to embedding: ``(B, 3, S, S)`` to ``(B, out_chans, S / 16, S / 16)``.

    The last patch merging keeps its resolution (stride 1 instead of 2), as in MobileSAM and TinySAM, so that the
    embedding has SAM's stride of 16.

    Args:
        config: the TinyViT's shape.
        img_size: S, in pixels; SAM's code reads it from ``sam.image_encoder.img_size``. The weights do not depend on
            it: any input whose sides are divisible by 16 is accepted.
        out_chans: channels of the embedding.
    """

    def __init__(self, config: TinyViTConfig, img_size: int = 1024, out_chans: int = 256) -> None:
        super().__init__()
        self.img_size = img_size
        self.backbone = TinyVit(
            embed_dims=config.embed_dims,
            depths=config.depths,
            num_heads=config.num_heads,
            window_sizes=config.window_sizes,
            drop_path_rate=config.drop_path_rate,
        )
        self.backbone.head = nn.Identity()
        self.backbone.stages[3].downsample.conv2.conv.stride = (1, 1)
        self.neck = nn.Sequential(
            nn.Conv2d(config.embed_dims[-1], out_chans, kernel_size=1, bias=False),
            LayerNorm2d(out_chans),
            nn.Conv2d(out_chans, out_chans, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(out_chans),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, 3, H, W)`` normalised images, H and W divisible by 16, to ``(B, out_chans, H / 16, W / 16)``."""
        return self.neck(self.backbone.forward_features(x))
