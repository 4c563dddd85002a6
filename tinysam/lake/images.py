"""From the bytes of any image file to RGB pixels, or to a status that says why not."""

from __future__ import annotations

import io
import re
import struct

import numpy as np
from PIL import Image

# No plugin that runs another program (EPS), that has no signature to tell it by (TGA), or that no camera writes.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000", "PPM", "AVIF")
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"mif1", b"msf1")
_HEADER_ERRORS = (SyntaxError, IndexError, TypeError, KeyError, ValueError, OSError, EOFError, struct.error)
_DATA_ERRORS = (*_HEADER_ERRORS, ZeroDivisionError, AttributeError)

_UNSUPPORTED = re.compile(
    "unsupported|unknown|cannot handle|not (supported|available)|samples per pixel", re.IGNORECASE
)

_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(Exception):
    """An image that cannot be used, through no fault of the storage. The row gets ``status``, the text its ``error``.

    ``status`` is one of

    * ``empty``: no bytes;
    * ``not_an_image``: the first bytes are those of no image format;
    * ``unsupported``: an image format or pixel type that is not read;
    * ``truncated``: starts as an image, but is cut short or damaged;
    * ``too_large``: the header announces more than ``max_pixels`` (a decompression bomb, or a scan to cut up first);
    * ``missing``: gone since the lake was indexed;
    * ``unreadable``: there, but the file cannot be read;
    * ``bad_annotations``: the image is good, its ground truth is not.
    """

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        return type(self), (self.status, str(self))


def decode_image(data: bytes, *, max_pixels: int = 200_000_000) -> np.ndarray:
    """Decodes an image file to what a viewer would show.

    JPEG, PNG, WebP, TIFF, BMP, GIF, JPEG 2000, PPM and AVIF. EXIF orientation is applied; the first frame of an
    animation is taken; transparent pixels show white; grayscale, palette and CMYK become RGB; 16-bit values are scaled
    by their type's range (65535 becomes 255), so that a pixel does not depend on the rest of its image; values
    without a nominal range (32-bit integers, floats outside 0 to 1) are scaled from the image's minimum and maximum.
    Colour profiles are ignored, as they are by the data loaders that the public models were trained with.

    Args:
        data: The whole file.
        max_pixels: Largest width times height, checked on the header before anything is decoded.

    Returns:
        (H, W, 3) uint8 RGB, writable, C-contiguous.

    Raises:
        ImageError: With the status that says why.
    """
    if not data:
        raise ImageError("empty", "the file has no bytes")
    image = _open(data)
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError("too_large", f"{width} x {height} pixels are more than max_pixels = {max_pixels}")
    try:
        image.load()
        orientation = _orientation(image)  # after load(), which turns a TIFF by itself and drops its tag
        rgb = _to_rgb(image)
        if orientation in _TRANSPOSE:
            rgb = rgb.transpose(_TRANSPOSE[orientation])
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", str(error)) from error
    except _DATA_ERRORS as error:
        raise _failure(str(image.format), error) from error
    return np.array(rgb)


def encode_jpeg(pixels: np.ndarray, quality: int = 95) -> bytes:
    """Encodes (H, W, 3) uint8 RGB as JPEG with full-resolution colour (4:4:4), as masks are about edges."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def _open(data: bytes) -> Image.Image:
    # Image.open() without its size guard: that one is a process-wide global, so raising it for a large scan would
    # raise it for everybody. decode_image() checks the size itself, before any pixel is decoded.
    Image.init()
    damaged: tuple[str, Exception] | None = None
    for name in _FORMATS:
        if name not in Image.OPEN:
            continue
        factory, accept = Image.OPEN[name]
        accepted = accept is None or accept(data[:16])
        if not accepted or isinstance(accepted, str):  # a string tells that the codec was not built in
            continue
        try:
            return factory(io.BytesIO(data), "")
        except Image.DecompressionBombError as error:
            raise ImageError("too_large", str(error)) from error
        except _HEADER_ERRORS as error:
            damaged = name, error
    if damaged is not None:
        raise _failure(*damaged)
    if data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS:
        raise ImageError("unsupported", "HEIC is not read; convert it to JPEG")
    raise ImageError("not_an_image", f"the first bytes are those of none of {', '.join(_FORMATS)}")


def _failure(name: str, error: Exception) -> ImageError:
    # Pillow has one exception for what is damaged and for what it cannot read; only the text tells them apart.
    if _UNSUPPORTED.search(str(error)):
        return ImageError("unsupported", f"a kind of {name} that is not read: {error}")
    return ImageError("truncated", f"{name} is cut short or damaged: {error}")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except _DATA_ERRORS:
        return 1  # damaged EXIF should not cost the image; viewers show it upright too


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray(_scale_16_bit(np.asarray(image), _nominal_bits(image))).convert("RGB")
    if image.mode in ("I", "F"):
        return Image.fromarray(_scale_unbounded(np.asarray(image))).convert("RGB")
    try:
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, rgba).convert("RGB")
        return image.convert("RGB")
    except ValueError as error:
        raise ImageError("unsupported", f"pixels of type {image.mode} cannot be shown as RGB: {error}") from error


def _nominal_bits(image: Image.Image) -> int:
    bits_per_sample = getattr(image, "tag_v2", {}).get(258, 16)
    bits = bits_per_sample[0] if isinstance(bits_per_sample, tuple) else bits_per_sample
    return bits if 8 < bits <= 16 else 16


def _scale_16_bit(values: np.ndarray, bits: int) -> np.ndarray:
    top = (1 << bits) - 1
    wide = np.clip(values.astype(np.uint32), 0, top)
    return ((wide * 255 + top // 2) // top).astype(np.uint8)


def _scale_unbounded(values: np.ndarray) -> np.ndarray:
    real = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(real.min()), float(real.max())
    if values.dtype.kind == "f" and low >= 0.0 and high <= 1.0:
        low, high = 0.0, 1.0
    if high == low:
        return np.zeros(values.shape, dtype=np.uint8)
    return np.rint((real - low) * (255.0 / (high - low))).astype(np.uint8)
