"""A handshake that goes on as far as its socket allows, and reads not a byte beyond it."""

from __future__ import annotations

import contextlib
import selectors
import socket
from collections.abc import Generator, Iterator
from datetime import timedelta
from typing import Any

import pytest

from ft_transport._deadline import Deadline
from ft_transport._net.handshake_io import HANDSHAKE, PendingHandshake


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def greeting(sock: socket.socket, handshake: Generator[Any, Any, Any]) -> PendingHandshake:
    return PendingHandshake(sock, "peer", handshake, Deadline(HANDSHAKE), connecting=False)


def test_it_stops_where_the_socket_has_no_more_and_goes_on_from_there(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    heard: list[bytes] = []

    def handshake() -> Generator[Any, Any, str]:
        heard.append((yield 4))
        yield b"welcome"
        heard.append((yield 3))
        return "done"

    made = greeting(ours, handshake())
    assert made.advance() == selectors.EVENT_READ
    theirs.sendall(b"he")
    assert made.advance() == selectors.EVENT_READ
    assert heard == []
    assert not made.known, "it has said nothing yet, so whoever is there may be a stranger"
    theirs.sendall(b"lloxyz behind")
    assert made.advance() == 0
    assert heard == [b"hell", b"oxy"]
    assert made.known
    assert made.result == "done"
    assert theirs.recv(100) == b"welcome"
    assert ours.recv(100) == b"z behind", "what follows is not for the handshake"


def test_what_does_not_fit_into_the_socket_waits(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair

    def handshake() -> Generator[Any, Any, None]:
        yield bytes(8 << 20)

    made, nbytes = greeting(ours, handshake()), 0
    assert made.advance() == selectors.EVENT_WRITE
    while made.advance() != 0:
        nbytes += len(theirs.recv(1 << 20))
    theirs.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while data := theirs.recv(1 << 20):
            nbytes += len(data)
    assert nbytes == 8 << 20


def test_a_peer_that_closes(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair

    def handshake() -> Generator[Any, Any, None]:
        yield 4

    made = greeting(ours, handshake())
    theirs.sendall(b"abc")
    theirs.close()
    with pytest.raises(ConnectionResetError, match="closed by the peer"):
        made.advance()


def test_a_connection_that_is_refused_is_an_error_of_the_system() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
    with socket.socket() as sock:
        sock.setblocking(False)
        assert sock.connect_ex(address) != 0
        with selectors.DefaultSelector() as selector:
            selector.register(sock, selectors.EVENT_WRITE)
            assert selector.select(10)

        def handshake() -> Generator[Any, Any, None]:
            yield b"hello"

        made = PendingHandshake(sock, "peer", handshake(), Deadline(timedelta(seconds=3)), connecting=True)
        with pytest.raises(ConnectionRefusedError):
            made.advance()
