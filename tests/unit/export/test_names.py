from __future__ import annotations

from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinysam.export.names import FileNames, safe_path

PARTS = st.one_of(st.sampled_from(["..", ".", "", "a", "A", "a.jpg", "a.png", "con", "%", "%2E"]), st.text(max_size=5))
IDS = st.lists(st.lists(PARTS, min_size=1, max_size=4).map("/".join), unique=True, max_size=12)


@given(ids=IDS)
def test_paths_stay_below_their_folder_and_differ(ids: list[str]) -> None:
    names = FileNames(ids)
    paths = [names.path_of(image_id) for image_id in ids]
    assert len(set(paths)) == len(ids)
    for path in [*paths, *map(safe_path, ids)]:
        parts = path.split("/")
        assert not {"", ".", ".."} & set(parts)
        assert "\\" not in path
        assert "\x00" not in path
        assert not PurePosixPath(path).is_absolute()
        assert all(len(part.encode("utf-8", "backslashreplace")) <= 200 for part in parts)


@pytest.mark.parametrize("image_id", ["a/b c.jpg", "it's.png", "ünï/日本.jpg", "x.tar/y.jpg", "z.parquet#7"])
def test_ordinary_names_stay_what_they_are(image_id: str) -> None:
    assert safe_path(image_id) == image_id


@pytest.mark.parametrize(
    ("image_id", "path"),
    [
        ("../a.jpg", "%2E%2E/a.jpg"),
        ("/a.jpg", "%/a.jpg"),
        ("a\\b:c.jpg", "a%5Cb%3Ac.jpg"),
        ("nul", "%6Eul"),
        (".hidden", "%2Ehidden"),
        ("a. ", "a.%20"),
    ],
)
def test_what_is_not_safe_is_encoded(image_id: str, path: str) -> None:
    assert safe_path(image_id) == path


def test_images_that_differ_in_their_suffix_keep_it() -> None:
    ids = ["a.jpg", "a.png", "b.jpg", "folder.d/c"]
    names = FileNames(ids)
    assert [names.path_of(image_id) for image_id in ids] == ["a.jpg", "a.png", "b", "folder.d/c"]
