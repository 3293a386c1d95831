"""What a listener makes of the connections that it lets in."""

from __future__ import annotations

import contextlib
import logging
import queue
import secrets
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, cast

import pytest

from ft_transport._deadline import Deadline
from ft_transport._lanes.protocol import LaneFrame, LaneHeader, encode, encode_header, first_frame
from ft_transport._net import handshake_io as _handshake_io
from ft_transport._net import listener as _listener
from ft_transport._net.connection import Connection
from ft_transport._net.dial import dial
from ft_transport._net.endpoint import Endpoint
from ft_transport._net.handshake import client_handshake
from ft_transport._net.listener import Listener
from ft_transport._net.stall import StallTimer
from ft_transport._wire.digest import digest_bytes

TIMEOUT = timedelta(seconds=10)
HELLO = encode(LaneFrame.HELLO, 1, 7, 0, [b"i" * 16, "name"])


def congestion_control(sock: socket.socket) -> bytes:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")


@pytest.fixture(params=[b"bbr", b"cubic"], ids=["BBR", "cubic"])
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """What the system has chosen for every socket: here, for those that listen."""
    listen = _listener._listen
    name: bytes = request.param

    def listen_so(port: int) -> socket.socket:
        sock = listen(port)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name)
        except OSError:
            sock.close()
            pytest.skip(f"this system has no {name.decode()}, or does not let one choose it")
        return sock

    monkeypatch.setattr(_listener, "_listen", listen_so)
    return name


@pytest.fixture
def dispatch() -> queue.SimpleQueue[Connection]:
    """The listener's ends of the connections that it has let in."""
    return queue.SimpleQueue()


@pytest.fixture
def endpoint(dispatch: queue.SimpleQueue[Connection]) -> Iterator[Endpoint]:
    """To a listener on this machine."""
    secret = secrets.token_bytes(32)
    listener = Listener(secret, 0, None, first_frame, lambda connection, _: dispatch.put(connection), lambda: None)
    try:
        yield Endpoint(("127.0.0.1",), listener.port, secret, False)
    finally:
        listener.close()
        listener.join()


@pytest.fixture
def let_in(endpoint: Endpoint, dispatch: queue.SimpleQueue[Connection]) -> Iterator[Connection]:
    """A listener's end of a connection, from this machine."""
    with (
        contextlib.closing(dial(endpoint, HELLO, StallTimer(Deadline(TIMEOUT)), None)),
        contextlib.closing(dispatch.get(timeout=TIMEOUT.total_seconds())) as connection,
    ):
        yield connection


def test_nothing_paces_what_stays_on_the_machine(chosen: bytes, let_in: Connection) -> None:
    assert congestion_control(let_in._socket) == (b"reno" if chosen == b"bbr" else chosen)


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_listener, "is_local", lambda sock: False)


def test_a_network_is_treated_as_the_system_has_chosen(chosen: bytes, far: None, let_in: Connection) -> None:
    assert congestion_control(let_in._socket) == chosen


def test_strangers_do_not_crowd_out_who_knows_the_secret(
    endpoint: Endpoint, dispatch: queue.SimpleQueue[Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_listener, "_MAX_HANDSHAKES", 4)
    with contextlib.ExitStack() as stack:

        def connect() -> socket.socket:
            return stack.enter_context(socket.create_connection(("127.0.0.1", endpoint.port), timeout=10))

        peer, knocking = connect(), client_handshake(endpoint.secret)
        peer.sendall(cast(bytes, next(knocking)))
        answer = peer.recv(cast(int, next(knocking)), socket.MSG_WAITALL)
        strangers = [connect() for _ in range(20)]
        assert strangers[0].recv(1) == b""
        peer.sendall(cast(bytes, knocking.send(answer)) + HELLO)
        with contextlib.closing(dispatch.get(timeout=TIMEOUT.total_seconds())) as connection:
            assert connection.address == "127.0.0.1"


def call(endpoint: Endpoint, first: bytes) -> socket.socket:
    """A peer that has shown that it knows the secret, and has sent its first frame."""
    peer, knocking = (
        socket.create_connection(("127.0.0.1", endpoint.port), timeout=10),
        client_handshake(endpoint.secret),
    )
    peer.sendall(cast(bytes, next(knocking)))
    answer = peer.recv(cast(int, next(knocking)), socket.MSG_WAITALL)
    peer.sendall(cast(bytes, knocking.send(answer)) + first)
    return peer


def nested(frame: LaneFrame, depth: int) -> bytes:
    body = b"\x91" * depth + b"\xc0"
    return encode_header(LaneHeader(frame, 1, 7, 0, len(body), digest_bytes(body))) + body


@pytest.mark.parametrize("depth", [500, 1010, 2000])
@pytest.mark.parametrize("frame", [LaneFrame.HELLO, LaneFrame.ATTACH], ids=lambda frame: frame.name)
def test_a_first_frame_that_nests_ends_its_connection_alone(
    endpoint: Endpoint, dispatch: queue.SimpleQueue[Connection], frame: LaneFrame, depth: int
) -> None:
    with call(endpoint, nested(frame, depth)) as peer:
        assert peer.recv(1) == b""
    with call(endpoint, HELLO), contextlib.closing(dispatch.get(timeout=TIMEOUT.total_seconds())):
        pass


def test_no_exception_ends_the_listener(
    endpoint: Endpoint, dispatch: queue.SimpleQueue[Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a handshake, in a welcome, and in what the log makes of it."""

    def broken(secret: bytes) -> Any:
        yield 1
        raise ArithmeticError("on purpose")

    def no_connection(sock: socket.socket, address: str) -> Connection:
        raise ArithmeticError("on purpose")

    class Filter(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            raise ArithmeticError("on purpose, too")

    logger, theirs = logging.getLogger("ft_transport"), Filter()
    logger.addFilter(theirs)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(_listener, "server_handshake", broken)
            with socket.create_connection(("127.0.0.1", endpoint.port), timeout=10) as peer:
                peer.sendall(b"x")
                assert peer.recv(1) == b""
        with monkeypatch.context() as patch:
            patch.setattr(_handshake_io, "Connection", no_connection)
            with call(endpoint, HELLO) as peer:
                assert peer.recv(1) == b""
    finally:
        logger.removeFilter(theirs)
    with call(endpoint, HELLO), contextlib.closing(dispatch.get(timeout=TIMEOUT.total_seconds())):
        pass
