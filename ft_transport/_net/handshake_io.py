"""A handshake under way on a socket that does not block.

Strategy: many at once in one thread, for both who dials and who listens: whichever socket is ready goes on by as much
as it can, and says what it waits for next. Once it is through, the socket is handed over and blocks from then on.

Not here: what is said (``_net.handshake``), and which sockets there are (``_net.dial``, ``_net.listener``).
"""

from __future__ import annotations

import os
import selectors
import socket
import ssl
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from ft_transport._deadline import Deadline
from ft_transport._net.connection import Connection

__all__ = ["HANDSHAKE", "SslContexts", "PendingHandshake"]

# A peer's handshake takes two round trips; what is not through by then is a stranger.
HANDSHAKE = timedelta(seconds=3)

# For listening, and for dialling.
SslContexts = tuple[ssl.SSLContext, ssl.SSLContext]


class PendingHandshake:
    """A handshake under way on a socket that does not block. Owns the socket until it is :meth:`taken`.

    Args:
        wrap: Makes it speak TLS once it is connected: the other way round it would take the socket for a broken one.

    Attributes:
        known: Whether the handshake has said anything; a listener's does to those alone who know the secret.
        result: What the handshake returned, once :meth:`advance` has given 0.
    """

    def __init__(
        self,
        sock: socket.socket,
        address: str,
        handshake: Any,
        limit: Deadline,
        connecting: bool,
        wrap: Callable[[socket.socket], ssl.SSLSocket] | None = None,
    ) -> None:
        self.address = address
        self.known = False
        self.result: Any = None
        # One deadline for all of it: a stranger that sends a byte now and then is never silent.
        self.limit = limit
        self.socket = sock
        self._connecting = connecting
        self._wrap = wrap
        self._shaken = wrap is None
        self._handshake = handshake
        self._incoming = bytearray()
        self._outgoing = b""
        self._needed = 0
        self._resume(None)

    def _resume(self, data: bytes | None) -> bool:
        """Give the handshake what it asked for; gives whether it wants more."""
        try:
            step = self._handshake.send(data)
        except StopIteration as stop:
            self.result = stop.value
            return False
        self._outgoing, self._needed = (step, 0) if isinstance(step, bytes) else (b"", step)
        self.known = self.known or bool(self._outgoing)
        return True

    def advance(self) -> int:
        """Go on as far as the socket allows; gives the selector's events to wait for, 0 at the end.

        Raises:
            RemoteProtocolError: It is no peer.
            OSError: The connection broke.
        """
        try:
            if self._connecting:
                self._check_connected()
            if self._wrap is not None:
                self.socket, self._wrap = self._wrap(self.socket), None
            if not self._shaken:
                assert isinstance(self.socket, ssl.SSLSocket)
                self.socket.do_handshake()
                self._shaken = True
            return self._advance()
        except (BlockingIOError, ssl.SSLWantReadError):
            # OpenSSL may want to read in order to write, and the other way round: what is waited for is what it says.
            return selectors.EVENT_WRITE if self._outgoing and self._shaken else selectors.EVENT_READ
        except ssl.SSLWantWriteError:
            return selectors.EVENT_WRITE

    def _check_connected(self) -> None:
        # Once it can be written to, a socket is connected or has failed, and only this tells which.
        error = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))
        self._connecting = False

    def _advance(self) -> int:
        while True:
            while self._outgoing:
                self._outgoing = self._outgoing[self.socket.send(self._outgoing) :]
            while len(self._incoming) < self._needed:
                # Never more than the handshake needs: what follows is not for it.
                data = self.socket.recv(self._needed - len(self._incoming))
                if not data:
                    raise ConnectionResetError("closed by the peer")
                self._incoming += data
            data, self._incoming = bytes(self._incoming), bytearray()
            if not self._resume(data):
                return 0

    def taken(self) -> Connection:
        """The connection, whose owner is the caller now."""
        return Connection(self.socket, self.address)
