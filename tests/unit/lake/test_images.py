"""Every file here is really encoded, by Pillow or by hand where Pillow cannot write it."""

from __future__ import annotations

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from tinysam.lake.images import ImageError, decode_image, encode_jpeg


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunks(width: int, height: int, bit_depth: int, colour_type: int, rows: bytes) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(width: int, height: int, *, bits: int, samples: int, data: bytes, order: str = "<") -> bytes:
    """An uncompressed grayscale TIFF of one strip; Pillow can read more kinds than it can write."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: samples, 278: height, 279: len(data)}
    assert len(data) % 2 == 0
    directory = struct.pack(f"{order}H", len(tags))
    for tag, value in tags.items():
        directory += struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0)
    start = {"<": b"II\x2a\x00", ">": b"MM\x00\x2a"}[order] + struct.pack(f"{order}I", 8 + len(data))
    return start + data + directory + bytes(4)


@pytest.fixture
def photo(rng: np.random.Generator) -> np.ndarray:
    """(40, 60, 3) uint8, smooth, so that JPEG keeps it nearly as it is."""
    y, x = np.mgrid[0:40, 0:60]
    phase = rng.uniform(0, 3, 3)
    return (127 + 100 * np.sin(x[..., None] / 11 + y[..., None] / 7 + phase)).astype(np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "PPM"])
def test_lossless_formats_are_exact(photo: np.ndarray, kind: str) -> None:
    assert np.array_equal(decode_image(saved(Image.fromarray(photo), kind)), photo)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {"quality": 95}), ("WEBP", {"lossless": True}), ("JPEG2000", {}), ("AVIF", {"quality": 95})],
)
def test_lossy_formats_are_close(photo: np.ndarray, kind: str, options: dict[str, object]) -> None:
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow was built without {kind}")
    decoded = decode_image(saved(Image.fromarray(photo), kind, **options))
    assert decoded.shape == photo.shape
    assert np.abs(decoded.astype(int) - photo).mean() < 4


def test_result_is_writable_and_contiguous(photo: np.ndarray) -> None:
    decoded = decode_image(saved(Image.fromarray(photo)))
    assert decoded.dtype == np.uint8
    assert decoded.flags.writeable
    assert decoded.flags.c_contiguous


def test_one_pixel_is_an_image() -> None:
    assert decode_image(saved(Image.new("RGB", (1, 1), (1, 2, 3)))).tolist() == [[[1, 2, 3]]]


def test_grayscale_repeats_its_value(photo: np.ndarray) -> None:
    decoded = decode_image(saved(Image.fromarray(photo[..., 0])))
    assert np.array_equal(decoded, np.repeat(photo[..., :1], 3, axis=2))


def test_black_and_white_is_0_and_255() -> None:
    decoded = decode_image(saved(Image.fromarray(np.array([[True, False]]))))
    assert decoded[0, :, 0].tolist() == [255, 0]


def test_cmyk_jpeg_becomes_rgb(photo: np.ndarray) -> None:
    decoded = decode_image(saved(Image.fromarray(photo).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(decoded.astype(int) - photo).mean() < 4


def test_palette_is_looked_up() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert decode_image(saved(image)).tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_palette_with_a_transparent_entry_shows_white_there() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert decode_image(saved(image, transparency=0)).tolist() == [[[255, 255, 255], [200, 100, 50]]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_blended_over_white(mode: str) -> None:
    image = Image.new(mode, (3, 1))
    for x, alpha in enumerate((0, 128, 255)):
        image.putpixel((x, 0), (100,) * (len(mode) - 1) + (alpha,))
    decoded = decode_image(saved(image))
    expected = [255, round((100 * 128 + 255 * 127) / 255), 100]
    assert np.abs(decoded[0, :, 0].astype(int) - expected).max() <= 1


def test_16_bit_grayscale_is_scaled_by_the_range_of_its_type() -> None:
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    for data in (saved(Image.fromarray(values)), saved(Image.fromarray(values), "TIFF")):
        assert decode_image(data)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_16_bit_rgb_is_scaled() -> None:
    values = np.array([[[0, 256, 512], [65535, 32768, 1000]]], dtype=">u2")
    decoded = decode_image(png_chunks(2, 1, 16, 2, b"\x00" + values.tobytes()))
    assert np.abs(decoded.astype(float) - values / 257).max() <= 1


def test_16_bit_rgb_with_alpha_is_scaled_and_blended() -> None:
    values = np.array([[[65535, 0, 0, 65535], [0, 0, 0, 0]]], dtype=">u2")
    assert decode_image(png_chunks(2, 1, 16, 6, b"\x00" + values.tobytes())).tolist() == [
        [[255, 0, 0], [255, 255, 255]]
    ]


def test_big_endian_16_bit_tiff_is_scaled() -> None:
    values = np.array([[0, 32768, 65535]], dtype=">u2")
    assert decode_image(tiff(3, 1, bits=16, samples=1, data=values.tobytes(), order=">"))[0, :, 0].tolist() == [
        0,
        128,
        255,
    ]


def test_12_bit_tiff_is_scaled_by_12_bits() -> None:
    packed = bytes([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x00])  # 0x000, 0x800, 0xFFF, 0x000
    assert decode_image(tiff(4, 1, bits=12, samples=1, data=packed))[0, :, 0].tolist() == [0, 128, 255, 0]


def test_floats_between_0_and_1_are_scaled_by_255() -> None:
    values = np.array([[0.0, 0.2, 0.5]], dtype=np.float32)
    assert decode_image(saved(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 51, 128]


def test_values_without_a_nominal_range_are_scaled_from_their_own() -> None:
    floats = np.array([[-5.0, np.nan, 5.0, np.inf]], dtype=np.float32)
    assert decode_image(saved(Image.fromarray(floats), "TIFF"))[0, :, 0].tolist() == [0, 128, 255, 128]
    integers = np.array([[1000, 101_000]], dtype=np.int32)
    assert decode_image(saved(Image.fromarray(integers), "TIFF"))[0, :, 0].tolist() == [0, 255]
    flat = np.full((1, 2), 7.5, dtype=np.float32)
    assert decode_image(saved(Image.fromarray(flat), "TIFF")).max() == 0


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_exif_orientation_is_applied(photo: np.ndarray, orientation: int, kind: str) -> None:
    image = Image.fromarray(photo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(image, kind, exif=exif)
    decoded = decode_image(data)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(decoded, upright)
    assert decoded.shape == ((40, 60, 3) if orientation < 5 else (60, 40, 3))


def test_orientation_6_turns_clockwise() -> None:
    image = Image.new("RGB", (2, 1))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(saved(image, exif=exif))[:, 0, 0].tolist() == [255, 0]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_exif_does_not_cost_the_image(photo: np.ndarray) -> None:
    data = saved(Image.fromarray(photo), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xffrubbish")
    assert decode_image(data).shape == photo.shape


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(decode_image(data).astype(int) - (255, 0, 0)).max() <= 5


def status_of(data: bytes, **options: int) -> str:
    with pytest.raises(ImageError) as caught:
        decode_image(data, **options)
    assert str(caught.value)
    return caught.value.status


def test_no_bytes_is_empty() -> None:
    assert status_of(b"") == "empty"


@pytest.mark.parametrize(
    "data",
    [b"\x00", b"hello, world", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7\n", bytes(5000), b"PK\x03\x04"],
)
def test_other_files_are_not_images(data: bytes) -> None:
    assert status_of(data) == "not_an_image"


def test_no_file_makes_another_program_run() -> None:
    assert status_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n") == "not_an_image"


def test_heic_is_named_as_unsupported() -> None:
    assert status_of(struct.pack(">I", 24) + b"ftypheic" + bytes(100)) == "unsupported"


def test_pixel_types_that_rgb_cannot_show_are_unsupported() -> None:
    assert status_of(tiff(2, 1, bits=8, samples=7, data=bytes(14))) == "unsupported"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_a_file_cut_short_is_truncated(rng: np.random.Generator, kind: str, keep: float) -> None:
    noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise), kind)
    assert status_of(data[: int(len(data) * keep)]) == "truncated"


def outcome(data: bytes) -> str:
    try:
        return f"{decode_image(data, max_pixels=1_000_000).ndim} axes"
    except ImageError as error:
        return error.status


ALL_KINDS = ["JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "JPEG2000"]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of damaged TIFF tags
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_every_cut_ends_in_pixels_or_a_status(rng: np.random.Generator, kind: str) -> None:
    data = saved(Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)), kind)
    outcomes = {outcome(data[:length]) for length in range(len(data))}
    assert outcomes <= {"3 axes", "empty", "not_an_image", "truncated", "unsupported"}
    assert "truncated" in outcomes


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_every_flipped_byte_ends_in_pixels_or_a_status(rng: np.random.Generator, kind: str) -> None:
    data = saved(Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)), kind)
    outcomes = set()
    for position in range(0, len(data), max(1, len(data) // 200)):
        outcomes.add(outcome(data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :]))
    assert outcomes <= {"3 axes", "not_an_image", "truncated", "unsupported", "too_large"}
    assert "not_an_image" in outcomes


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    # 10 kB that would be 10 GB: one row's worth of data is never looked at.
    bomb = png_chunks(60_000, 60_000, 8, 2, bytes(1000))
    assert status_of(bomb) == "too_large"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "JPEG2000"])
def test_max_pixels_is_the_largest_size_accepted(kind: str) -> None:
    data = saved(Image.new("RGB", (30, 20)), kind)
    assert decode_image(data, max_pixels=600).shape == (20, 30, 3)
    assert status_of(data, max_pixels=599) == "too_large"


def test_pillows_own_limit_plays_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert decode_image(saved(Image.new("RGB", (30, 20)))).shape == (20, 30, 3)


def test_an_error_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ImageError("too_large", "why")))
    assert (error.status, str(error)) == ("too_large", "why")


def test_jpeg_keeps_colour_edges(photo: np.ndarray) -> None:
    red_blue = np.zeros((16, 16, 3), dtype=np.uint8)
    red_blue[:, :7, 0] = 255
    red_blue[:, 7:, 2] = 255
    decoded = decode_image(encode_jpeg(red_blue))
    assert np.abs(decoded.astype(int) - red_blue).mean() < 3
    assert encode_jpeg(photo) == encode_jpeg(photo)


def test_quality_trades_size(photo: np.ndarray, rng: np.random.Generator) -> None:
    noisy = np.clip(photo + rng.normal(0, 10, photo.shape), 0, 255).astype(np.uint8)
    assert len(encode_jpeg(noisy, quality=50)) < len(encode_jpeg(noisy, quality=95))
