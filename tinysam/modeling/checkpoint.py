"""Reading and writing weights: the project's safetensors files, and the public .pth files by their key layout.

Nothing is unpickled: .pth and .pt files are read with ``weights_only=True``.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from segment_anything.modeling import ImageEncoderViT, Sam

from tinysam.lake.filesystem import is_local, open_filesystem, read_bytes, write_once
from tinysam.modeling.errors import CheckpointError
from tinysam.modeling.registry import CONFIGS, SamConfig, ViTConfig, build_sam
from tinysam.weights import SHIPPED, WeightsError, resolve

CONFIG_KEY = "tinysam_config"

# The public TinyViT code's module names, and timm's (SCIENCE.md's key layout of mobile_sam.pt and tinysam_42.3.pth).
_PUBLIC_TO_TIMM = (
    *((f"layers.{i}.downsample.", f"stages.{i + 1}.downsample.") for i in range(3)),
    ("layers.", "stages."),
    ("patch_embed.seq.0.", "patch_embed.conv1."),
    ("patch_embed.seq.2.", "patch_embed.conv2."),
)
_UNUSED_PUBLIC_KEYS = ("norm_head.", "head.")


def load(path_or_name: str) -> Sam:
    """A Sam in eval mode from a checkpoint, a quantized folder, or the name of a model.

    Args:
        path_or_name: ``demo_teacher`` or ``demo_student``; the name of a public checkpoint that ``tinysam weights``
            fetched, such as ``mobile_sam``; the path or URL of a safetensors file written by :func:`save_checkpoint`;
            a public SAM, MobileSAM or TinySAM ``.pth``/``.pt`` file; or a folder written by ``pipelines/quantize.py``.

    Raises:
        CheckpointError: if there is no such file or it is none of these.
    """
    if is_untrained(path_or_name):
        raise CheckpointError(
            f"{path_or_name!r} names an architecture without weights. Give the path of a checkpoint, "
            f"or build it with random weights: sam_model_registry[{path_or_name!r}]()"
        )
    try:
        url = resolve(path_or_name)
    except WeightsError as error:
        raise CheckpointError(str(error)) from error
    fs, path = open_filesystem(url)
    if fs.isdir(path):
        from tinysam.quant import load_quantized

        return load_quantized(url)
    state, config = _read(url)
    if config is None:
        config = _recognise(state, url)
    sam = build_sam(config)
    _load_state(sam, state, url)
    return sam


def is_untrained(name: str) -> bool:
    """Whether a name stands for an architecture alone: a model of ``CONFIGS`` whose weights do not come with us."""
    return name in CONFIGS and name not in SHIPPED


def load_weights(sam: Sam, url: str) -> None:
    """Fills ``sam`` with the weights of a safetensors, ``.pth`` or ``.pt`` file.

    A ViT's positional embeddings are resampled if the file was made for another image size.

    Raises:
        CheckpointError: if the file is missing, unreadable, or holds weights that do not fit; the message lists the
            keys and shapes that are off.
    """
    state, _ = _read(url)
    _load_state(sam, state, url)


def save_checkpoint(
    sam: Sam, url: str, metadata: Mapping[str, str] | None = None, *, dtype: torch.dtype = torch.float32
) -> None:
    """Writes ``sam`` and its config as one safetensors file.

    Args:
        url: where to, a path or any fsspec URL; written once, never half.
        metadata: further strings to keep in the file, for instance the run's fingerprint.
        dtype: of the floating-point weights in the file; loading always gives float32.
    """
    write_once(url, checkpoint_bytes(sam, metadata, dtype=dtype))


def checkpoint_bytes(
    sam: Sam, metadata: Mapping[str, str] | None = None, *, dtype: torch.dtype = torch.float32
) -> bytes:
    """The bytes that :func:`save_checkpoint` writes."""
    state = {
        key: value.detach().cpu().to(dtype if value.is_floating_point() else value.dtype).contiguous()
        for key, value in sam.state_dict().items()
    }
    return safetensors.torch.save(state, {**(metadata or {}), CONFIG_KEY: json.dumps(sam.config.to_dict())})


def read_metadata(url: str) -> dict[str, str]:
    """The metadata of a safetensors checkpoint, without its weights' values being interpreted."""
    return _safetensors_metadata(read_bytes(url), url)


def _read(url: str) -> tuple[dict[str, torch.Tensor], SamConfig | None]:
    fs, path = open_filesystem(url)
    if not fs.exists(path):
        remedy = "`tinysam weights` lists the public checkpoints and downloads them." if is_local(url) else ""
        raise CheckpointError(f"{url}: no such checkpoint. {remedy}".rstrip())
    data = read_bytes(url)
    if url.endswith((".pth", ".pt")):
        return _read_torch(data, url), None
    try:
        state = safetensors.torch.load(data)
    except SafetensorError as error:
        raise CheckpointError(
            f"{url}: neither a safetensors file nor named .pth or .pt ({error}). Is the download complete?"
        ) from error
    metadata = _safetensors_metadata(data, url)
    if CONFIG_KEY not in metadata:
        raise CheckpointError(f"{url}: a safetensors file without {CONFIG_KEY!r} in its metadata; not one of ours")
    try:
        config = SamConfig.from_dict(json.loads(metadata[CONFIG_KEY]))
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{url}: {error}") from error
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}, config


def _read_torch(data: bytes, url: str) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen unrelated types for a broken or hostile file
        raise CheckpointError(
            f"{url}: not a plain state dict that can be read without unpickling code "
            f"({type(error).__name__}). Is the download complete?"
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("model"), Mapping):
        state = state["model"]
    if not isinstance(state, Mapping) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise CheckpointError(f"{url}: holds no flat state dict of tensors")
    return {_to_own_key(k): v for k, v in state.items() if not _is_unused(k)}


def _safetensors_metadata(data: bytes, url: str) -> dict[str, str]:
    # The format: eight bytes of header length, then a JSON header whose "__metadata__" maps strings to strings.
    length = int.from_bytes(data[:8], "little")
    try:
        return dict(json.loads(data[8 : 8 + length]).get("__metadata__") or {})
    except ValueError as error:
        raise CheckpointError(f"{url}: not a safetensors file") from error


def _is_unused(key: str) -> bool:
    encoder_key = key.removeprefix("image_encoder.")
    return encoder_key != key and encoder_key.startswith(_UNUSED_PUBLIC_KEYS)


def _to_own_key(key: str) -> str:
    encoder_key = key.removeprefix("image_encoder.")
    if encoder_key == key or not encoder_key.startswith(("layers.", "patch_embed.seq.")):
        return key
    for public, timm_name in _PUBLIC_TO_TIMM:
        if encoder_key.startswith(public):
            encoder_key = timm_name + encoder_key.removeprefix(public)
            break
    return f"image_encoder.backbone.{encoder_key.replace('.c.', '.conv.')}"


def _recognise(state: Mapping[str, torch.Tensor], url: str) -> SamConfig:
    """Which of the public architectures a state dict belongs to."""
    if "image_encoder.backbone.patch_embed.conv1.conv.weight" in state:
        return CONFIGS["vit_t"]
    pos_embed = state.get("image_encoder.pos_embed")
    if pos_embed is not None:
        for config in CONFIGS.values():
            if isinstance(config.encoder, ViTConfig) and config.encoder.embed_dim == pos_embed.shape[-1]:
                return config
    some = ", ".join(list(state)[:3]) or "none"
    raise CheckpointError(
        f"{url}: neither SAM's, MobileSAM's nor TinySAM's key layout (its keys begin with: {some}). "
        "Expected image_encoder.*, prompt_encoder.* and mask_decoder.*"
    )


def _load_state(sam: Sam, state: Mapping[str, torch.Tensor], url: str) -> None:
    state = _resample_positions(sam, state)
    own = sam.state_dict()
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in own]
    problems += [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        shown = "\n  ".join(problems[:8])
        more = f"\n  … and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"{url}: the weights do not fit this model:\n  {shown}{more}")
    sam.load_state_dict(state)


def _resample_positions(sam: Sam, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fits a ViT's absolute and relative positional embeddings to the model's image size. Our choice: bicubic."""
    resampled = dict(state)
    encoder = sam.image_encoder
    if not isinstance(encoder, ImageEncoderViT) or encoder.pos_embed is None:
        return resampled
    own = sam.state_dict()
    for key, value in state.items():
        if key not in own or value.shape == own[key].shape:
            continue
        if key == "image_encoder.pos_embed" and value.ndim == 4 and value.shape[-1] == own[key].shape[-1]:
            size = own[key].shape[1:3]
            grid = F.interpolate(value.permute(0, 3, 1, 2), size=size, mode="bicubic", align_corners=False)
            resampled[key] = grid.permute(0, 2, 3, 1)
        elif ".rel_pos_" in key and value.ndim == 2 and value.shape[1] == own[key].shape[1]:
            line = F.interpolate(value.T[None], size=own[key].shape[0], mode="linear", align_corners=False)
            resampled[key] = line[0].T
    return resampled


def with_image_size(sam: Sam, image_size: int) -> Sam:
    """A copy of ``sam`` that works at another image size, with the same weights.

    Raises:
        ValueError: for a size that is not divisible by 16.
    """
    other = build_sam(replace(sam.config, image_size=image_size))
    other.load_state_dict(_resample_positions(other, sam.state_dict()))
    return other
