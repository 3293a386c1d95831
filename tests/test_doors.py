"""What a listener makes of the connections that it lets in."""

from __future__ import annotations

import contextlib
import queue
import secrets
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import cast

import pytest

from ft_transport import _doors
from ft_transport._conversation import Frame, encode
from ft_transport._deadline import Deadline
from ft_transport._doors import Listener, dial
from ft_transport._lanes import Connection, Patience
from ft_transport._meeting import Invitation, knock

TIMEOUT = timedelta(seconds=10)
HELLO = encode(Frame.HELLO, 1, 7, 0, [b"i" * 16, "name"])


def congestion_control(sock: socket.socket) -> bytes:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")


@pytest.fixture(params=[b"bbr", b"cubic"], ids=["BBR", "cubic"])
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """What the system has chosen for every socket: here, for those that listen."""
    listen = _doors._listen
    name: bytes = request.param

    def listen_so(port: int) -> socket.socket:
        sock = listen(port)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name)
        except OSError:
            sock.close()
            pytest.skip(f"this system has no {name.decode()}, or does not let one choose it")
        return sock

    monkeypatch.setattr(_doors, "_listen", listen_so)
    return name


@pytest.fixture
def welcome() -> queue.SimpleQueue[Connection]:
    """The listener's ends of the connections that it has let in."""
    return queue.SimpleQueue()


@pytest.fixture
def invitation(welcome: queue.SimpleQueue[Connection]) -> Iterator[Invitation]:
    """To a listener on this machine."""
    secret = secrets.token_bytes(32)
    listener = Listener(secret, 0, None, lambda connection, _: welcome.put(connection), lambda: None)
    try:
        yield Invitation(("127.0.0.1",), listener.port, secret, False)
    finally:
        listener.close()
        listener.join()


@pytest.fixture
def let_in(invitation: Invitation, welcome: queue.SimpleQueue[Connection]) -> Iterator[Connection]:
    """A listener's end of a connection, from this machine."""
    with (
        contextlib.closing(dial(invitation, HELLO, Patience(Deadline(TIMEOUT)), None)),
        contextlib.closing(welcome.get(timeout=TIMEOUT.total_seconds())) as connection,
    ):
        yield connection


def test_nothing_paces_what_stays_on_the_machine(chosen: bytes, let_in: Connection) -> None:
    assert congestion_control(let_in._socket) == (b"reno" if chosen == b"bbr" else chosen)


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_doors, "is_near", lambda sock: False)


def test_a_network_is_treated_as_the_system_has_chosen(chosen: bytes, far: None, let_in: Connection) -> None:
    assert congestion_control(let_in._socket) == chosen


def test_strangers_do_not_crowd_out_who_knows_the_secret(
    invitation: Invitation, welcome: queue.SimpleQueue[Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_doors, "_MAX_HANDSHAKES", 4)
    with contextlib.ExitStack() as stack:

        def connect() -> socket.socket:
            return stack.enter_context(socket.create_connection(("127.0.0.1", invitation.port), timeout=10))

        peer, knocking = connect(), knock(invitation.secret)
        peer.sendall(cast(bytes, next(knocking)))
        answer = peer.recv(cast(int, next(knocking)), socket.MSG_WAITALL)
        strangers = [connect() for _ in range(20)]
        assert strangers[0].recv(1) == b""
        peer.sendall(cast(bytes, knocking.send(answer)) + HELLO)
        with contextlib.closing(welcome.get(timeout=TIMEOUT.total_seconds())) as connection:
            assert connection.address == "127.0.0.1"
