"""Debian's chromium, headless, driven by its DevTools protocol over a pipe: no package is needed for it."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

EXECUTABLE = shutil.which("chromium")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"),
)


class Page:
    """A tab of the browser."""

    def __init__(self, requests: int, answers: io.BufferedReader) -> None:
        self._requests, self._answers = requests, answers
        self._numbers = itertools.count(1)
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Calls a method of the protocol and returns its result; events in between are passed over."""
        number = next(self._numbers)
        self._send({"id": number, "method": method, "params": params})
        while (message := self._receive()).get("id") != number:
            pass
        assert "error" not in message, message
        return message["result"]

    def open(self, url: str, *, width: int, height: int, dark: bool = False) -> None:
        """Opens a page in a window of that size and waits until its pictures are there."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        while self._receive().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, which must be one that JSON has."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self, *, whole: bool = False) -> np.ndarray:
        """(H, W, 3) uint8 of what the window shows, or of the whole page."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))

    def _send(self, message: dict[str, Any]) -> None:
        session = {"sessionId": self._session} if self._session else {}
        os.write(self._requests, json.dumps(message | session).encode() + b"\0")

    def _receive(self) -> dict[str, Any]:
        parts = []
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "the browser has ended"
            parts.append(byte)
        return json.loads(b"".join(parts))


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """Starts chromium with its profile in ``folder``, and ends it."""
    assert EXECUTABLE is not None
    request_end, requests = os.pipe()
    answers, answer_end = os.pipe()
    # The browser reads from descriptor 3 and writes to 4; a shell puts the pipes there.
    script = f'exec "$@" 3<&{request_end} 4>&{answer_end}'
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", EXECUTABLE, *_FLAGS, f"--user-data-dir={folder}"],
        pass_fds=(request_end, answer_end),
        stderr=subprocess.DEVNULL,
    )
    os.close(request_end)
    os.close(answer_end)
    try:
        with os.fdopen(answers, "rb") as stream:
            yield Page(requests, stream)
    finally:
        os.close(requests)
        process.terminate()
        process.wait(timeout=30)
