"""Pictures for the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinysam.report import pictures
from tinysam.report.pictures import find_rows, make_picture, make_pictures, relocated
from tinysam.report.scan import ImageRef, SampleSizes, read_masks, scan

ALL = SampleSizes(random=50, lowest=0, empty=0, failed=50)


def chosen(labels: Path) -> list[ImageRef]:
    figures = scan([str(path) for path in (labels / "shards").glob("*.parquet")], sizes=ALL, seed=0)
    return [*figures.random.images, *(image for kept in figures.failed.values() for image in kept.images)]


def decoded(url: str | None) -> Image.Image:
    assert url is not None
    prefix, data = url.split(",", 1)
    assert prefix == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_the_overlay_is_transparent_but_for_the_masks_and_fits_the_photo(make_labels: Callable[..., Path]) -> None:
    labels = make_labels({"a.png": [0.9, 0.8, 0.7]})
    (image,) = chosen(labels)
    rows = find_rows(str(labels / "index.parquet"), ["a.png"])
    picture = make_picture(image, rows["a.png"], max_bytes=10**6)
    photo, overlay = decoded(picture.photo), decoded(picture.overlay)
    assert photo.size == overlay.size == (64, 48) == (picture.width, picture.height)
    assert picture.note is None
    covered = np.zeros((48, 64), bool)
    for mask in read_masks(image):
        x, y, w, h = (int(value) for value in mask["bbox"])
        covered[y : y + h, x : x + w] = True
    assert ((np.asarray(overlay.convert("RGBA"))[..., 3] > 0) == covered).all()


def test_an_image_without_masks_has_no_overlay_and_a_broken_one_no_photo(make_labels: Callable[..., Path]) -> None:
    labels = make_labels({"plain.png": [], "broken.png": ("truncated", "cut short"), "dead.png": ("died", "6 times")})
    images = chosen(labels)
    rows = find_rows(str(labels / "index.parquet"), [image.image_id for image in images])
    made = make_pictures(images, rows, max_bytes=10**6)
    assert made["plain.png"].photo
    assert made["plain.png"].overlay is None
    assert made["broken.png"].photo is None
    assert "cut short or damaged" in str(made["broken.png"].note)
    assert made["dead.png"].photo, "an image that another failure stopped is shown"


def test_an_image_that_is_gone_or_not_in_the_index_has_a_note(make_labels: Callable[..., Path]) -> None:
    labels = make_labels({"a.png": [0.9]})
    (image,) = chosen(labels)
    rows = find_rows(str(labels / "index.parquet"), ["a.png"])
    Path(rows["a.png"]["uri"]).unlink()
    assert "gone since the lake was indexed" in str(make_picture(image, rows["a.png"], max_bytes=10**6).note)
    assert make_picture(image, None, max_bytes=10**6).note == "not in the index"


def test_pictures_keep_within_their_bytes_whatever_they_show(
    make_labels: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Noise does not compress: these are the largest pictures there can be.
    monkeypatch.setattr(pictures, "_SMALLEST_SIDE", 8)
    labels = make_labels({f"{i}.png": [0.9] * 5 for i in range(4)})
    images = chosen(labels)
    rows = find_rows(str(labels / "index.parquet"), [image.image_id for image in images])
    for budget in (20_000, 8_000, 2_500):
        made = make_pictures([*images, *images], rows, max_bytes=budget)
        used = 2 * sum(len(picture.photo or "") + len(picture.overlay or "") for picture in made.values())
        assert used <= budget
        assert all(picture.photo for picture in made.values())
        assert all(picture.width / picture.height == pytest.approx(4 / 3, rel=0.2) for picture in made.values())


def test_a_picture_that_cannot_be_made_small_enough_is_left_out(make_labels: Callable[..., Path]) -> None:
    labels = make_labels({"a.png": [0.9]})
    (image,) = chosen(labels)
    rows = find_rows(str(labels / "index.parquet"), ["a.png"])
    picture = make_picture(image, rows["a.png"], max_bytes=100)
    assert picture.photo is None
    assert "room" in str(picture.note)


def test_rows_are_found_by_id_alone(make_labels: Callable[..., Path]) -> None:
    labels = make_labels({f"sub dir/{i}.png": [] for i in range(12)})
    rows = find_rows(str(labels / "index.parquet"), ["sub dir/3.png", "sub dir/11.png", "nowhere.png"])
    assert sorted(rows) == ["sub dir/11.png", "sub dir/3.png"]
    assert rows["sub dir/3.png"]["uri"].endswith("sub dir/3.png")


@pytest.mark.parametrize(
    ("image_id", "uri", "expected"),
    [
        ("a/b.jpg", "/old/lake/a/b.jpg", "s3://new/lake/a/b.jpg"),
        ("a/b.tar/c/d.jpg", "/old/lake/a/b.tar", "s3://new/lake/a/b.tar"),
        ("a/b.parquet#12", "s3://old/a/b.parquet", "s3://new/lake/a/b.parquet"),
        ("a#1.jpg", "/old/a#1.jpg", "s3://new/lake/a#1.jpg"),
        ("listed.jpg", "https://elsewhere/other.jpg", "https://elsewhere/other.jpg"),
    ],
)
def test_images_of_a_lake_that_moved_are_found_by_their_ids(image_id: str, uri: str, expected: str) -> None:
    row = {"image_id": image_id, "uri": uri, "offset": 512, "size": 9}
    assert relocated(row, "s3://new/lake/") == {**row, "uri": expected}
