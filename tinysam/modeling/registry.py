"""Every model that the project knows, built as a ``segment_anything.modeling.Sam``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from tinysam.modeling.fused_attention import fuse_attention
from tinysam.modeling.image_encoder import TinyViTConfig, TinyViTEncoder

PATCH_SIZE = 16
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """SAM's own image encoder; the defaults are ViT-B's."""

    embed_dim: int = 768
    """Channels of a token."""
    depth: int = 12
    """Transformer blocks."""
    num_heads: int = 12
    """Attention heads of each block."""
    global_attn_indexes: tuple[int, ...] = (2, 5, 8, 11)
    """Blocks that attend to the whole image; the others attend within windows of 14x14 tokens."""


@dataclass(frozen=True, kw_only=True)
class SamConfig:
    """All that is needed to build a Sam; saved inside the project's checkpoints."""

    image_size: int = 1024
    """Side of the square that images are resized and padded to, in pixels; divisible by 16."""
    encoder: TinyViTConfig | ViTConfig = field(default_factory=TinyViTConfig)
    """The image encoder."""
    prompt_embed_dim: int = 256
    """Channels of the image embedding and of the prompt tokens."""
    decoder_mlp_dim: int = 2048
    """Hidden channels of the mask decoder's MLPs."""
    position_scale: float = 1.0
    """Standard deviation of the frequencies of the positional encoding, in periods over half the image's side; SAM
    has 1. Higher ones tell places apart that are nearer to each other."""

    def __post_init__(self) -> None:
        if self.image_size <= 0 or self.image_size % PATCH_SIZE:
            raise ValueError(f"image_size must be a positive multiple of {PATCH_SIZE}, got {self.image_size}")
        if self.prompt_embed_dim <= 0 or self.prompt_embed_dim % 16:
            raise ValueError(f"prompt_embed_dim must be a positive multiple of 16, got {self.prompt_embed_dim}")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form that :meth:`from_dict` reads back."""
        return {**asdict(self), "encoder": {"kind": type(self.encoder).__name__, **asdict(self.encoder)}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SamConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: for an unknown kind of encoder or an unknown field.
        """
        kinds = {kind.__name__: kind for kind in (TinyViTConfig, ViTConfig)}
        encoder = dict(values["encoder"])
        kind = encoder.pop("kind", None)
        if kind not in kinds:
            raise ValueError(f"unknown image encoder {kind!r}; this version knows {', '.join(kinds)}")
        options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in encoder.items()}
        try:
            return cls(**{**values, "encoder": kinds[kind](**options)})
        except TypeError as error:
            raise ValueError(f"model config does not fit this version: {error}") from error


def build_sam(config: SamConfig) -> Sam:
    """A Sam with freshly initialised weights, in eval mode; ``config`` stays readable as ``sam.config``."""
    dim, grid = config.prompt_embed_dim, config.image_size // PATCH_SIZE
    sam = Sam(
        image_encoder=_build_encoder(config),
        prompt_encoder=PromptEncoder(
            embed_dim=dim,
            image_embedding_size=(grid, grid),
            input_image_size=(config.image_size, config.image_size),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=dim, mlp_dim=config.decoder_mlp_dim, num_heads=8),
            transformer_dim=dim,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        ),
        pixel_mean=list(PIXEL_MEAN),
        pixel_std=list(PIXEL_STD),
    )
    sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix *= config.position_scale
    sam.config = config
    return sam.eval()


def _build_encoder(config: SamConfig) -> torch.nn.Module:
    encoder = config.encoder
    if isinstance(encoder, TinyViTConfig):
        return TinyViTEncoder(encoder, img_size=config.image_size, out_chans=config.prompt_embed_dim)
    vit = ImageEncoderViT(
        depth=encoder.depth,
        embed_dim=encoder.embed_dim,
        img_size=config.image_size,
        mlp_ratio=4,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        num_heads=encoder.num_heads,
        patch_size=PATCH_SIZE,
        qkv_bias=True,
        use_rel_pos=True,
        global_attn_indexes=encoder.global_attn_indexes,
        window_size=14,
        out_chans=config.prompt_embed_dim,
    )
    return fuse_attention(vit)


# Windows that divide the embeddings of whole images and of the crops that these models have seen need no padding.
_DEMO_WINDOWS = (8, 8, 16, 8)
_DEMO_POSITION_SCALE = 4.5  # their objects are one to four embedding pixels wide

CONFIGS: dict[str, SamConfig] = {
    "vit_t": SamConfig(),
    "vit_b": SamConfig(encoder=ViTConfig()),
    "vit_l": SamConfig(encoder=ViTConfig(embed_dim=1024, depth=24, num_heads=16, global_attn_indexes=(5, 11, 17, 23))),
    "vit_h": SamConfig(encoder=ViTConfig(embed_dim=1280, depth=32, num_heads=16, global_attn_indexes=(7, 15, 23, 31))),
    "demo_teacher": SamConfig(
        image_size=768,
        encoder=TinyViTConfig(
            embed_dims=(32, 64, 128, 192), depths=(1, 2, 6, 2), num_heads=(1, 2, 4, 6), window_sizes=_DEMO_WINDOWS
        ),
        prompt_embed_dim=128,
        decoder_mlp_dim=512,
        position_scale=_DEMO_POSITION_SCALE,
    ),
    "demo_student": SamConfig(
        image_size=768,
        encoder=TinyViTConfig(
            embed_dims=(24, 48, 96, 128), depths=(1, 1, 4, 2), num_heads=(1, 2, 3, 4), window_sizes=_DEMO_WINDOWS
        ),
        prompt_embed_dim=128,
        decoder_mlp_dim=512,
        position_scale=_DEMO_POSITION_SCALE,
    ),
}


def _build(name: str, checkpoint: str | None = None, image_size: int | None = None) -> Sam:
    """Builds the model ``name``.

    Args:
        checkpoint: path or URL of its weights; None leaves them random, as segment-anything's builders do.
        image_size: another side than the model's own, in pixels, divisible by 16.

    Raises:
        CheckpointError: if the file is missing or holds another model's weights.
        ValueError: for an image size that is not divisible by 16.
    """
    from tinysam.modeling.checkpoint import load_weights

    config = CONFIGS[name]
    sam = build_sam(config if image_size is None else replace(config, image_size=image_size))
    if checkpoint is not None:
        load_weights(sam, checkpoint)
    return sam


sam_model_registry: dict[str, Callable[..., Sam]] = {name: partial(_build, name) for name in CONFIGS}
sam_model_registry["default"] = sam_model_registry["vit_t"]
