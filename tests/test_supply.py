"""How long a supply waits for those who fetch from it."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest

from ft_transport._conversation import Frame, Header
from ft_transport._deadline import Deadline
from ft_transport._lanes import Connection, Patience
from ft_transport._memory import Bucket, Held
from ft_transport._supply import Supply
from ft_transport.errors import LocalProtocolError

STALL = 0.6


class Empty:
    """A stock without messages."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.verified = self.steady = self.is_whole_offer = False

    def await_message(self, message: int) -> bool:
        raise NotImplementedError

    def view(self, message: int, bucket: Bucket) -> memoryview:
        raise NotImplementedError

    def held(self, message: int) -> Held | None:
        raise NotImplementedError

    def note_error(self, error: LocalProtocolError) -> None:
        raise NotImplementedError

    def digest(self, message: int) -> int | None:
        raise NotImplementedError

    def note_digest(self, message: int, digest: int) -> None:
        raise NotImplementedError


@pytest.fixture
def lane() -> Iterator[tuple[socket.socket, Supply]]:
    """A destination's end of a lane, and the supply that serves it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    supply = Supply(Empty(), Patience(Deadline(timedelta(seconds=20)), timedelta(seconds=STALL)))
    supply.attach(Connection(ours, "peer"), Header(Frame.ATTACH, 1, 7, 0, 0))
    with theirs:
        yield theirs, supply
        supply.close()


def test_the_stall_time_out_begins_when_somebody_waits(
    lane: tuple[socket.socket, Supply], caplog: pytest.LogCaptureFixture
) -> None:
    destination, supply = lane
    time.sleep(STALL + 0.1)
    leaving = threading.Timer(0.3, destination.close)
    leaving.start()
    with caplog.at_level(logging.WARNING, "ft_transport"):
        supply.drain()
    leaving.join()
    assert not caplog.records


def test_who_does_not_leave_is_not_waited_for(
    lane: tuple[socket.socket, Supply], caplog: pytest.LogCaptureFixture
) -> None:
    _, supply = lane
    with caplog.at_level(logging.WARNING, "ft_transport"):
        supply.drain()
    assert "has not fetched everything from here: the peer has been silent" in caplog.text
