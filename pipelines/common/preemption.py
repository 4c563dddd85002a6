"""The notice that a cloud gives to a machine which it is about to take away, from the machine's metadata service.

========= ========================================================================== ==========
cloud     what is asked, as the clouds document it                                   notice
========= ========================================================================== ==========
``aws``   ``/latest/meta-data/spot/instance-action`` (IMDSv2): 404, or what and when 2 minutes
``gcp``   ``/computeMetadata/v1/instance/preempted``: ``FALSE`` or ``TRUE``          30 seconds
``azure`` ``/metadata/scheduledevents``: ``Preempt`` or ``Terminate`` of the machine 30 seconds
========= ========================================================================== ==========

Ray computes the shards of a lost machine again without being asked. The notice is worth something all the same: a
machine that has it begins nothing that it cannot finish, and a driver that has it records what was done. Tokens and
answers are neither logged nor part of an error.
"""

from __future__ import annotations

import http.client
import json
import logging
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

logger = logging.getLogger(__name__)

Cloud = Literal["aws", "gcp", "azure"]

POLL_SECONDS = 5.0
"""AWS's own advice."""
TIMEOUT_SECONDS = 2.0
"""For an answer; the service is on the machine itself."""

_URLS: dict[Cloud, str] = {
    "aws": "http://169.254.169.254",
    "gcp": "http://metadata.google.internal",
    "azure": "http://169.254.169.254",
}
_GRACE_SECONDS: dict[Cloud, float] = {"aws": 100.0, "gcp": 20.0, "azure": 20.0}
_AZURE_ENDS = ("Preempt", "Terminate")

# A proxy that the environment names leads to the network, and the metadata service is not there.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class MetadataError(Exception):
    """The metadata service does not answer as documented; the message says how, without the answer itself."""


@dataclass(frozen=True, kw_only=True)
class NoticeBoard:
    """Where machines find their notice."""

    cloud: Cloud
    """Whose machines they are."""
    url: str | None = None
    """Scheme and host of the metadata service; None: the cloud's own."""

    @property
    def grace_seconds(self) -> float:
        """What is safely left when a notice is read that may be ``POLL_SECONDS`` old. Our choice."""
        return _GRACE_SECONDS[self.cloud]

    def is_notified(self) -> bool:
        """Whether this machine is about to be taken away.

        Raises:
            MetadataError: if the service does not say.
        """
        ask = {"aws": self._aws, "gcp": self._gcp, "azure": self._azure}[self.cloud]
        try:
            return ask()
        except urllib.error.HTTPError as error:
            raise MetadataError(f"{self._base} answers {error.code}") from None
        except (OSError, http.client.HTTPException) as error:
            raise MetadataError(f"{self._base} does not answer ({type(error).__name__})") from None
        except (ValueError, LookupError, TypeError):
            raise MetadataError(f"{self._base} answers otherwise than {self.cloud} documents") from None

    @property
    def _base(self) -> str:
        return self.url or _URLS[self.cloud]

    def _aws(self) -> bool:
        token = self._ask("/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, method="PUT")
        try:
            notice = self._ask("/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return False
            raise
        return bool(json.loads(notice)["action"])

    def _gcp(self) -> bool:
        answer = self._ask("/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
        return {"TRUE": True, "FALSE": False}[answer.strip()]

    def _azure(self) -> bool:
        header = {"Metadata": "true"}
        answer = json.loads(self._ask("/metadata/scheduledevents?api-version=2020-07-01", header))
        ends = [event for event in answer["Events"] if event["EventType"] in _AZURE_ENDS]
        if not ends:
            return False
        # A machine of a scale set is shown the events of the others as well.
        name = self._ask("/metadata/instance/compute/name?api-version=2021-02-01&format=text", header)
        return any(name.strip() in event["Resources"] for event in ends)

    def _ask(self, path: str, headers: dict[str, str], method: str = "GET") -> str:
        request = urllib.request.Request(self._base + path, headers=headers, method=method)
        with _opener.open(request, timeout=TIMEOUT_SECONDS) as answer:
            return answer.read(1 << 20).decode()


class NoticeWatch:
    """Looks at a board every few seconds, in a daemon thread, until it is closed."""

    def __init__(
        self, board: NoticeBoard, on_notice: Callable[[], None] = lambda: None, poll_seconds: float = POLL_SECONDS
    ) -> None:
        """``on_notice`` is called in that thread, whenever a notice appears."""
        self._board, self._on_notice, self._poll_seconds = board, on_notice, poll_seconds
        self._notified, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="preemption notice", daemon=True)
        self._thread.start()

    @property
    def notified(self) -> bool:
        """Whether this machine is about to be taken away, as far as is known."""
        return self._notified.is_set()

    def wait_while_notified(self, until: Callable[[], bool]) -> None:
        """Returns when there is no notice, or ``until``, which is asked every few seconds, says so.

        Most machines are gone before that. A notice may be withdrawn, though, and a machine sent to sleep wakes up.
        """
        while self.notified and not until():
            self._closed.wait(self._poll_seconds)

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        silent = False
        while not self._closed.is_set():
            try:
                notified = self._board.is_notified()
            except MetadataError as error:
                # An answer that is missing says neither that the machine goes nor that it stays.
                if not silent:
                    logger.warning("no preemption notice can be read, and the job goes on without: %s", error)
                silent = True
            else:
                if notified and not self.notified:
                    logger.warning("%s is about to take this machine away: no shard is begun on it", self._board.cloud)
                    self._notified.set()
                    self._on_notice()
                elif not notified:
                    self._notified.clear()
            self._closed.wait(self._poll_seconds)
