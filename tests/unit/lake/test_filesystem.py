from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import fsspec
import pyarrow.fs
import pytest
from botocore.exceptions import EndpointConnectionError, NoCredentialsError
from fsspec.implementations.local import LocalFileSystem

from tinysam.lake.filesystem import (
    LakeError,
    MissingError,
    ShortReadError,
    arrow_filesystem,
    exists,
    explained,
    is_local,
    join,
    list_files,
    open_filesystem,
    read_bytes,
    redact_url,
    write_once,
)

ODD_NAMES = ["a b.bin", "it's.bin", 'say "hi".bin', "日本/ü.bin", "100%20.bin", "a#b?c=d.bin", "[x]*.bin"]


@pytest.mark.parametrize(
    ("url", "local"),
    [("data", True), ("/data", True), ("file:///data", True), ("s3://b/k", False), ("memory://a", False)],
)
def test_local_urls_are_told_from_remote_ones(url: str, local: bool) -> None:
    assert is_local(url) is local


@pytest.mark.parametrize(
    ("url", "parts", "expected"),
    [
        ("s3://b", ("a", "c.json"), "s3://b/a/c.json"),
        ("s3://b/a/", ("/c.json",), "s3://b/a/c.json"),
        ("/", ("a",), "/a"),
        ("data", ("x y", "ü"), "data/x y/ü"),
    ],
)
def test_join_puts_one_slash_between_parts(url: str, parts: tuple[str, ...], expected: str) -> None:
    assert join(url, *parts) == expected


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_are_taken_literally(storage: str, name: str) -> None:
    url = join(storage, name)
    write_once(url, b"content")
    assert read_bytes(url) == b"content"
    assert [listed.removeprefix(storage).strip("/") for listed in list_files(storage)] == [name]
    assert read_bytes(list_files(storage)[0]) == b"content"


def test_two_colons_in_a_local_name_do_not_chain_filesystems(tmp_path: Path) -> None:
    write_once(str(tmp_path / "zip::a.bin"), b"content")
    assert read_bytes(str(tmp_path / "zip::a.bin")) == b"content"


def test_a_range_is_read(storage: str) -> None:
    url = join(storage, "x.bin")
    write_once(url, bytes(range(100)))
    assert read_bytes(url, 10, 5) == bytes(range(10, 15))
    assert read_bytes(url, 95) == bytes(range(95, 100))
    assert read_bytes(url, 3, 0) == b""


def test_a_range_past_the_end_is_an_error(storage: str) -> None:
    url = join(storage, "x.bin")
    write_once(url, b"12345")
    with pytest.raises(ShortReadError, match="cut short, or has changed"):
        read_bytes(url, 3, 3)


def test_a_missing_file_is_named(storage: str) -> None:
    url = join(storage, "none.bin")
    with pytest.raises(MissingError, match=r"none\.bin does not exist"):
        read_bytes(url)
    assert not exists(url)


def test_a_file_and_a_folder_exist(storage: str) -> None:
    write_once(join(storage, "a", "b.bin"), b"1")
    assert exists(join(storage, "a", "b.bin"))
    assert exists(join(storage, "a"))


def test_listing_a_folder_that_does_not_exist_is_empty(storage: str) -> None:
    assert list_files(join(storage, "none")) == []


def test_listing_takes_a_pattern_and_leaves_hidden_files_out(storage: str) -> None:
    for name in ("b/2.parquet", "b/1.parquet", "c.json", ".hidden/3.parquet", "b/.4.parquet"):
        write_once(join(storage, name), b"1")
    names = [url.rsplit("/", 1)[-1] for url in list_files(storage, "*.parquet")]
    assert names == ["1.parquet", "2.parquet"]


def test_writing_replaces_and_leaves_nothing_else_behind(storage: str) -> None:
    url = join(storage, "deep", "x.bin")
    write_once(url, b"old and longer")
    write_once(url, b"new")
    assert read_bytes(url) == b"new"
    fs, path = open_filesystem(join(storage, "deep"))
    assert len(fs.ls(path)) == 1


def test_a_listing_is_never_stale(storage: str) -> None:
    assert list_files(storage) == []
    write_once(join(storage, "x.bin"), b"1")
    assert len(list_files(storage)) == 1


def test_a_process_killed_while_writing_leaves_no_file(tmp_path: Path) -> None:
    # The process dies for real, between the write and the rename.
    code = (
        "import os, pathlib, sys\n"
        "from tinysam.lake.filesystem import write_once\n"
        "pathlib.Path.replace = lambda *args: os._exit(9)\n"
        "write_once(sys.argv[1] + '/x.bin', b'half')\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, check=False)
    assert done.returncode == 9
    assert not (tmp_path / "x.bin").exists()
    assert list_files(str(tmp_path)) == []


def test_a_failed_write_removes_its_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(LakeError, match="the disk is full"):
        write_once(str(tmp_path / "x.bin"), b"1")
    assert list(tmp_path.iterdir()) == []


def test_a_written_file_has_ordinary_permissions(tmp_path: Path) -> None:
    write_once(str(tmp_path / "ours.bin"), b"1")
    (tmp_path / "plain.bin").write_bytes(b"1")
    assert (tmp_path / "ours.bin").stat().st_mode == (tmp_path / "plain.bin").stat().st_mode


def test_a_file_in_the_place_of_a_folder_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    with pytest.raises(LakeError, match="a file stands where a folder is needed"):
        write_once(str(tmp_path / "file" / "x.bin"), b"1")


def test_an_unknown_scheme_is_explained() -> None:
    with pytest.raises(LakeError, match="unknown scheme 'nonsense'"):
        open_filesystem("nonsense://bucket/key")


@pytest.mark.parametrize(
    ("error", "url", "expected"),
    [
        (NoCredentialsError(), "s3://b/k", "no credentials were found. Set AWS_ACCESS_KEY_ID"),
        (EndpointConnectionError(endpoint_url="http://x"), "s3://b/k", "cannot be reached. Check the network"),
        (PermissionError("Forbidden"), "s3://b/k", "access denied. Check AWS_ACCESS_KEY_ID"),
        (PermissionError("Forbidden"), "/data", "no permission to read"),
        (FileNotFoundError("The specified bucket does not exist"), "s3://b/k", "there is no bucket 'b'"),
        (FileNotFoundError("b"), "s3://b", "there is no bucket 'b'"),
        (FileNotFoundError("b/k"), "s3://b/k", "does not exist. Check the spelling"),
        (ImportError("Please install gcsfs"), "gs://b/k", "not installed. Please install gcsfs"),
        (ValueError("Invalid endpoint: minio:9000"), "s3://b/k", "AWS_ENDPOINT_URL needs a scheme"),
    ],
)
def test_an_error_names_the_url_and_the_remedy(error: Exception, url: str, expected: str) -> None:
    with pytest.raises(LakeError, match=expected) as caught, explained(url):
        raise error
    assert str(caught.value).startswith(url)
    assert caught.value.__cause__ is error


def test_a_bug_is_not_taken_for_trouble_with_the_storage() -> None:
    with pytest.raises(KeyError), explained("s3://b/k"):
        raise KeyError("bug")


def test_changed_s3_settings_take_effect_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    first, path = open_filesystem("s3://bucket/a key")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:2")
    second, _ = open_filesystem("s3://bucket/a key")
    assert path == "bucket/a key"
    assert (first.endpoint_url, second.endpoint_url) == ("http://127.0.0.1:1", "http://127.0.0.1:2")


def test_s3_keys_stay_out_of_what_is_pickled_and_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "visible-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    fs, _ = open_filesystem("s3://bucket/key")
    assert "very-secret" not in repr(fs) + str(fs.storage_options) + repr(pickle.dumps(fs))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://me:pw@host/a.json", "https://***@host/a.json"),
        ("https://host/a.json?X-Amz-Signature=1234", "https://host/a.json?***"),
        ("s3://bucket/what?.png", "s3://bucket/what?.png"),
        ("s3://bucket/a@b.png", "s3://bucket/a@b.png"),
        ("/data/a?b=c@d.png", "/data/a?b=c@d.png"),
    ],
)
def test_secrets_in_urls_are_blanked(url: str, expected: str) -> None:
    assert redact_url(url) == expected


def test_arrow_reads_what_fsspec_wrote(storage: str) -> None:
    write_once(join(storage, "a b", "x.bin"), b"content")
    fs, path = open_filesystem(join(storage, "a b", "x.bin"))
    arrow = arrow_filesystem(fs)
    assert isinstance(arrow, pyarrow.fs.LocalFileSystem) == isinstance(fs, LocalFileSystem)
    with arrow.open_input_stream(path) as stream:
        assert stream.read() == b"content"


def test_relative_and_home_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_filesystem("a")[1] == open_filesystem("~/a")[1] == os.fspath(tmp_path / "a")
    assert isinstance(open_filesystem("a")[0], fsspec.AbstractFileSystem)
