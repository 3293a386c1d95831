"""One side of a conversation over a connection: frames and messages, held to the table as they pass."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from typing import Any

import xxhash

from ft_transport._lanes.protocol import (
    HEADER_BYTES,
    TRAILER,
    Conversation,
    Frame,
    Header,
    decode_body,
    decode_header,
    encode,
    encode_header,
)
from ft_transport._net.connection import Connection
from ft_transport._net.stall import Patience
from ft_transport._plan.blocks import Held
from ft_transport.errors import PeerFailure, RemoteProtocolError

__all__ = ["Talk", "fingerprint"]

# A message moves in pieces of this size, each of which is fingerprinted while it is in the processor's cache. Wherever
# one begins, its pages fit into a pipe of 1 MiB.
_PIECE_BYTES = (1 << 20) - mmap.PAGESIZE


class Talk:
    """A connection and where the conversation on it is.

    Args:
        connection: To the peer.
        conversation: New, or as far as it has come.
    """

    def __init__(self, connection: Connection, conversation: Conversation) -> None:
        self.connection = connection
        self.conversation = conversation

    def say(self, frame: Frame, patience: Patience, number: int = 0, body: Any = None) -> None:
        """Send a frame; raises as ``Connection.write``."""
        conversation = self.conversation
        conversation.sent(frame, number)
        self.connection.write([encode(frame, conversation.attempt, conversation.step, number, body)], patience)

    def hear(self, patience: Patience) -> tuple[Header, Any]:
        """The next frame, which must not be a message, and its body.

        Raises:
            RemoteProtocolError: It is damaged or out of order.
            PeerFailure, TransferTimeout: As ``Connection.read_into``.
        """
        header = self.hear_header(patience)
        if header.frame is Frame.MESSAGE:
            raise RemoteProtocolError(f"message {header.number} is out of order")
        return header, self.hear_body(header, patience)

    def hear_body(self, header: Header, patience: Patience) -> Any:
        """The body of a frame whose header is here already; raises as :meth:`hear`."""
        return decode_body(header, bytes(self.connection.read(header.nbytes, patience)))

    def hear_header(self, patience: Patience) -> Header:
        """The next frame's header; raises as :meth:`hear`."""
        header = decode_header(self.connection.read(HEADER_BYTES, patience))
        self.conversation.received(header)
        return header

    def say_message(
        self,
        number: int,
        view: memoryview,
        digest: int | None,
        patience: Patience,
        *,
        steady: bool = False,
        held: Held | None = None,
    ) -> int:
        """Send a message and then its digest, which is taken on the way where it is not known yet; gives the digest.

        Args:
            steady: Whether the memory stays as it is until the peer has it: then it is not copied.
            held: What ``view`` is of, if it is of a user's memory.

        Raises:
            LocalProtocolError: That memory was taken away.
            PeerFailure, TransferTimeout: As ``Connection.write``.
        """
        conversation, connection = self.conversation, self.connection
        conversation.sent(Frame.MESSAGE, number)
        header = Header(Frame.MESSAGE, conversation.attempt, conversation.step, number, len(view))
        connection.write([encode_header(header)], patience, more=True)
        hashed = xxhash.xxh3_64()
        update = _reads(hashed, held)
        for piece in _pieces(view, whole=digest is not None):
            if digest is None:
                update(piece)
            try:
                if steady:
                    connection.write_steady(piece, patience)
                else:
                    connection.write([piece], patience, more=True)
            except PeerFailure:
                _check(held)  # the system cannot read what is not there either
                raise
        _check(held)
        digest = hashed.intdigest() if digest is None else digest
        connection.write([TRAILER.pack(digest)], patience)
        return digest

    def hear_message(
        self, header: Header, view: memoryview, *, verify: bool, patience: Patience, held: Held | None = None
    ) -> int | None:
        """Receive a message, whose header is here already, into ``view``; gives its digest, None if it came damaged.

        Args:
            held: What ``view`` is of, if it is of a user's memory.

        Raises:
            LocalProtocolError: That memory was taken away.
            RemoteProtocolError: It is of another length.
            PeerFailure, TransferTimeout: As ``Connection.read_into``.
        After an error: ``view`` holds some, all or none of it.
        """
        if header.nbytes != len(view):
            raise RemoteProtocolError(f"message {header.number}: expected {len(view)} bytes, got {header.nbytes}")
        hashed = xxhash.xxh3_64()
        update = _reads(hashed, held)
        for piece in _pieces(view, whole=not verify):
            try:
                self.connection.read_into(piece, patience)
            except PeerFailure:
                _check(held)
                raise
            if verify:
                update(piece)
        _check(held)
        (expected,) = TRAILER.unpack(self.connection.read(TRAILER.size, patience))
        return expected if not verify or hashed.intdigest() == expected else None


def _pieces(view: memoryview, *, whole: bool) -> Iterator[memoryview]:
    step = len(view) if whole else _PIECE_BYTES
    return (view[begin : begin + step] for begin in range(0, len(view), step or 1))


def _check(held: Held | None) -> None:
    if held is not None:
        held.check()


def _reads(hashed: xxhash.xxh3_64, held: Held | None) -> Callable[[memoryview], object]:
    return hashed.update if held is None else held.reads(hashed.update)


def fingerprint(view: memoryview, held: Held | None = None) -> int:
    """The digest that :meth:`Talk.say_message` would send; raises as it."""
    hashed = xxhash.xxh3_64()
    update = _reads(hashed, held)
    for piece in _pieces(view, whole=held is None):
        update(piece)
    return hashed.intdigest()
