"""From rows of embedding shards to training samples: crops of image, embedding and masks that fit each other."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_mask
from scipy.ndimage import distance_transform_edt
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from tinysam.distill.dense import CHANNELS, MIRRORED, OVERTURNED, TRANSPOSED, dense_target
from tinysam.distill.frame import EMBEDDING_STRIDE, TARGET_STRIDE
from tinysam.lake.codecs import Codec, decode_embedding

MIN_BOX_SIDE = 2.0  # input pixels: what a crop leaves of an object that is thinner than a pixel of targets is noise


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How a row becomes a sample."""

    crop_size: int | None = None
    """Side of the training crops in input pixels, divisible by 16; None trains on whole images. Crops cost less and
    start on the embedding's grid, so that a cached embedding can be cropped with them (our choice). End with whole
    images: what has seen crops alone finds more than the prompted object in them, far away from it."""
    min_zoom: float = 1.0
    """Smallest magnification of a crop; needs a cache without embeddings."""
    max_zoom: float = 1.0
    """Largest magnification of a crop; needs a cache without embeddings."""
    flip: bool = False
    """Mirror and transpose at random; needs a cache without embeddings."""
    grow: float = 0.0
    """Objects and their boxes grow or shrink by up to this share of half their box's shorter side. Annotators draw rims
    nearer and farther than an edge in the image; this teaches to believe a box, which tells how far (our choice)."""
    color_jitter: float = 0.0
    """Strength of random changes of brightness, contrast, saturation and hue; needs a cache without embeddings."""

    def __post_init__(self) -> None:
        if self.crop_size is not None and (self.crop_size <= 0 or self.crop_size % EMBEDDING_STRIDE):
            raise ValueError(f"crop_size must be a positive multiple of {EMBEDDING_STRIDE}, got {self.crop_size}")
        if not 0 < self.min_zoom <= self.max_zoom:
            raise ValueError(f"zoom needs 0 < min_zoom <= max_zoom, got {self.min_zoom} and {self.max_zoom}")
        if not 0 <= self.grow < 1:
            raise ValueError(f"grow must lie in [0, 1), got {self.grow}")

    @property
    def alters_pixels(self) -> bool:
        """Whether samples differ from what a teacher saw when its embeddings were cached."""
        return self.flip or self.color_jitter > 0 or (self.min_zoom, self.max_zoom) != (1.0, 1.0)


@dataclass(frozen=True)
class Sample:
    """One image, or ``B`` of them once stacked (a leading dimension on every tensor). ``S`` is the crop's side."""

    image: torch.Tensor
    """``(3, S, S)`` uint8."""
    content_size: torch.Tensor
    """``(2,)`` int64: height and width of what is image rather than padding."""
    origin: torch.Tensor
    """``(2,)`` int64: the crop's (x, y) in the model's frame, in embedding pixels."""
    embedding: torch.Tensor
    """``(C, S/16, S/16)`` float32; ``C`` is 0 without a teacher."""
    targets: torch.Tensor
    """``(P, S/2, S/2)`` float16 coverages: most of what travels from the loader's processes to a GPU."""
    dense: torch.Tensor
    """``(5, S/2, S/2)`` float32 from :func:`tinysam.distill.dense.dense_target`; of no channels if not asked for."""
    boxes: torch.Tensor
    """``(P, 4)`` float32 x0, y0, x1, y1 in the crop."""
    weight: torch.Tensor
    """``(P,)`` float32: 1 for a mask, 0 for a place that no mask fills."""
    labelled: torch.Tensor
    """``()`` bool: whether the lake has ground truth for the image, be it that there is nothing on it."""
    key: tuple[str, ...]
    """One entry an image: its shard's URL and its id, ``SHARD#ID``."""

    @classmethod
    def stack(cls, samples: Sequence[Sample]) -> Sample:
        """A batch."""
        tensors = {name: torch.stack([getattr(sample, name) for sample in samples]) for name in _TENSORS}
        return cls(**tensors, key=tuple(key for sample in samples for key in sample.key))

    def to(self, device: str) -> Sample:
        """The same on another device; from pinned memory the copy does not block."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Sample:
        """The same in pinned memory; torch's DataLoader calls this."""
        return self._map(torch.Tensor.pin_memory)

    def image_at(self, index: int) -> Sample:
        """A batch of one of a batch's images."""
        return replace(self._map(lambda tensor: tensor[index : index + 1]), key=self.key[index : index + 1])

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Sample:
        tensors: dict[str, Any] = {name: function(getattr(self, name)) for name in _TENSORS}
        return replace(self, **tensors)


_TENSORS = tuple(f.name for f in fields(Sample) if f.name != "key")


@dataclass(frozen=True)
class _Window:
    """A square region of the model's frame and how much it is magnified."""

    x: int
    y: int
    side: int


def make_sample(
    row: Mapping[str, Any],
    *,
    config: SampleConfig,
    prompts: int,
    image_size: int,
    embedding_shape: tuple[int, int, int] | None,
    codec: Codec,
    rng: np.random.Generator,
    dense: bool = False,
    key: str = "",
) -> Sample | None:
    """A training sample, or None if the row shows no mask and has no embedding to learn from.

    Args:
        row: of ``schema.EMBEDDING``, with status ok.
        prompts: P; masks are drawn with replacement where the crop has fewer.
        image_size: side of the model's frame.
        embedding_shape: (C, H, W) of the row's embedding; None leaves it unread.
        dense: whether to make the auxiliary task's target.
        key: names the image in messages.
    """
    masks = row["masks"] or []
    if not masks and embedding_shape is None:
        return None
    crop = min(config.crop_size or image_size, image_size)
    window = _choose_window(masks, (row["input_height"], row["input_width"]), crop, image_size, config, rng)
    scale = crop / window.side

    with Image.open(io.BytesIO(row["image"])) as file:
        # PIL pads with black where the window leaves the image.
        region = file.convert("RGB").crop((window.x, window.y, window.x + window.side, window.y + window.side))
    if window.side != crop:
        region = region.resize((crop, crop), Image.Resampling.BILINEAR)
    image = torch.from_numpy(np.array(region)).permute(2, 0, 1)
    content = np.clip([row["input_height"] - window.y, row["input_width"] - window.x], 0, window.side)
    content_size = torch.tensor([round(v * scale) for v in content.tolist()])

    all_boxes = _boxes(masks, window, scale)
    chosen, boxes = _choose_masks(masks, all_boxes.clip(0, crop), prompts, rng)
    targets = _targets(chosen, window, crop)
    if config.grow > 0:
        rows, columns = _shown(content_size)
        for target, box in zip(targets[:, :rows, :columns], boxes, strict=True):
            _grow(target, box, config.grow, rng)
    weight = (targets.sum((1, 2)) >= 1).float()
    if len(chosen) < prompts:  # a crop that shows no mask at all
        if embedding_shape is None:
            return None
        targets, boxes, weight = (
            targets.new_zeros(prompts, *targets.shape[1:]),
            torch.zeros(prompts, 4),
            torch.zeros(prompts),
        )

    if embedding_shape is None:
        embedding = torch.zeros(0, crop // EMBEDDING_STRIDE, crop // EMBEDDING_STRIDE)
    else:
        full = torch.from_numpy(decode_embedding(row["embedding"], embedding_shape, codec))
        ys, xs, n = window.y // EMBEDDING_STRIDE, window.x // EMBEDDING_STRIDE, crop // EMBEDDING_STRIDE
        embedding = full[:, ys : ys + n, xs : xs + n]

    if config.color_jitter > 0:
        image = _jitter_colors(image, config.color_jitter, rng)
    side = crop // TARGET_STRIDE
    per_pixel = _dense(masks, all_boxes, window, side) if dense else torch.zeros(0, side, side)
    if config.flip:
        image, targets, boxes, per_pixel, content_size = _flip(image, targets, boxes, per_pixel, content_size, rng)
    origin = torch.tensor([window.x // EMBEDDING_STRIDE, window.y // EMBEDDING_STRIDE])
    if config.alters_pixels:
        # The window's place in the frame means nothing once it is magnified; any place that holds the crop will do.
        origin = torch.from_numpy(rng.integers(0, (image_size - crop) // EMBEDDING_STRIDE + 1, 2))
    return Sample(
        image=image,
        content_size=content_size,
        origin=origin,
        embedding=embedding,
        targets=targets.half(),
        dense=per_pixel,
        boxes=boxes,
        weight=weight,
        labelled=torch.tensor(row["masks"] is not None),
        key=(key,),
    )


def _choose_window(
    masks: Sequence[Mapping[str, Any]],
    content: tuple[int, int],
    crop: int,
    image_size: int,
    config: SampleConfig,
    rng: np.random.Generator,
) -> _Window:
    zoom = float(np.exp(rng.uniform(np.log(config.min_zoom), np.log(config.max_zoom))))
    # Sides and origins on the embedding's grid keep image, masks and embedding aligned.
    side = min(EMBEDDING_STRIDE * max(1, round(crop / zoom / EMBEDDING_STRIDE)), image_size)
    place = []
    anchor = masks[int(rng.integers(len(masks)))]["bbox"] if masks else None
    for axis, length in ((0, content[1]), (1, content[0])):
        last = max(0, -(-length // EMBEDDING_STRIDE) * EMBEDDING_STRIDE - side)
        if anchor is None:
            start = rng.uniform(0, last)
        else:
            centre = anchor[axis] + anchor[axis + 2] / 2
            start = centre - rng.uniform(0.1, 0.9) * side
        place.append(int(np.clip(round(start / EMBEDDING_STRIDE) * EMBEDDING_STRIDE, 0, last)))
    return _Window(place[0], place[1], side)


def _boxes(masks: Sequence[Mapping[str, Any]], window: _Window, scale: float) -> np.ndarray:
    """``(N, 4)`` float32 x0, y0, x1, y1 in pixels of the crop, which they may leave."""
    xywh = np.array([mask["bbox"] for mask in masks], np.float32).reshape(-1, 4)
    boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
    return ((boxes - [window.x, window.y] * 2) * scale).astype(np.float32)


def _choose_masks(
    masks: Sequence[Mapping[str, Any]], boxes: np.ndarray, prompts: int, rng: np.random.Generator
) -> tuple[list[Mapping[str, Any]], torch.Tensor]:
    """P masks that the crop shows, and their boxes within it."""
    shown = np.flatnonzero((boxes[:, 2:] - boxes[:, :2]).min(1) >= MIN_BOX_SIDE)
    if not len(shown):
        return [], torch.zeros(0, 4)
    index = rng.choice(shown, prompts, replace=len(shown) < prompts)
    return [masks[i] for i in index], torch.from_numpy(boxes[index])


def _targets(masks: Sequence[Mapping[str, Any]], window: _Window, crop: int) -> torch.Tensor:
    """``(len(masks), crop / 2, crop / 2)`` coverages of the masks in the window."""
    size = crop // TARGET_STRIDE
    if not masks:
        return torch.zeros(0, size, size)
    pixels = torch.from_numpy(_decode(masks, window)).permute(2, 0, 1)[None].float()
    if pixels.shape[-1] == size:
        return pixels[0]
    # Magnified, antialiasing changes nothing, but takes three times as long.
    return F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=pixels.shape[-1] > size)[0]


def _shown(content_size: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of the targets that show any of the image."""
    height, width = content_size.tolist()
    return -(-height // TARGET_STRIDE), -(-width // TARGET_STRIDE)


def _grow(target: torch.Tensor, box: torch.Tensor, share: float, rng: np.random.Generator) -> None:
    """Moves the rim of a mask, ``(h, w)`` coverages, in place, and its box ``(4,)`` with it."""
    amount = float(rng.uniform(-share, share) * (box[2:] - box[:2]).min()) / 2 / TARGET_STRIDE
    margin = int(max(amount, 0)) + 2
    x0, y0 = (max(int(v / TARGET_STRIDE) - margin, 0) for v in box[:2].tolist())
    x1, y1 = (int(v / TARGET_STRIDE) + margin + 1 for v in box[2:].tolist())
    near = target[y0:y1, x0:x1]
    inside = near.numpy() > 0.5
    if not inside.any():
        return
    # From a pixel's centre to the rim, half a pixel before the nearest centre beyond it.
    depth = np.where(inside, distance_transform_edt(inside) - 0.5, 0.5 - distance_transform_edt(~inside))
    moved = torch.from_numpy(np.clip(depth + amount + 0.5, 0, 1).astype(np.float32))
    if not (moved > 0.5).any():
        return
    near.copy_(moved)
    # Each side moves with the rim, and ends in the outermost pixel that is covered at all: half a pixel beyond it where
    # less than half of one was covered to begin with.
    left, top, right, bottom = masks_to_boxes(moved[None] > 0)[0].tolist()
    outermost = torch.tensor([x0 + left, y0 + top, x0 + right + 1, y0 + bottom + 1])
    outwards = torch.tensor([-1.0, -1.0, 1.0, 1.0])
    sides = (box / TARGET_STRIDE + amount * outwards - outermost) * outwards
    box.copy_((outermost + sides.clamp(-1, 0.5) * outwards) * TARGET_STRIDE)


def _dense(masks: Sequence[Mapping[str, Any]], boxes: np.ndarray, window: _Window, size: int) -> torch.Tensor:
    """``(5, size, size)`` target of the auxiliary task, for the masks that the window shows."""
    shown = (boxes[:, 2:] > 0).all(1) & (boxes[:, :2] < size * TARGET_STRIDE).all(1)
    near = np.flatnonzero(shown).tolist()
    if not near:
        return torch.zeros(CHANNELS, size, size)
    pixels = torch.from_numpy(_decode([masks[i] for i in near], window)).permute(2, 0, 1)[None]
    inside = F.interpolate(pixels, size=(size, size), mode="nearest-exact")[0].bool()
    return dense_target(inside.numpy(), boxes[near])


def _decode(masks: Sequence[Mapping[str, Any]], window: _Window) -> np.ndarray:
    """``(side / 2, side / 2, len(masks))`` uint8: the window's part of the masks."""
    ys, xs, n = (v // TARGET_STRIDE for v in (window.y, window.x, window.side))
    # Decoding all at once saves pycocotools' overhead a mask, which is most of its time at this size.
    frames = coco_mask.decode([{"size": mask["size"], "counts": mask["counts"]} for mask in masks])
    return frames[ys : ys + n, xs : xs + n]


def _jitter_colors(image: torch.Tensor, strength: float, rng: np.random.Generator) -> torch.Tensor:
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3)
    image = v2.functional.adjust_brightness(image, brightness)
    image = v2.functional.adjust_contrast(image, contrast)
    image = v2.functional.adjust_saturation(image, saturation)
    if rng.random() < strength:  # stained and fluorescent microscopy are each other's negative
        image = v2.functional.invert(image)
    return image


def _flip(
    image: torch.Tensor,
    targets: torch.Tensor,
    boxes: torch.Tensor,
    dense: torch.Tensor,
    content_size: torch.Tensor,
    rng: np.random.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mirrors what is image rather than padding, which stays below and to the right of it."""
    # In whole pixels of the targets; where the image has half of one, a pixel of padding goes with it.
    rows, columns = _shown(content_size)
    height, width = rows * TARGET_STRIDE, columns * TARGET_STRIDE
    content_size = content_size.clone()
    horizontal, vertical, transpose = rng.random(3) < 0.5
    if horizontal:
        image, targets = _mirrored(image, width, -1), _mirrored(targets, columns, -1)
        dense = _mirrored(dense, columns, -1)[MIRRORED[: len(dense)]]
        boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
        content_size[1] = width
    if vertical:
        image, targets = _mirrored(image, height, -2), _mirrored(targets, rows, -2)
        dense = _mirrored(dense, rows, -2)[OVERTURNED[: len(dense)]]
        boxes = torch.stack([boxes[:, 0], height - boxes[:, 3], boxes[:, 2], height - boxes[:, 1]], 1)
        content_size[0] = height
    if transpose:
        image, targets = image.transpose(-1, -2), targets.transpose(-1, -2)
        dense = dense.transpose(-1, -2)[TRANSPOSED[: len(dense)]]
        boxes = boxes[:, [1, 0, 3, 2]]
        content_size = content_size.flip(0)
    return image.contiguous(), targets.contiguous(), boxes, dense.contiguous(), content_size


def _mirrored(pixels: torch.Tensor, length: int, axis: int) -> torch.Tensor:
    """Turns round the first ``length`` places of an axis; what follows stays."""
    kept = pixels.shape[axis] - length
    if kept == 0:
        return pixels.flip(axis)
    first, rest = pixels.split([length, kept], axis)
    return torch.cat([first.flip(axis), rest], axis)


def content_mask(content_size: torch.Tensor, size: int, stride: int) -> torch.Tensor:
    """Which cells of ``stride`` pixels show any of the image: ``(B, 2)`` heights and widths to ``(B, size, size)``."""
    starts = torch.arange(size, device=content_size.device) * stride
    rows, columns = (starts < content_size[:, :1]), (starts < content_size[:, 1:])
    return rows[:, :, None] & columns[:, None, :]
