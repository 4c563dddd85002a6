"""Tasks for Label Studio, with the masks as predictions of its brush tool.

The labelling configuration has to have ``<Image name="image" value="$image"/>`` and
``<BrushLabels name="tag" toName="image"><Label value="object"/></BrushLabels>``. Label Studio reads ``s3://`` and
``gs://`` addresses once the bucket is one of the project's storages.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, BinaryIO

import numpy as np

from tinysam.export.labels import LabelledImage
from tinysam.lake.filesystem import write_stream_once
from tinysam.lake.rle import decode_rle

_WORD_BITS = 8
_LENGTH_BITS = (3, 4, 8, 16)  # as Label Studio's own encoder chooses them
_CHANNELS = 4  # a mask is an RGBA picture whose four channels are all 0 or all 255


def write_label_studio(images: Iterable[LabelledImage], url: str) -> None:
    """Writes a JSON list of tasks, one an image, for the project's import.

    Raises:
        LakeError: If the storage refuses.
    """

    def fill(file: BinaryIO) -> None:
        file.write(b"[")
        for image in images:
            file.write(b"\n" if image.number == 1 else b",\n")
            file.write(json.dumps(_task(image), ensure_ascii=False, allow_nan=False).encode())
        file.write(b"]\n")

    write_stream_once(url, fill)


def _task(image: LabelledImage) -> dict[str, Any]:
    results = [
        {
            "id": f"{image.number}-{number}",
            "type": "brushlabels",
            "from_name": "tag",
            "to_name": "image",
            "original_width": image.width,
            "original_height": image.height,
            "image_rotation": 0,
            "score": mask["predicted_iou"],
            "value": {"format": "rle", "rle": brush_rle(decode_rle(mask)), "brushlabels": ["object"]},
        }
        for number, mask in enumerate(image.masks)
    ]
    prediction = {"model_version": "tinysam", "result": results}
    return {"data": {"image": image.uri, "image_id": image.image_id}, "predictions": [prediction]}


def brush_rle(mask: np.ndarray) -> list[int]:
    """Encodes a mask as Label Studio's brush tool does (https://github.com/thi-ng/umbrella, ``rle-pack``).

    Bits, most significant first: 32 with the number of values, 5 with their width less one, four times 4 with the
    widths of the run lengths less one; then a run each: a 1, 2 bits choosing the width, the length less one, the value.

    Args:
        mask: (H, W) bool.

    Returns:
        Bytes as numbers.
    """
    pixels = mask.ravel()
    starts = np.concatenate([[0], np.flatnonzero(np.diff(pixels)) + 1])
    lengths = np.diff(np.append(starts, pixels.size)) * _CHANNELS
    bits = [_bits(pixels.size * _CHANNELS, 32), _bits(_WORD_BITS - 1, 5), *(_bits(n - 1, 4) for n in _LENGTH_BITS)]
    longest = 1 << _LENGTH_BITS[-1]
    for length, value in zip(lengths.tolist(), pixels[starts].tolist(), strict=True):
        word = _bits(255 if value else 0, _WORD_BITS)
        for run in [longest] * (length // longest) + [length % longest]:
            if run:
                choice = next(i for i, n in enumerate(_LENGTH_BITS) if run <= 1 << n)
                bits += ["1", _bits(choice, 2), _bits(run - 1, _LENGTH_BITS[choice]), word]
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return list(int(text, 2).to_bytes(len(text) // 8, "big"))


def _bits(value: int, width: int) -> str:
    return format(value, f"0{width}b")
