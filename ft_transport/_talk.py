"""One side of a conversation over a connection: frames and messages, held to the table as they pass."""

from __future__ import annotations

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

# A message moves in pieces of this size, each of which is fingerprinted while it is in the processor's cache.
_PIECE_BYTES = 1 << 20


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

    def say_message(self, number: int, view: memoryview, digest: int | None, patience: Patience) -> int:
        """Send a message and then its digest, which is taken on the way where it is not known yet; gives the digest.

        Raises:
            PeerFailure, TransferTimeout: As ``Connection.write``.
        """
        conversation = self.conversation
        conversation.sent(Frame.MESSAGE, number)
        header = Header(Frame.MESSAGE, conversation.attempt, conversation.step, number, len(view))
        parts: list[bytes | memoryview] = [encode_header(header)]
        if digest is None:
            hashed = xxhash.xxh3_64()
            for begin in range(0, len(view), _PIECE_BYTES):
                piece = view[begin : begin + _PIECE_BYTES]
                hashed.update(piece)
                if begin:
                    self.connection.write(parts, patience)
                    parts = []
                parts.append(piece)
            digest = hashed.intdigest()
        else:
            parts.append(view)
        self.connection.write([*parts, TRAILER.pack(digest)], patience)
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
        for begin in range(0, len(view), _PIECE_BYTES):
            piece = view[begin : begin + _PIECE_BYTES]
            self.connection.read_into(piece, patience)
            if verify:
                hashed.update(piece)
        (expected,) = TRAILER.unpack(self.connection.read(TRAILER.size, patience))
        return expected if not verify or hashed.intdigest() == expected else None


def fingerprint(view: memoryview) -> int:
    """The digest that :meth:`Talk.say_message` would send."""
    return xxhash.xxh3_64_intdigest(view)
