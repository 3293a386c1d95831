"""One side of a conversation over a connection: frames and messages, held to the table as they pass."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any

import xxhash

from ft_transport._conversation import (
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
from ft_transport._lanes import Connection, Patience
from ft_transport.errors import RemoteProtocolError

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
        self, number: int, view: memoryview, digest: int | None, patience: Patience, *, steady: bool = False
    ) -> int:
        """Send a message and then its digest, which is taken on the way where it is not known yet; gives the digest.

        Args:
            steady: Whether the memory stays as it is until the peer has it: then it is not copied.

        Raises:
            PeerFailure, TransferTimeout: As ``Connection.write``.
        """
        conversation, connection = self.conversation, self.connection
        conversation.sent(Frame.MESSAGE, number)
        header = Header(Frame.MESSAGE, conversation.attempt, conversation.step, number, len(view))
        connection.write([encode_header(header)], patience, more=True)
        hashed = xxhash.xxh3_64()
        for piece in _pieces(view, whole=digest is not None):
            if digest is None:
                hashed.update(piece)
            if steady:
                connection.write_steady(piece, patience)
            else:
                connection.write([piece], patience, more=True)
        digest = hashed.intdigest() if digest is None else digest
        connection.write([TRAILER.pack(digest)], patience)
        return digest

    def hear_message(self, header: Header, view: memoryview, *, verify: bool, patience: Patience) -> int | None:
        """Receive a message, whose header is here already, into ``view``; gives its digest, None if it came damaged.

        Raises:
            RemoteProtocolError: It is of another length.
            PeerFailure, TransferTimeout: As ``Connection.read_into``.
        After an error: ``view`` holds some, all or none of it.
        """
        if header.nbytes != len(view):
            raise RemoteProtocolError(f"message {header.number}: expected {len(view)} bytes, got {header.nbytes}")
        hashed = xxhash.xxh3_64()
        for piece in _pieces(view, whole=not verify):
            self.connection.read_into(piece, patience)
            if verify:
                hashed.update(piece)
        (expected,) = TRAILER.unpack(self.connection.read(TRAILER.size, patience))
        return expected if not verify or hashed.intdigest() == expected else None


def _pieces(view: memoryview, *, whole: bool) -> Iterator[memoryview]:
    step = len(view) if whole else _PIECE_BYTES
    return (view[begin : begin + step] for begin in range(0, len(view), step or 1))


def fingerprint(view: memoryview) -> int:
    """The digest that :meth:`Talk.say_message` would send."""
    return xxhash.xxh3_64_intdigest(view)
