"""The folder that holds a quantized Sam: an integer graph for the encoder, float weights for the rest.

The rest is computed in float32 or bfloat16, and its matrices are stored in float16: half the bytes, and an eighth of
the rounding error that bfloat16 would make (11 significant bits instead of 8). Biases, LayerNorms and the positional
encoding's frequencies, whose error large coordinates would multiply, take few bytes and stay float32.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from segment_anything.modeling import Sam
from torch import nn

from tinysam.lake.filesystem import MissingError, join, read_bytes, write_once
from tinysam.modeling.errors import CheckpointError
from tinysam.modeling.registry import SamConfig, build_sam
from tinysam.quant.quantize import QuantizationConfig, QuantizedEncoder
from tinysam.runtime import EngineConfig, EngineError, EngineImageEncoder

ENCODER_FILE, DECODER_FILE = "encoder.onnx", "decoder.safetensors"
CONFIG_FILE, CALIBRATION_FILE = "config.json", "calibration.json"

FORMAT_VERSION = 1


def with_encoder(sam: Sam, encoder: nn.Module) -> Sam:
    """A Sam with another image encoder; it shares the prompt encoder and the mask decoder with ``sam``."""
    other = Sam(
        image_encoder=encoder,
        prompt_encoder=sam.prompt_encoder,
        mask_decoder=sam.mask_decoder,
        pixel_mean=sam.pixel_mean.flatten().tolist(),
        pixel_std=sam.pixel_std.flatten().tolist(),
    )
    other.mask_threshold = sam.mask_threshold
    other.config = sam.config
    return other.to(sam.device).eval()


def save_quantized(
    folder_url: str,
    sam: Sam,
    encoder: QuantizedEncoder,
    config: QuantizationConfig,
    *,
    calibration_images: Sequence[str] = (),
    source: Mapping[str, str] | None = None,
) -> dict[str, int]:
    """Writes a quantized model that :func:`load_quantized` reads.

    ``config.json`` goes last, with the hashes of the other files: a folder that lacks it is not complete.

    Args:
        folder_url: where to, a path or any fsspec URL.
        sam: the Sam with the float encoder.
        encoder: its encoder, quantized.
        config: how that was done.
        calibration_images: ids of the images that the ranges come from.
        source: what the float model was, such as its path and hash.

    Returns:
        Bytes of each file.

    Raises:
        LakeError: if the storage refuses.
    """
    calibration = {
        "images": list(calibration_images),
        "quantization": asdict(config),
        "layers": [asdict(layer) for layer in encoder.layers],
    }
    files = {
        ENCODER_FILE: encoder.model.SerializeToString(deterministic=True),
        DECODER_FILE: safetensors.torch.save(stored_weights(with_encoder(sam, nn.Identity()))),
        CALIBRATION_FILE: _json(calibration),
    }
    files[CONFIG_FILE] = _json(
        {
            "format_version": FORMAT_VERSION,
            "sam": sam.config.to_dict(),
            "source": dict(source or {}),
            "quantization": asdict(config),
            "layers_int8": encoder.num_int8,
            "layers": len(encoder.layers),
            "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        }
    )
    for name, data in files.items():
        write_once(join(folder_url, name), data)
    return {name: len(data) for name, data in files.items()}


def stored_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state of ``module`` as the folder keeps it: parameters of two dimensions and more in float16.

    A matrix with a value beyond float16's range, 65504, stays as it is.
    """
    matrices = {name for name, parameter in module.named_parameters() if parameter.ndim > 1}
    stored = {}
    for name, value in module.state_dict().items():
        half = value.half() if name in matrices else value
        stored[name] = (half if torch.isfinite(half).all() else value).cpu().contiguous()
    return stored


def load_quantized(folder_url: str, engine: EngineConfig | None = None) -> Sam:
    """A Sam in eval mode whose image encoder runs on integers; for ``SamPredictor``, both generators, everything.

    Args:
        folder_url: a folder of ``pipelines/quantize.py``, as a path or any fsspec URL.
        engine: how to run the encoder; None: the defaults of ``EngineConfig``. ``sam.image_encoder.engine`` tells what
            came of it.

    Raises:
        CheckpointError: if the folder is not a quantized model, is not complete, or no engine can run it.
        LakeError: if the storage cannot be read.
    """
    config = _read_config(folder_url)
    try:
        sam_config = SamConfig.from_dict(config["sam"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{join(folder_url, CONFIG_FILE)}: {error}") from error
    encoder_bytes = _read_checked(folder_url, ENCODER_FILE, config)
    decoder_bytes = _read_checked(folder_url, DECODER_FILE, config)
    try:
        encoder = EngineImageEncoder(encoder_bytes, engine or EngineConfig())
        state = safetensors.torch.load(decoder_bytes)
    except (EngineError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder_url}: {error}") from error
    grid = sam_config.image_size // 16
    expected = (1, sam_config.prompt_embed_dim, grid, grid)
    if encoder.img_size != sam_config.image_size or encoder.engine.output_shapes != [expected]:
        raise CheckpointError(
            f"{folder_url}: {ENCODER_FILE} maps {encoder.img_size} pixels to {encoder.engine.output_shapes}, but the "
            f"decoder expects {sam_config.image_size} and {expected}; quantize the model again"
        )
    sam = with_encoder(build_sam(sam_config), encoder)
    try:
        sam.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{join(folder_url, DECODER_FILE)}: the weights do not fit: {error}") from error
    return sam


def _read_config(folder_url: str) -> dict[str, Any]:
    url = join(folder_url, CONFIG_FILE)
    try:
        config = json.loads(read_bytes(url))
    except MissingError as error:
        raise CheckpointError(
            f"{folder_url} holds no {CONFIG_FILE}, so it is no quantized model, or quantizing was interrupted; "
            "make one with pipelines/quantize.py"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{url} is not valid JSON ({error}); quantize the model again") from error
    version = config.get("format_version") if isinstance(config, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{url} has format_version {version}, this version of tinysam reads {FORMAT_VERSION}; "
            "quantize the model again with this version"
        )
    return config


def _read_checked(folder_url: str, name: str, config: Mapping[str, Any]) -> bytes:
    url = join(folder_url, name)
    try:
        data = read_bytes(url)
    except MissingError as error:
        raise CheckpointError(f"{url} is missing; copy the whole folder, or quantize the model again") from error
    if hashlib.sha256(data).hexdigest() != config.get("sha256", {}).get(name):
        raise CheckpointError(
            f"{url} is not the file that {CONFIG_FILE} was written for: the copy is damaged or mixes two models; "
            "copy the whole folder again, or quantize the model again"
        )
    return data


def _json(values: Any) -> bytes:
    return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode()
