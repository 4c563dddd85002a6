"""An HTTP proxy in front of the S3 server of the tests that answers, delays and cuts off as real storage does."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

FRAMING = ("connection", "content-length", "transfer-encoding")
"""Headers about how the server sends a body, which say nothing about how the proxy does: the server sends longer
listings in chunks, the proxy all bodies whole."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to one request instead of what should."""

    status: int | None = None
    """Answer with this and S3's ``code``; the request does not reach the server."""
    code: str = ""
    """S3's name of the error, as in ``SlowDown``."""
    cut_after: int | None = None
    """Send so many bytes of the body, then close the connection."""
    delay: float = 0.0
    """Seconds to wait before the answer."""


@dataclass
class FaultProxy:
    """A running proxy; ``choose`` decides about each request by its method, its path and its number."""

    endpoint: str
    """``http://127.0.0.1:PORT``."""
    choose: Callable[[str, str, int], Fault | None] = lambda method, path, number: None
    """Called under a lock; numbers count from 1 over all requests."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of every request so far."""
    faults: int = 0
    """Requests that something happened to."""


@contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    """Forwards to ``upstream`` until the context ends. Signatures stay right, as the Host header is passed on."""
    host = urlsplit(upstream).netloc
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with lock:
                path = unquote(self.path)
                proxy.requests.append((self.command, path))
                fault = proxy.choose(self.command, path, len(proxy.requests))
                proxy.faults += fault is not None
            fault = fault or Fault()
            time.sleep(fault.delay)
            if fault.status is not None:
                text = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>a test</Message></Error>"
                self.answer(fault.status, [("Content-Type", "application/xml")], text.encode(), None)
                return
            connection = http.client.HTTPConnection(host, timeout=60)
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body or None)
            response = connection.getresponse()
            data = response.read()
            headers = [(name, value) for name, value in response.getheaders() if name.lower() not in FRAMING]
            length = int(response.getheader("Content-Length") or 0) if self.command == "HEAD" else None
            self.answer(response.status, headers, data, fault.cut_after, length)
            connection.close()

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any  # noqa: N815

        def answer(
            self,
            status: int,
            headers: list[tuple[str, str]],
            data: bytes,
            cut_after: int | None,
            length: int | None = None,
        ) -> None:
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data) if length is None else length))
            self.end_headers()
            self.wfile.write(data if cut_after is None else data[:cut_after])
            if cut_after is not None:
                self.wfile.flush()
                self.connection.close()
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: the tests look at ``requests``."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy = FaultProxy(endpoint=f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
