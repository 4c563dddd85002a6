"""Fixtures of the jobs' tests: one Ray and one real S3 server a session, and lakes to run on."""

from __future__ import annotations

import os

# Read when ray is imported. Tests talk to a Ray of their own on loopback.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from segment_anything.modeling import Sam

from pipelines.common.local_s3 import local_s3
from tinysam.lake.filesystem import join, list_files, open_filesystem
from tinysam.lake.shards import read_shard

ROOT = Path(__file__).resolve().parents[2]
BUCKET = "tests"


NEEDS_RAY = "ray_address"
IN_MAKE_TEST = "starts_ray_in_make_test"
RAY_TIMEOUT_SECONDS = 900
"""Ray and each of its workers start with seconds of imports, which beside other load are minutes."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "soak: kills jobs for minutes; run by `make soak` alone")
    config.addinivalue_line("markers", f"{IN_MAKE_TEST}: uses Ray, and yet is quick and telling enough for `make test`")


@pytest.hookimpl(tryfirst=True)  # before -m 'not slow' chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("soak"):
            if "soak" not in config.option.markexpr:
                item.add_marker(pytest.mark.skip(reason="run by `make soak` alone"))
        elif NEEDS_RAY in getattr(item, "fixturenames", ()):
            if not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(RAY_TIMEOUT_SECONDS))
            if not item.get_closest_marker(IN_MAKE_TEST):
                item.add_marker(pytest.mark.slow)


@dataclass(frozen=True, kw_only=True)
class S3Bucket:
    """A bucket on an S3-compatible server of this machine, with a folder for each test."""

    folder: Path
    """Where the bucket's objects lie as files, to look at what was written."""

    def upload(self, local: Path, name: str) -> str:
        """Puts the files of a local folder into the bucket's folder ``name`` and returns its URL."""
        fs, root = open_filesystem(f"s3://{BUCKET}/{name}")
        for path in local.rglob("*"):
            if path.is_file():
                fs.pipe_file(f"{root}/{path.relative_to(local).as_posix()}", path.read_bytes())
        return f"s3://{root}"


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Bucket]:
    """A bucket; the server's address and keys are in the environment of this process and of all that it starts."""
    folder = tmp_path_factory.mktemp("s3") / "buckets"
    with local_s3(folder, [BUCKET]) as server, pytest.MonkeyPatch.context() as environment:
        for name, value in server.environment().items():
            environment.setenv(name, value)
        yield S3Bucket(folder=folder / BUCKET)


@pytest.fixture(scope="session")
def ray_address(s3: S3Bucket) -> Iterator[str]:
    """Starts the session's Ray, which jobs of this process use; other processes join it by this address."""
    import ray

    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("RAY_ADDRESS", raising=False)
        environment.setenv("PYTHONPATH", str(ROOT))
        ray.init(
            "local",  # and not one that runs here already
            num_cpus=2,  # so many idle workers are started at once
            include_dashboard=False,
            object_store_memory=200 * 2**20,
            logging_level="error",
            log_to_driver=False,
        )
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_sam: Sam, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of ``tiny_sam``'s weights."""
    from tinysam import save_checkpoint

    path = tmp_path_factory.mktemp("checkpoints") / "tiny sam.safetensors"
    save_checkpoint(tiny_sam, str(path))
    return str(path)


def encode(pixels: np.ndarray | Image.Image, kind: str, **options: object) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def make_lake() -> Callable[[Path, int], Path]:
    """A function that fills a folder with so many small photographs-to-be; returns the folder."""

    def make(folder: Path, count: int) -> Path:
        rng = np.random.default_rng(0)
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            pixels = coarse.resize((160 + 8 * number % 64, 120))
            (folder / f"{number:03d}.jpg").write_bytes(encode(pixels, "JPEG"))
        return folder

    return make


@pytest.fixture(scope="session")
def odd_lake() -> Callable[[Path], dict[str, str]]:
    """A function that fills a folder with every odd and bad file; returns the status that each image_id must get."""

    def make(folder: Path) -> dict[str, str]:
        rng = np.random.default_rng(1)
        rgb = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
        jpeg = encode(rgb, "JPEG")
        rotated = Image.Exif()
        rotated[0x0112] = 6
        frames = [Image.fromarray(np.roll(rgb, i, axis=0)) for i in range(3)]
        files = {
            "good/same name.jpg": jpeg,
            "other/same name.jpg": encode(rgb[::-1], "JPEG"),
            'it\'s "quoted" – ünïcode.png': encode(rgb, "PNG"),
            "gray.png": encode(rgb[..., 0], "PNG"),
            "16-bit.png": encode(rng.integers(0, 65536, (40, 60), dtype=np.uint16), "PNG"),
            "cmyk.jpg": encode(Image.fromarray(rgb).convert("CMYK"), "JPEG"),
            "palette.png": encode(Image.fromarray(rgb).quantize(16), "PNG"),
            "alpha.png": encode(np.dstack([rgb, rgb[..., 0]]), "PNG"),
            "rotated.jpg": encode(rgb, "JPEG", exif=rotated),
            "animated.gif": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
            "1x1.png": encode(rgb[:1, :1], "PNG"),
            "empty.jpg": b"",
            "text.jpg": b"this is no image at all",
            "truncated.jpg": jpeg[: len(jpeg) // 2],
            "bomb.png": _png_header(60_000, 60_000),
            "narrow.png": encode(np.zeros((2000, 1), dtype=np.uint8), "PNG"),
        }
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        bad = {
            "empty.jpg": "empty",
            "text.jpg": "not_an_image",
            "truncated.jpg": "truncated",
            "bomb.png": "too_large",
        }
        return {name: bad.get(name, "ok") for name in files}

    return make


def _png_header(width: int, height: int) -> bytes:
    """A few bytes that promise an image of gigabytes."""
    data = bytearray(encode(np.zeros((1, 1), dtype=np.uint8), "PNG"))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.fixture(scope="session")
def read_output() -> Callable[[str], pa.Table]:
    """A function that reads all shards of an output."""

    def read(output: str) -> pa.Table:
        return pa.concat_tables([read_shard(url) for url in list_files(join(output, "shards"), "*.parquet")])

    return read
