"""The handshake, without a socket."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_transport._lanes.protocol import FirstFrame, LaneFrame, encode, first_frame
from ft_transport._net.handshake import client_handshake, server_handshake
from ft_transport.errors import RemoteProtocolError

SECRET = bytes(range(32))
HELLO = encode(LaneFrame.HELLO, 1, 7, 0, [b"i" * 16, "name"])


# ----------------------------------------------------------------------------------------- handshake


class Side:
    """One side of a handshake, fed with bytes in pieces of any size."""

    def __init__(self, handshake: Generator[Any, bytes, Any]) -> None:
        self.sent = b""
        self.result: Any = None
        self.over = False
        self._handshake = handshake
        self._needed = 0
        self._incoming = b""
        self._go_on(None)

    def _go_on(self, data: bytes | None) -> None:
        try:
            step = self._handshake.send(data)  # type: ignore[arg-type]
            while isinstance(step, bytes):
                self.sent += step
                step = self._handshake.send(b"")
            self._needed = step
        except StopIteration as stop:
            self.over, self.result = True, stop.value

    def feed(self, data: bytes) -> int:
        """Take what the handshake wants of the data; gives how much that was."""
        taken = 0
        while not self.over and taken + self._needed - len(self._incoming) <= len(data):
            end = taken + self._needed - len(self._incoming)
            whole, self._incoming = self._incoming + data[taken:end], b""
            taken = end
            self._go_on(whole)
        if not self.over:
            self._incoming += data[taken:]
            taken = len(data)
        return taken

    def take(self) -> bytes:
        sent, self.sent = self.sent, b""
        return sent


def listening_side(secret: bytes) -> Generator[Any, bytes, FirstFrame]:
    """As the listener runs it."""
    yield from server_handshake(secret)
    return (yield from first_frame())


def meet(dialling: bytes, listening: bytes, piece: int) -> tuple[Side, Side]:
    """Run both sides against each other, so many bytes at a time."""
    caller, listener = Side(client_handshake(dialling)), Side(listening_side(listening))
    for _ in range(3):
        for sender, receiver in ((caller, listener), (listener, caller)):
            data = sender.take()
            for begin in range(0, len(data), piece):
                receiver.feed(data[begin : begin + piece])
    return caller, listener


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_handshake(piece: int) -> None:
    caller, listener = meet(SECRET, SECRET, piece)
    assert caller.over
    assert not listener.over
    for begin in range(0, len(HELLO), piece):
        listener.feed(HELLO[begin : begin + piece])
    assert isinstance(listener.result, FirstFrame)
    assert listener.result.body == (b"i" * 16, "name")
    assert listener.result.header.step == 7


def test_what_follows_the_handshake_is_left_alone() -> None:
    caller, listener = meet(SECRET, SECRET, 1000)
    assert listener.feed(HELLO + b"the next frame") == len(HELLO)
    assert caller.over


def test_a_stranger_gets_no_byte() -> None:
    *begin, last = knock_bytes(SECRET)
    for wrong in (b"\0" * 75, bytes([*begin, last ^ 1]), b"GET / HTTP/1.1\r\n" * 10, knock_bytes(b"x" * 32)):
        listener = Side(listening_side(SECRET))
        with pytest.raises(RemoteProtocolError, match="a stranger"):
            listener.feed(wrong)
        assert listener.sent == b""


def knock_bytes(secret: bytes) -> bytes:
    return Side(client_handshake(secret)).take()


def test_a_recorded_knock_does_not_enter() -> None:
    caller, first = Side(client_handshake(SECRET)), Side(listening_side(SECRET))
    recorded = caller.take()
    first.feed(recorded)
    caller.feed(first.take())
    entering = caller.take()
    second = Side(listening_side(SECRET))
    second.feed(recorded)
    with pytest.raises(RemoteProtocolError, match="heard somebody else knock"):
        second.feed(entering)


def test_a_listener_without_the_secret_is_found() -> None:
    caller = Side(client_handshake(SECRET))
    with pytest.raises(RemoteProtocolError, match="does not know the secret"):
        caller.feed(b"\0" * 64)


@given(st.integers(0, 8 * 75 - 1))
def test_any_flipped_bit_makes_a_stranger(bit: int) -> None:
    knocked = bytearray(knock_bytes(SECRET))
    knocked[bit // 8] ^= 1 << bit % 8
    with pytest.raises(RemoteProtocolError):
        Side(listening_side(SECRET)).feed(bytes(knocked))


@pytest.mark.parametrize(
    "first",
    [encode(LaneFrame.DONE, 1, 7), encode(LaneFrame.HELLO, 1, 7, 0, [b"i" * 16, "n" * 5000])],
    ids=["DONE", "long"],
)
def test_only_small_first_frames_are_read(first: bytes) -> None:
    _, listener = meet(SECRET, SECRET, 1000)
    with pytest.raises(RemoteProtocolError, match="cannot come first"):
        listener.feed(first)
