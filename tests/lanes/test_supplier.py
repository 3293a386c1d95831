"""How long a supply waits for those who fetch from it."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
from helpers import pace

from ft_transport._deadline import Deadline
from ft_transport._lanes import supplier
from ft_transport._lanes.protocol import LaneFrame, LaneHeader, LaneProtocol, Role, encode
from ft_transport._lanes.session import Session
from ft_transport._lanes.supplier import Supplier
from ft_transport._net.connection import Connection
from ft_transport._net.one_sided import Endpoint
from ft_transport._net.stall import StallTimer
from ft_transport._plan.blocks import Held
from ft_transport._plan.buffers import Bucket
from ft_transport.errors import LocalProtocolError
from ft_transport.testing import FaultyFabric
from ft_transport.testing._fabric import _Transport

STALL = 0.6


class Empty:
    """A stock without messages."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.verified = self.steady = self.is_whole_transfer = False
        self.fabric = ""

    def has(self, message: int) -> bool:
        raise NotImplementedError

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
def lane() -> Iterator[tuple[socket.socket, Supplier]]:
    """A destination's end of a lane, and the supply that serves it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    supply = Supplier(Empty(), StallTimer(Deadline(timedelta(seconds=20)), timedelta(seconds=8)))
    supply.attach(Connection(ours, "peer"), LaneHeader(LaneFrame.ATTACH, 1, 7, 0, 0))
    with theirs:
        yield theirs, supply
        supply.close()


def test_the_stall_time_out_begins_when_somebody_waits(
    lane: tuple[socket.socket, Supplier], caplog: pytest.LogCaptureFixture
) -> None:
    destination, supply = lane
    pace(STALL + 0.1)
    leaving = threading.Timer(0.1, destination.close)
    leaving.start()
    with caplog.at_level(logging.WARNING, "ft_transport"):
        supply.drain()
    leaving.join()
    assert not caplog.records


def test_who_does_not_leave_is_not_waited_for(
    lane: tuple[socket.socket, Supplier], caplog: pytest.LogCaptureFixture
) -> None:
    _, supply = lane
    with caplog.at_level(logging.WARNING, "ft_transport"):
        supply.drain()
    assert "has not fetched everything from here, and stands still" in caplog.text


@pytest.mark.parametrize("number", [0, 1, (1 << 64) - 1])
def test_a_message_that_there_is_not_is_not_looked_for(
    lane: tuple[socket.socket, Supplier], caplog: pytest.LogCaptureFixture, number: int
) -> None:
    """The lane is closed; that is the peer's fault, and no trouble of this side."""
    destination, _ = lane
    destination.settimeout(10)
    with caplog.at_level(logging.WARNING, "ft_transport"):
        destination.sendall(encode(LaneFrame.WANT, 1, 7, number, [1]))
        assert destination.recv(1) == b""
    assert not caplog.records


def test_how_many_lanes_a_destination_may_open_is_bounded(
    lane: tuple[socket.socket, Supplier], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a thread."""
    first, supply = lane
    monkeypatch.setattr(supplier, "MAX_LANES", 2)
    peers = [first]
    with contextlib.ExitStack() as stack, socket.create_server(("127.0.0.1", 0)) as server:
        for _ in range(3):
            peers.append(stack.enter_context(socket.create_connection(server.getsockname())))
            supply.attach(Connection(server.accept()[0], "peer"), LaneHeader(LaneFrame.ATTACH, 1, 7, 0, 0))
        for peer in peers[2:]:
            peer.settimeout(3)
            assert peer.recv(1) == b""
        for peer in peers[:2]:
            with pytest.raises(BlockingIOError):
                peer.recv(1, socket.MSG_DONTWAIT)


class Large(Empty):
    """A stock of one message."""

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self.sizes = [nbytes]
        self._data = bytearray(nbytes)

    def has(self, message: int) -> bool:
        return True

    def await_message(self, message: int) -> bool:
        return True

    def view(self, message: int, bucket: Bucket) -> memoryview:
        return memoryview(self._data)

    def held(self, message: int) -> Held | None:
        return None

    def digest(self, message: int) -> int | None:
        return 0

    def note_digest(self, message: int, digest: int) -> None:
        pass


class Reading:
    """A destination's end of a lane whose supplier has a one-sided transport, by which it asks to read."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.connection = Connection(socket.create_connection(server.getsockname()), "supplier")
            theirs = Connection(server.accept()[0], "peer")
        store = Large(1)
        store.fabric = "faulty"
        self.timer = StallTimer(Deadline(timedelta(seconds=20)))
        self.supply = Supplier(store, self.timer)
        self.supply.attach(theirs, LaneHeader(LaneFrame.ATTACH, 1, 7, 0, 0))
        self.session = Session(self.connection, LaneProtocol(Role.DESTINATION, 1, 7))
        self.session.protocol.sent(LaneFrame.ATTACH)
        self.endpoint = Endpoint("faulty")
        bound = self.endpoint.bind()
        assert bound.done.wait(10)
        self.hello = bound.result()

    def locate(self, fabric: str = "faulty", hello: bytes = b"") -> bytes:
        """Ask to read, and give the answer."""
        self.session.send(LaneFrame.LOCATE, self.timer, body=[fabric, hello or self.hello])
        while (heard := self.session.recv(self.timer))[0].frame is LaneFrame.WAIT:
            pass
        return bytes(heard[1][0])

    def close(self) -> None:
        self.connection.close()
        self.endpoint.close()
        self.supply.close()


@pytest.fixture
def reading(fabric: FaultyFabric) -> Iterator[Reading]:
    made = Reading()
    yield made
    made.close()


def test_that_this_side_lives_is_no_progress_of_who_has_stopped(
    reading: Reading, caplog: pytest.LogCaptureFixture
) -> None:
    """Its system takes what is said to it, as long as there is room."""
    assert reading.locate()
    reading.session.send(LaneFrame.DIRECT, reading.timer)
    with caplog.at_level(logging.WARNING, "ft_transport"):
        reading.supply.drain()
    assert "stands still" in caplog.text


@pytest.mark.parametrize(("name", "hello"), [("other", b""), ("cma", b"t" * 16), ("faulty", b"[1]"), ("faulty", b"x")])
def test_nonsense_in_the_place_of_an_end_to_connect_to_shows_nothing(
    reading: Reading, fabric: FaultyFabric, name: str, hello: bytes
) -> None:
    """The lane goes on: what is asked for is sent."""
    assert reading.locate(name, hello) == b""
    assert Deadline(timedelta(seconds=10)).poll(lambda: fabric.num_open == 1)
    reading.session.send(LaneFrame.WANT, reading.timer, 0, [1])
    while (header := reading.session.recv_header(reading.timer)).frame is LaneFrame.WAIT:
        pass
    assert header.frame is LaneFrame.MESSAGE


def test_who_asks_for_a_fabric_again_and_again_has_one_endpoint(
    reading: Reading, fabric: FaultyFabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a thread, and a backend's memory. That one takes its time to close does not make it many."""
    close = _Transport.close
    monkeypatch.setattr(_Transport, "close", lambda self, *, timeout: (pace(0.1), close(self, timeout=timeout)))
    for number in range(1, 4):
        assert reading.locate()
        assert (fabric.num_made, fabric.num_open) == (1 + number, 2)


@pytest.mark.parametrize("frozen", [False, True], ids=["slow", "frozen"])
def test_who_reads_slowly_is_waited_for_and_who_has_stopped_is_not(
    frozen: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """In the middle of a message, which no buffer holds, and whatever the stall time-out."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
    supply = Supplier(Large(2 << 20), StallTimer(Deadline(timedelta(seconds=60)), timedelta(seconds=8)))
    supply.attach(Connection(ours, "peer"), LaneHeader(LaneFrame.ATTACH, 1, 7, 0, 0))
    theirs.sendall(encode(LaneFrame.WANT, 1, 7, 0, [1]))
    heard = 0

    def read() -> None:
        nonlocal heard
        while heard < (1 << 20 if frozen else 2 << 20):
            heard += len(theirs.recv(64 << 10))
            if not frozen:
                pace(0.03)
        if not frozen:
            theirs.close()

    reading = threading.Thread(target=read)
    reading.start()
    if frozen:
        reading.join()
    with theirs:
        begin = time.monotonic()
        with caplog.at_level(logging.WARNING, "ft_transport"):
            supply.drain()
        assert ("stands still" in caplog.text) is frozen
        assert time.monotonic() - begin < 30
        reading.join()
        supply.close()
