"""The metadata services of three clouds, as their documentation has them, on a port of this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "AQAEAGz-this-is-a-secret=="


@dataclass
class MetadataServer:
    """A running server; what it says of its machine may be changed at any time."""

    url: str
    """``http://127.0.0.1:PORT``."""
    leaving: bool = False
    """Whether the machine is about to be taken away."""
    azure_events: list[dict[str, object]] = field(default_factory=list)
    """Scheduled events beside that."""
    status: int | None = None
    """Answer everything with this."""
    body: str | None = None
    """Answer everything with this, and status 200."""
    asked: list[str] = field(default_factory=list)
    """Method and path of every request."""


def azure_event(kind: str, machine: str) -> dict[str, object]:
    return {
        "EventId": "f020ba2e-3bc0-4c40-a10b-86575a9eabd5",
        "EventType": kind,
        "ResourceType": "VirtualMachine",
        "Resources": [machine],
        "EventStatus": "Scheduled",
        "NotBefore": "Mon, 19 Sep 2022 18:29:47 GMT",
    }


@contextmanager
def metadata_server() -> Iterator[MetadataServer]:
    """Serves until the context ends; the machine is Azure's ``own-name``."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            server.asked.append(f"{self.command} {self.path}")
            if server.body is not None:
                status, body = 200, server.body
            else:
                status, body = self.choose() if server.status is None else (server.status, TOKEN)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_PUT = answer  # noqa: N815

        def choose(self) -> tuple[int, str]:
            path, _, query = self.path.partition("?")
            if path == "/latest/api/token":
                asked_well = self.command == "PUT" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
                return (200, TOKEN) if asked_well else (400, "")
            if path == "/latest/meta-data/spot/instance-action":
                if self.headers["X-aws-ec2-metadata-token"] != TOKEN:
                    return 401, ""
                notice = {"action": "terminate", "time": "2017-09-18T08:22:00Z"}
                return (200, json.dumps(notice)) if server.leaving else (404, "<html>404 - Not Found</html>")
            if path == "/computeMetadata/v1/instance/preempted":
                flavoured = self.headers["Metadata-Flavor"] == "Google"
                return (200, str(server.leaving).upper()) if flavoured else (403, "")
            if self.headers["Metadata"] != "true" or "api-version=" not in query:
                return 400, ""
            if path == "/metadata/scheduledevents":
                own = [azure_event("Preempt", "own-name")] if server.leaving else []
                return 200, json.dumps({"DocumentIncarnation": 1, "Events": [*server.azure_events, *own]})
            return (200, "own-name") if path == "/metadata/instance/compute/name" else (404, "")

        def log_message(self, *args: object) -> None:
            """Tests have nothing to say to a terminal."""

    http_server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = MetadataServer(url=f"http://127.0.0.1:{http_server.server_port}")
    thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        http_server.shutdown()
        thread.join()
        http_server.server_close()
