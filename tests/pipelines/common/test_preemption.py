"""A spot machine's notice, read from a server that answers as the clouds' metadata services do."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import get_args

import pytest

from pipelines.common.job_config import ShardJobConfig
from pipelines.common.preemption import Cloud, MetadataError, NoticeBoard, NoticeWatch
from pipelines.common.stopping import TerminatedError, stopping_in_order
from tests.pipelines.metadata_server import TOKEN, MetadataServer, azure_event, metadata_server

CLOUDS = get_args(Cloud)


@pytest.fixture
def server() -> Iterator[MetadataServer]:
    with metadata_server() as running:
        yield running


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_machine_is_notified_when_its_cloud_says_so(cloud: Cloud, server: MetadataServer) -> None:
    board = NoticeBoard(cloud=cloud, url=server.url)
    assert not board.is_notified()
    server.leaving = True
    assert board.is_notified()


@pytest.mark.parametrize(
    ("kind", "machine", "expected"),
    [
        ("Terminate", "own-name", True),
        ("Preempt", "neighbour", False),
        ("Preempt", "own-name-2", False),
        ("Reboot", "own-name", False),
    ],
)
def test_of_azures_events_only_the_end_of_this_machine_counts(
    kind: str, machine: str, expected: bool, server: MetadataServer
) -> None:
    server.azure_events = [azure_event("Freeze", "own-name"), azure_event(kind, machine)]
    assert NoticeBoard(cloud="azure", url=server.url).is_notified() is expected


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"status": 403}, "answers 403"),
        ({"status": 500}, "answers 500"),
        ({"body": f"<html>{TOKEN}\nsign in</html>"}, "answers otherwise than .* documents"),
        ({"body": '{"Events": 3}'}, "answers otherwise than .* documents"),
    ],
)
def test_odd_answers_are_errors_that_keep_them_to_themselves(
    cloud: Cloud, fault: dict[str, object], message: str, server: MetadataServer
) -> None:
    for name, value in fault.items():
        setattr(server, name, value)
    with pytest.raises(MetadataError, match=message) as raised:
        NoticeBoard(cloud=cloud, url=server.url).is_notified()
    assert TOKEN not in str(raised.value)
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__


def test_a_service_that_is_not_there_is_an_error() -> None:
    with metadata_server() as gone:
        pass
    with pytest.raises(MetadataError, match=r"does not answer \(URLError\)"):
        NoticeBoard(cloud="gcp", url=gone.url).is_notified()


def test_proxies_of_the_environment_are_not_asked(server: MetadataServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    assert not NoticeBoard(cloud="aws", url=server.url).is_notified()


def test_a_watch_follows_what_the_board_says(server: MetadataServer, caplog: pytest.LogCaptureFixture) -> None:
    noticed = threading.Event()
    board = NoticeBoard(cloud="aws", url=server.url)
    with caplog.at_level(logging.DEBUG), closing(NoticeWatch(board, noticed.set, poll_seconds=0.01)) as watch:
        wait_for(lambda: len(server.asked) > 2)
        assert not watch.notified
        assert not noticed.is_set()
        server.leaving = True
        wait_for(lambda: noticed.is_set())
        assert watch.notified
        server.status = 500  # one that cannot be asked says nothing new
        asked = len(server.asked)
        wait_for(lambda: len(server.asked) > asked + 4)
        assert watch.notified
        server.status, server.leaving = None, False
        wait_for(lambda: not watch.notified)
    asked = len(server.asked)
    time.sleep(0.05)
    assert len(server.asked) == asked
    messages = [record.getMessage() for record in caplog.records]
    assert [message for message in messages if "aws is about to take this machine away" in message]
    assert len([message for message in messages if "answers 500" in message]) == 1
    assert not any(TOKEN in message for message in messages)


def test_work_waits_while_the_machine_has_a_notice(server: MetadataServer) -> None:
    server.leaving = True
    over = threading.Event()
    with closing(NoticeWatch(NoticeBoard(cloud="gcp", url=server.url), poll_seconds=0.01)) as watch:
        wait_for(lambda: watch.notified)
        watch.wait_while_notified(until=lambda: True)  # the job ends anyway
        waiting = threading.Thread(
            target=lambda: (watch.wait_while_notified(until=lambda: False), over.set()), daemon=True
        )
        waiting.start()
        time.sleep(0.05)
        assert not over.is_set()
        server.leaving = False
        wait_for(over.is_set)


def test_a_driver_with_a_notice_asks_to_stop_and_has_the_clouds_time_for_it(
    server: MetadataServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.common.preemption._GRACE_SECONDS", {"gcp": 0.2})
    server.leaving = True
    asked = threading.Event()
    with stopping_in_order(asked.set, NoticeBoard(cloud="gcp", url=server.url)):
        assert asked.wait(10)
        with pytest.raises(TerminatedError):
            time.sleep(10)  # what a driver does whose workers do not come to an end


def test_a_driver_without_a_notice_is_left_alone(server: MetadataServer) -> None:
    asked = threading.Event()
    with stopping_in_order(asked.set, NoticeBoard(cloud="gcp", url=server.url)):
        wait_for(lambda: bool(server.asked))
    assert not asked.is_set()
    assert not any(thread.name == "preemption notice" for thread in threading.enumerate())


def test_nobody_looks_unless_asked_to() -> None:
    paths = {"lake": "lake", "output": "output"}
    assert ShardJobConfig(**paths).notice_board() is None
    board = ShardJobConfig(**paths, preemption_notice="azure").notice_board()
    assert board == NoticeBoard(cloud="azure", url=None)
    with pytest.raises(ValueError, match="--preemption-notice"):
        ShardJobConfig(**paths, metadata_url="http://127.0.0.1")
