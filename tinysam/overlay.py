"""Masks drawn over photographs: distinguishable colours, crisp outlines, parts on top of wholes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from tinysam.lake.rle import rle_area, run_lengths

MaskLike = np.ndarray | Mapping[str, Any]
"""A boolean array, a COCO run-length mask, or any record that holds one: SAM's or a row of the lake's mask shards."""

_GOLDEN_RATIO = 0.618033988749895
# Lightness and chroma take turns, so that hues which come close after many masks still differ. Our choice.
_LIGHTNESS = (0.74, 0.67, 0.83)
_CHROMA = (0.18, 0.21, 0.15)
_FIRST_HUE = 0.70
# A band of rows keeps the temporary arrays of blending in cache and their memory independent of the image.
_BAND_ROWS = 128

_POSITIVE, _NEGATIVE = (46, 204, 113), (231, 76, 60)


def mask_colours(count: int) -> np.ndarray:
    """Colours for ``count`` masks: colour ``i`` is the same whatever ``count`` is.

    Hues follow the golden ratio, so that neighbours in the order differ most, in OKLCH (Ottosson, "A perceptual color
    space for image processing", 2020), where equal lightness looks equally light.

    Returns:
        (count, 3) uint8 RGB.
    """
    index = np.arange(count)
    angle = 2 * np.pi * ((_FIRST_HUE + index * _GOLDEN_RATIO) % 1)
    lightness, chroma = np.take(_LIGHTNESS, index % 3), np.take(_CHROMA, index % 3)
    return _oklab_to_srgb(np.stack([lightness, chroma * np.cos(angle), chroma * np.sin(angle)], axis=-1))


def _oklab_to_srgb(lab: np.ndarray) -> np.ndarray:
    """(..., 3) OKLab to uint8 sRGB; what lies outside sRGB is clipped."""
    to_lms = np.array(
        [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.291485548]]
    )
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.707614701],
        ]
    )
    linear = np.clip((lab @ to_lms.T) ** 3 @ to_rgb.T, 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * encoded).astype(np.uint8)


def mask_layer(
    height: int, width: int, masks: Sequence[MaskLike], *, alpha: float = 0.42, outline: int | None = None
) -> np.ndarray:
    """The drawing alone, as a picture to lay over the image.

    Masks are painted from the largest to the smallest, each over what is below it, so that a part stays visible on
    its whole. Masks of another size than the drawing are scaled to it.

    Args:
        height: of the drawing, in pixels.
        width: of the drawing, in pixels.
        masks: mask ``i`` gets colour ``i`` of :func:`mask_colours`.
        alpha: opacity of the fill, in [0, 1].
        outline: thickness of the outline in pixels, inside each mask; 0 for none. The default grows with the image.

    Returns:
        (height, width, 4) uint8 RGBA, not premultiplied; alpha is 0 where there is no mask.

    Raises:
        ValueError: for a mask that is neither an array of two dimensions nor a run-length mask.
    """
    labels = _paint_labels(height, width, masks)
    palette = _palette(len(masks), alpha)
    layer = np.empty((height, width, 4), np.uint8)
    for rows, index in _bands(labels, len(masks), _outline(height, width, outline)):
        layer[rows] = palette[index]
    return layer


def draw_masks(
    pixels: np.ndarray,
    masks: Sequence[MaskLike],
    *,
    alpha: float = 0.42,
    outline: int | None = None,
    points: bool = False,
    boxes: bool = False,
) -> np.ndarray:
    """A copy of an image with masks drawn over it: see :func:`mask_layer` for the order and the colours.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        masks: mask ``i`` gets colour ``i`` of :func:`mask_colours`; scaled to the image where their size differs.
        alpha: opacity of the fill, in [0, 1].
        outline: thickness of the outline in pixels, inside each mask; 0 for none. The default grows with the image.
        points: also draw each record's ``point_coords``.
        boxes: also draw each record's ``bbox`` (XYWH).

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ValueError: for pixels or masks of another kind than described.
    """
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"pixels must be (H, W, 3) uint8, got {pixels.shape} {pixels.dtype}")
    height, width = pixels.shape[:2]
    labels = _paint_labels(height, width, masks)
    palette = _palette(len(masks), alpha).astype(np.uint16)
    # Fixed point: out = (pixel * (255 - a) + colour * a) / 255, with colour * a tabulated by label.
    tint, keep = palette[:, :3] * palette[:, 3:] + 127, 255 - palette[:, 3:]
    drawing = np.empty_like(pixels)
    for rows, index in _bands(labels, len(masks), _outline(height, width, outline)):
        drawing[rows] = (pixels[rows] * keep[index] + tint[index]) // 255
    if points or boxes:
        return _draw_prompts_of_records(drawing, masks, points=points, boxes=boxes)
    return drawing


def draw_prompts(
    pixels: np.ndarray,
    *,
    points: Sequence[Sequence[float]] = (),
    labels: Sequence[int] = (),
    boxes: Sequence[Sequence[float]] = (),
) -> np.ndarray:
    """A copy of an image with the prompts of a segmentation drawn over it.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        points: (x, y) in pixels.
        labels: 1 (green) or 0 (red) for each point.
        boxes: XYXY in pixels.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    image = Image.fromarray(pixels)
    canvas, unit = ImageDraw.Draw(image), _unit(*pixels.shape[:2])
    for box in boxes:
        _outlined_box(canvas, tuple(box), unit, _POSITIVE)
    for point, label in zip(points, labels, strict=True):
        _dot(canvas, point, 3 * unit, _POSITIVE if label else _NEGATIVE)
    return np.asarray(image)


def _paint_labels(height: int, width: int, masks: Sequence[MaskLike]) -> np.ndarray:
    """(height, width) int32: 1 + the index of the topmost mask, 0 where there is none."""
    labels = np.zeros((height, width), np.int32)
    unwrapped = [_unwrap(mask) for mask in masks]
    covered = [_coverage(mask) for mask in unwrapped]
    for index in sorted(range(len(masks)), key=lambda i: (-covered[i], i)):
        left, columns = _columns(unwrapped[index], height, width)
        labels[:, left : left + columns.shape[1]][columns] = index + 1
    return labels


def _unwrap(mask: MaskLike) -> np.ndarray | Mapping[str, Any]:
    """The array or the run lengths that a record holds."""
    if isinstance(mask, Mapping):
        mask = mask.get("segmentation", mask)
    if isinstance(mask, Mapping):
        if "size" not in mask or "counts" not in mask:
            raise ValueError(f"not a mask: expected `segmentation`, or `size` and `counts`, got {sorted(mask)}")
        return mask
    array = np.asarray(mask)
    if array.ndim != 2:
        raise ValueError(f"not a mask: expected an array of two dimensions or run lengths, got shape {array.shape}")
    return array.astype(bool, copy=False)


def _coverage(mask: np.ndarray | Mapping[str, Any]) -> float:
    """Share of its own frame that a mask covers."""
    if isinstance(mask, np.ndarray):
        return np.count_nonzero(mask) / max(mask.size, 1)
    (height, width), counts = mask["size"], mask["counts"]
    if isinstance(counts, list):
        return sum(counts[1::2]) / max(height * width, 1)
    return rle_area(mask) / max(height * width, 1)


def _columns(mask: np.ndarray | Mapping[str, Any], height: int, width: int) -> tuple[int, np.ndarray]:
    """A mask scaled to (height, width): its first column and a (height, columns) boolean array."""
    if isinstance(mask, np.ndarray):
        if mask.shape == (height, width):
            return 0, mask
        return 0, mask[np.ix_(_nearest(height, mask.shape[0]), _nearest(width, mask.shape[1]))]
    own_height, own_width = (int(side) for side in mask["size"])
    counts = mask["counts"]
    ends = np.cumsum(np.asarray(counts, np.int64) if isinstance(counts, list) else run_lengths(counts))
    if len(ends) < 2:
        return 0, np.zeros((height, 0), bool)
    # Runs alternate between background and mask in column-major order; only the columns from the first pixel of the
    # mask to its last are decoded.
    last = ends[-1] if len(ends) % 2 == 0 else ends[-2]
    first_column, end_column = int(ends[0] // own_height), int((last - 1) // own_height + 1)
    runs = np.diff(np.clip(ends, first_column * own_height, end_column * own_height), prepend=first_column * own_height)
    decoded = np.repeat(np.arange(len(ends)) % 2 == 1, runs).reshape(end_column - first_column, own_height).T
    if (own_height, own_width) == (height, width):
        return first_column, decoded
    columns = _nearest(width, own_width)
    left, right = np.searchsorted(columns, [first_column, end_column])
    return int(left), decoded[np.ix_(_nearest(height, own_height), columns[left:right] - first_column)]


def _nearest(size: int, own_size: int) -> np.ndarray:
    """For each of ``size`` pixels, the one of ``own_size`` pixels that lies under its centre."""
    return ((np.arange(size) + 0.5) * own_size / size).astype(np.int64)


def _palette(count: int, alpha: float) -> np.ndarray:
    """(2 * count + 1, 4) uint8 RGBA: nothing, then the fill of each mask, then the outline of each mask."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    palette = np.zeros((2 * count + 1, 4), np.uint8)
    palette[1 : count + 1, :3] = palette[count + 1 :, :3] = mask_colours(count)
    palette[1 : count + 1, 3] = round(255 * alpha)
    palette[count + 1 :, 3] = 240
    return palette


def _bands(labels: np.ndarray, count: int, outline: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Bands of rows, with the index into :func:`_palette` of each pixel."""
    height = len(labels)
    for start in range(0, height, _BAND_ROWS):
        rows = slice(start, min(start + _BAND_ROWS, height))
        above = min(outline, start)
        window = labels[start - above : rows.stop + outline]
        index = window[above : above + rows.stop - start].copy()
        if outline > 0:
            edge = _edges(window, outline)[above : above + len(index)]
            index[edge & (index > 0)] += count
        yield rows, index


def _edges(labels: np.ndarray, thickness: int) -> np.ndarray:
    """Where a pixel of another label is at most ``thickness`` steps away."""
    edge = np.zeros(labels.shape, bool)
    across, down = labels[:, 1:] != labels[:, :-1], labels[1:] != labels[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    for _ in range(thickness - 1):
        grown = edge.copy()
        grown[:, 1:] |= edge[:, :-1]
        grown[:, :-1] |= edge[:, 1:]
        grown[1:] |= edge[:-1]
        grown[:-1] |= edge[1:]
        edge = grown
    return edge


def _draw_prompts_of_records(pixels: np.ndarray, masks: Sequence[MaskLike], *, points: bool, boxes: bool) -> np.ndarray:
    """Draws each record's own box and points in its colour; what a record lacks is left out."""
    height, width = pixels.shape[:2]
    image = Image.fromarray(pixels)
    canvas, unit = ImageDraw.Draw(image), _unit(height, width)
    for mask, colour in zip(masks, mask_colours(len(masks)).tolist(), strict=True):
        if not isinstance(mask, Mapping):
            continue
        own_height, own_width = _own_size(mask)
        scale = (width / own_width, height / own_height)
        if boxes and mask.get("bbox") is not None:
            x, y, w, h = mask["bbox"]
            corners = (x * scale[0], y * scale[1], (x + w) * scale[0], (y + h) * scale[1])
            _outlined_box(canvas, corners, unit, tuple(colour))
        for x, y in (mask.get("point_coords") or ()) if points else ():
            _dot(canvas, (x * scale[0], y * scale[1]), 3 * unit, tuple(colour))
    return np.asarray(image)


def _own_size(record: Mapping[str, Any]) -> tuple[int, int]:
    mask = _unwrap(record)
    own_height, own_width = mask.shape if isinstance(mask, np.ndarray) else mask["size"]
    return max(own_height, 1), max(own_width, 1)


def _dot(canvas: ImageDraw.ImageDraw, point: Sequence[float], radius: int, colour: tuple[int, ...]) -> None:
    canvas.circle((point[0], point[1]), radius + max(1, radius // 3), fill="white")
    canvas.circle((point[0], point[1]), radius, fill=colour)


def _outlined_box(canvas: ImageDraw.ImageDraw, box: tuple[float, ...], thickness: int, colour: tuple[int, ...]) -> None:
    # Pillow refuses a box with its corners the wrong way round, which a user may well type.
    x0, x1 = sorted((box[0], box[2]))
    y0, y1 = sorted((box[1], box[3]))
    canvas.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline="white", width=thickness + 2)
    canvas.rectangle((x0, y0, x1, y1), outline=colour, width=thickness)


def _unit(height: int, width: int) -> int:
    """Thickness of a line that looks thin at any image size, in pixels."""
    return max(1, round(max(height, width) / 600))


def _outline(height: int, width: int, outline: int | None) -> int:
    return _unit(height, width) if outline is None else outline
