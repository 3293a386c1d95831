"""Connects to whoever has given its metadata, over the first of its addresses that answers.

Strategy: a machine has several addresses, and from here perhaps none but the last can be reached, while the others
swallow what is sent to them. So they are tried side by side, each a moment after the one before ("happy eyeballs", RFC
8305): the first is not waited for, and not overtaken without reason. An address counts as one that answers when the
handshake is through, since somebody else may listen there.
"""

from __future__ import annotations

import logging
import selectors
import socket
from datetime import timedelta
from functools import partial

from ft_transport._deadline import Deadline
from ft_transport._net.connection import Connection, Wakeup
from ft_transport._net.endpoint import Endpoint
from ft_transport._net.handshake import Handshake, client_handshake
from ft_transport._net.handshake_io import HANDSHAKE, PendingHandshake, SslContexts
from ft_transport._net.stall import HEARTBEAT, StallTimer
from ft_transport.errors import PeerFailure, RemoteProtocolError, refused_for_good

__all__ = ["dial"]

logger = logging.getLogger("ft_transport")

# The next address is tried when the one before has not answered for so long, or has failed.
# RFC 8305 has 250 ms, for round trips of the Internet; within a cluster one takes less than a millisecond, and a
# training job waits.
_STAGGER = timedelta(milliseconds=100)


def dial(
    endpoint: Endpoint,
    first: bytes,
    timer: StallTimer,
    contexts: SslContexts | None,
    label: str = "the source",
    wakeup: Wakeup | None = None,
) -> Connection:
    """Connect to whoever is at an endpoint, over the first of its addresses that answers.

    Args:
        endpoint: Its addresses are tried side by side, each a moment after the one before.
        first: The first frame, sent at once.
        timer: For all of it.
        contexts: For TLS.
        label: Who is called, for messages.
        wakeup: Rung by who has cancelled the timer.

    Raises:
        PeerFailure: None answers, or the timer was cancelled.
        RemoteProtocolError: One side speaks TLS and the other does not, or the secret is another one.
        TransferTimeout: The deadline passed.
    """
    # Said here, where it can be named: to a listener that expects the other, the first bytes are a stranger's, and it
    # closes without a word.
    if endpoint.tls != (contexts is not None):
        raise refused_for_good(
            f"{label} {'speaks' if endpoint.tls else 'does not speak'} TLS and this side "
            f"{'does' if contexts else 'does not'}: give both an ssl_context, or neither"
        )
    calls = HappyEyeballs(endpoint, contexts, label, wakeup)
    try:
        connection = calls.answered(timer)
    finally:
        calls.close()
    try:
        connection.write([first], timer)
    except BaseException:
        connection.close()
        raise
    return connection


class HappyEyeballs:
    """Calls under way to the addresses of one endpoint."""

    def __init__(
        self, endpoint: Endpoint, contexts: SslContexts | None, label: str, wakeup: Wakeup | None = None
    ) -> None:
        self._endpoint = endpoint
        self._context = contexts[1] if contexts else None
        self._label = label
        self._rest = list(endpoint.addresses)
        self._failed: list[str] = []
        self._selector = selectors.PollSelector()  # which takes no descriptor
        self._calls: set[PendingHandshake] = set()
        if wakeup is not None:
            self._selector.register(wakeup, selectors.EVENT_READ)

    def answered(self, timer: StallTimer) -> Connection:
        stagger = Deadline(timedelta(0))
        while True:
            if self._rest and (not self._calls or stagger.expired()):
                # Also at once, when all that were tried have failed: nothing is waited for then.
                stagger = Deadline(_STAGGER)
                self._start(self._rest.pop(0))
            elif not self._calls:
                raise PeerFailure(f"{self._label} does not answer: {'; '.join(self._failed)}")
            limit = min(HEARTBEAT, timer.deadline.remaining(), *([stagger.remaining()] if self._rest else []))
            for key, _ in self._selector.select(limit.total_seconds()):
                pending: PendingHandshake | None = key.data
                if pending is not None and self._advance(pending):
                    self._forget(pending)
                    return pending.taken()
            timer.check()

    def _start(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock: socket.socket | None = None
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.setblocking(False)
            # It is under way when this returns (EINPROGRESS); how it ended is asked once the socket can be written to.
            sock.connect_ex((address, self._endpoint.port))
        except OSError as exc:
            self._failed.append(f"{address}: {exc}")
            if sock is not None:
                sock.close()
            return
        handshake: Handshake = client_handshake(self._endpoint.secret)
        wrap = None
        if self._context is not None:
            # Metadata has addresses and no names: a certificate that is checked for its name must have them
            # (subjectAltName IP).
            name = address if self._context.check_hostname else None
            wrap = partial(self._context.wrap_socket, do_handshake_on_connect=False, server_hostname=name)
        pending = PendingHandshake(sock, address, handshake, Deadline(HANDSHAKE), connecting=True, wrap=wrap)
        self._selector.register(sock, selectors.EVENT_WRITE, pending)
        self._calls.add(pending)

    def _advance(self, pending: PendingHandshake) -> bool:
        """Whether this call has been answered."""
        try:
            events = pending.advance()
        except (OSError, RemoteProtocolError) as exc:
            self._failed.append(f"{pending.address}: {exc}")
            self._forget(pending)
            pending.socket.close()
            return False
        if events:
            self._selector.modify(pending.socket, events, pending)
        return not events

    def _forget(self, pending: PendingHandshake) -> None:
        self._selector.unregister(pending.socket)
        self._calls.discard(pending)

    def close(self) -> None:
        for pending in self._calls:
            pending.socket.close()
        self._selector.close()
