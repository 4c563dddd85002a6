"""Lakes on the Hugging Face hub, against a hub of our own that answers as the real one does."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from types import SimpleNamespace
from urllib.parse import unquote, urlparse

import pytest

from tinysam.lake.filesystem import LakeError, MissingError, TransientError, explained
from tinysam.lake.images import decode_image
from tinysam.lake.index import IndexConfig, build_index, read_image_bytes

hub_constants = pytest.importorskip("huggingface_hub.constants")

REPOSITORY = "datasets/acme/cats"


class Hub(BaseHTTPRequestHandler):
    """The five requests that reading a data set takes."""

    files: dict[str, bytes]

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path).strip("/")
        tree, content = f"api/{REPOSITORY}/tree/main", f"{REPOSITORY}/resolve/main/"
        if path in (f"api/{REPOSITORY}", f"api/{REPOSITORY}/revision/main"):
            self._answer(200, json.dumps({"id": "acme/cats", "sha": "0" * 40}).encode())
        elif path.startswith(tree):
            self._answer(200, json.dumps(self._children(path.removeprefix(tree).strip("/"))).encode())
        elif path.removeprefix(content) in self.files:
            self._answer(200, self.files[path.removeprefix(content)])
        else:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = [self._entry(path) for path in request["paths"] if path in self.files or self._children(path)]
        self._answer(200, json.dumps(known).encode())

    def log_message(self, format: str, *args: object) -> None:
        """A quiet server."""

    def _children(self, folder: str) -> list[dict[str, object]]:
        inside = {path.removeprefix(f"{folder}/" if folder else "") for path in self.files if path.startswith(folder)}
        return [
            self._entry(str(PurePosixPath(folder, name))) for name in sorted({path.split("/")[0] for path in inside})
        ]

    def _entry(self, path: str) -> dict[str, object]:
        if path in self.files:
            return {"type": "file", "path": path, "size": len(self.files[path]), "oid": "1"}
        return {"type": "directory", "path": path, "oid": "1"}

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        first, last = 0, len(body) - 1
        if status == 200 and (wanted := self.headers.get("Range")):
            first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            status = 206
        self.send_response(status)
        part = body[first : last + 1]
        for name, value in {"Content-Length": str(len(part)), "ETag": '"1"', **(headers or {})}.items():
            self.send_header(name, value)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(body)}")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(part)


@pytest.fixture
def hub(png: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    handler = type("TestHub", (Hub,), {"files": {"train/a.png": png(1), "train/b c.png": png(2), "README.md": b"cats"}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(hub_constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("hub")
def test_a_data_set_on_the_hub_is_a_lake() -> None:
    index = build_index(IndexConfig(lake=f"hf://{REPOSITORY}")).to_pylist()
    assert [row["image_id"] for row in index] == ["train/a.png", "train/b c.png"]
    assert [row["uri"] for row in index] == [f"hf://{REPOSITORY}/{row['image_id']}" for row in index]
    assert [decode_image(read_image_bytes(row)).max() for row in index] == [1, 2]


@pytest.mark.usefixtures("hub")
def test_a_repository_that_is_not_there_is_explained() -> None:
    with pytest.raises(MissingError, match=r"hf://datasets/acme/dogs.*private.*HF_TOKEN"):
        build_index(IndexConfig(lake="hf://datasets/acme/dogs"))


def test_a_hub_that_is_overloaded_is_worth_another_try() -> None:
    error = type("HfHubHTTPError", (OSError,), {"response": SimpleNamespace(status_code=503)})
    with pytest.raises(TransientError), explained("hf://datasets/acme/cats"):
        raise error


def test_a_hub_that_cannot_be_reached_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(LakeError, match="cannot be reached"):
        build_index(IndexConfig(lake="hf://datasets/acme/none"))
