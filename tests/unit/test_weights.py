"""Fetching public checkpoints, from a server on this machine."""

from __future__ import annotations

import hashlib
import http.server
import io
import re
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from tinysam import CheckpointError, load, sam_model_registry, weights
from tinysam.lake.filesystem import LakeError
from tinysam.weights import PUBLIC_FILES, SHIPPED, PublicFile, WeightsError, fetch, locate, resolve

CONTENT = bytes(range(256)) * 9000


@dataclass
class Server:
    """What the server should do, and what it was asked."""

    url: str = ""
    content: bytes = CONTENT
    etag: str = '"one"'
    status: int = 200
    """Answers with this status where it is not 200."""
    failures: int = 0
    """How many answers still fail with 503 first."""
    cut_after: int | None = None
    """Closes the connection after so many bytes of each answer."""
    ranges: list[str | None] = field(default_factory=list)
    """The Range of each request."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.ranges.append(wanted)
            if state.failures > 0:
                state.failures -= 1
                self.send_error(503)
                return
            if state.status != 200:
                self.send_error(state.status)
                return
            start, total = 0, len(state.content)
            if wanted is not None and self.headers.get("If-Range") == state.etag:
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                if start >= total:
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{total}")
                    self.end_headers()
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(total - start))
            self.send_header("ETag", state.etag)
            self.end_headers()
            end = total if state.cut_after is None else min(total, start + state.cut_after)
            self.wfile.write(state.content[start:end])

        def log_message(self, *_: object) -> None:
            """Quiet."""

    monkeypatch.setattr(weights, "_BACKOFF_SECONDS", 0.0)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        state.url = f"http://127.0.0.1:{httpd.server_port}/model.pth"
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield state
        httpd.shutdown()
        thread.join()


def published(url: str, content: bytes = CONTENT) -> PublicFile:
    return PublicFile(
        name="model", url=url, size=len(content), sha256=hashlib.sha256(content).hexdigest(), about="for tests"
    )


def archive(text: str = "weights") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", text)
    return buffer.getvalue()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_download_arrives_whole_and_reports_its_progress(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    path = fetch(published(server.url), folder=tmp_path, progress=lambda *step: seen.append(step))
    assert path == tmp_path / "model.pth"
    assert path.read_bytes() == CONTENT
    assert names(tmp_path) == ["model.pth"]
    assert ("downloading", len(CONTENT), len(CONTENT)) in seen
    assert ("checking", len(CONTENT), len(CONTENT)) in seen


def test_what_is_there_already_is_checked_and_not_downloaded_again(server: Server, tmp_path: Path) -> None:
    fetch(published(server.url), folder=tmp_path)
    fetch(published(server.url), folder=tmp_path)
    assert len(server.ranges) == 1
    (tmp_path / "model.pth").write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(WeightsError, match="Remove it and fetch it again"):
        fetch(published(server.url), folder=tmp_path)


def test_a_connection_that_breaks_is_resumed_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.cut_after = 1_000_000
    assert fetch(published(server.url), folder=tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=1000000-", "bytes=2000000-"]


def test_an_interrupted_command_goes_on_when_it_is_run_again(server: Server, tmp_path: Path) -> None:
    def interrupt(_what: str, done: int, _total: int | None) -> None:
        if done > 1_500_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(published(server.url), folder=tmp_path, progress=interrupt)
    assert "model.pth" not in names(tmp_path)
    assert fetch(published(server.url), folder=tmp_path).read_bytes() == CONTENT
    (resumed,) = server.ranges[1:]
    assert re.fullmatch(r"bytes=\d{7}-", resumed or "")


def test_two_versions_of_a_file_are_never_glued_together(server: Server, tmp_path: Path) -> None:
    (tmp_path / "model.pth.part").write_bytes(b"old version" * 1000)
    (tmp_path / "model.pth.part.version").write_text('"zero"')
    assert fetch(published(server.url), folder=tmp_path).read_bytes() == CONTENT
    assert server.ranges[0] == "bytes=11000-"


def test_a_part_of_unknown_version_is_downloaded_from_the_start(server: Server, tmp_path: Path) -> None:
    (tmp_path / "model.pth.part").write_bytes(CONTENT[:5000])
    assert fetch(published(server.url), folder=tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None]


def test_a_part_that_is_complete_only_has_to_be_checked(server: Server, tmp_path: Path) -> None:
    (tmp_path / "model.pth.part").write_bytes(CONTENT)
    (tmp_path / "model.pth.part.version").write_text(server.etag)
    assert fetch(published(server.url), folder=tmp_path).read_bytes() == CONTENT


def test_a_server_in_trouble_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.failures = 3
    assert fetch(published(server.url), folder=tmp_path).read_bytes() == CONTENT


def test_a_server_that_stays_in_trouble_is_given_up_on(server: Server, tmp_path: Path) -> None:
    server.failures = 1000
    with pytest.raises(WeightsError, match=r"503.*run the command again.*--from PATH"):
        fetch(published(server.url), folder=tmp_path)
    assert len(server.ranges) == 5


def test_a_file_that_is_gone_is_not_asked_for_twice(server: Server, tmp_path: Path) -> None:
    server.status = 404
    with pytest.raises(WeightsError, match=r"404.*tinysam weights model --from PATH") as caught:
        fetch(published(server.url), folder=tmp_path)
    assert str(tmp_path / "model.pth") in str(caught.value)
    assert len(server.ranges) == 1


def test_without_a_connection_the_message_says_how_to_place_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_BACKOFF_SECONDS", 0.0)
    with pytest.raises(WeightsError, match=r"cannot download http://127.0.0.1:1/model.pth.*place it at"):
        fetch(published("http://127.0.0.1:1/model.pth"), folder=tmp_path)


def test_a_wrong_checksum_is_refused_and_leaves_nothing(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT[:-1] + b"x"
    with pytest.raises(WeightsError, match=r"SHA-256 [0-9a-f]{64} and not .*not the published model\.pth"):
        fetch(published(server.url), folder=tmp_path)
    assert names(tmp_path) == []


def test_a_page_in_place_of_a_checkpoint_is_refused_without_a_known_checksum(server: Server, tmp_path: Path) -> None:
    unknown = PublicFile(name="model", url=server.url, size=None, sha256=None, about="for tests")
    server.content = b"<html>please sign in</html>"
    with pytest.raises(WeightsError, match="is not a checkpoint file"):
        fetch(unknown, folder=tmp_path)
    whole = archive("weights" * 100)
    server.content = whole.replace(b"weightsweights", b"weightsWEIGHTS", 1)
    with pytest.raises(WeightsError, match="is damaged"):
        fetch(unknown, folder=tmp_path)
    server.content = whole
    assert fetch(unknown, folder=tmp_path).read_bytes() == whole


def test_a_copy_is_taken_only_if_it_is_the_published_file(tmp_path: Path) -> None:
    file, copy = published("http://127.0.0.1:1/model.pth"), tmp_path / "a copy.pth"
    copy.write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(WeightsError, match="give their path wherever"):
        fetch(file, source=str(copy), folder=tmp_path / "home")
    copy.write_bytes(CONTENT)
    path = fetch(file, source=str(copy), folder=tmp_path / "home")
    assert path.read_bytes() == CONTENT
    assert copy.exists()


def test_a_copy_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LakeError, match=r"nowhere\.pth"):
        fetch(published("http://127.0.0.1:1/model.pth"), source=str(tmp_path / "nowhere.pth"), folder=tmp_path)


def test_a_disk_without_room_is_noticed_before_the_download(server: Server, tmp_path: Path) -> None:
    file = PublicFile(name="model", url=server.url, size=10**18, sha256="00", about="for tests")
    with pytest.raises(WeightsError, match=r"make room there, or set TINYSAM_HOME"):
        fetch(file, folder=tmp_path)
    assert server.ranges == []


def test_names_resolve_to_files_that_were_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYSAM_HOME", str(tmp_path))
    with pytest.raises(WeightsError, match="run `tinysam weights mobile_sam`"):
        resolve("mobile_sam")
    (tmp_path / "mobile_sam.pt").write_bytes(b"weights")
    assert resolve("mobile_sam") == str(tmp_path / "mobile_sam.pt") == str(locate("mobile_sam"))
    assert resolve("my/own.safetensors") == "my/own.safetensors"


def test_the_cache_folder_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINYSAM_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert weights.weights_folder() == tmp_path / "tinysam"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weights.weights_folder() == tmp_path / ".cache" / "tinysam"


@pytest.mark.parametrize("file", PUBLIC_FILES.values(), ids=lambda file: file.name)
def test_public_files_are_fetched_safely(file: PublicFile) -> None:
    assert file.url.startswith("https://")
    assert file.filename.endswith((".pth", ".pt"))
    assert file.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", file.sha256)


def test_shipped_models_resolve_to_their_files() -> None:
    for name in SHIPPED:
        assert Path(resolve(name)).stat().st_size > 1e6


def test_a_public_model_loads_by_name_once_it_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYSAM_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match="tinysam weights mobile_sam"):
        load("mobile_sam")
    sam = sam_model_registry["vit_t"]()
    torch.save(sam.state_dict(), tmp_path / "mobile_sam.pt")
    found = load("mobile_sam")
    assert torch.equal(found.mask_decoder.iou_token.weight, sam.mask_decoder.iou_token.weight)
