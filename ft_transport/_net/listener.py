"""Listens on one port and lets in who knows the secret.

Strategy: one thread, and sockets that do not block: handshakes are few bytes, and may be a stranger's, who must not
hold up a peer. What a stranger can take is bounded: so many handshakes at once, so many seconds for each, and the first
to make room is who has not shown yet that it knows the secret.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import ssl
import threading
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, Generic, TypeVar

from ft_transport._deadline import Deadline
from ft_transport._net.connection import Connection, is_local
from ft_transport._net.handshake import server_handshake
from ft_transport._net.handshake_io import HANDSHAKE, PendingHandshake
from ft_transport._net.stall import HEARTBEAT
from ft_transport._process import keep_out_of_forks
from ft_transport.errors import printable

__all__ = ["Listener"]

logger = logging.getLogger("ft_transport")

T = TypeVar("T")

# Handshakes under way at once: of sixteen destinations that dial all their lanes from far away. The oldest makes room,
# of those that have not shown yet that they know the secret.
_MAX_HANDSHAKES = 256


class _Handshakes:
    """Those who have connected and not yet proved who they are: as many as there is room for, the oldest first.

    Args:
        selector: Waits for their sockets.
        context: For TLS.
        handshake: Makes a new one.
    """

    def __init__(
        self, selector: selectors.BaseSelector, context: ssl.SSLContext | None, handshake: Callable[[], Any]
    ) -> None:
        self._selector = selector
        self._context = context
        self._handshake = handshake
        self._pending: dict[PendingHandshake, None] = {}

    def begin(self, sock: socket.socket, address: str) -> None:
        """Take over a socket; makes room if there is none."""
        if len(self._pending) >= _MAX_HANDSHAKES:
            self.make_room()
        wrap = None
        if self._context is not None:
            wrap = partial(self._context.wrap_socket, server_side=True, do_handshake_on_connect=False)
        pending = PendingHandshake(sock, address, self._handshake(), Deadline(HANDSHAKE), connecting=False, wrap=wrap)
        self._pending[pending] = None
        self._selector.register(sock, selectors.EVENT_READ, pending)

    def advance(self, pending: PendingHandshake) -> bool:
        """Go on with one whose socket is ready; gives whether it is through, and the caller's from now on."""
        if pending not in self._pending:
            return False  # dismissed in this very round
        try:
            events = pending.advance()
        except Exception as exc:  # whatever a peer sends, or a context that cannot listen does: others are not to blame
            self._dismiss(pending)
            logger.debug("%s is no peer: %s: %s", pending.address, type(exc).__name__, printable(str(exc)))
            return False
        if events:
            self._selector.modify(pending.socket, events, pending)
            return False
        del self._pending[pending]
        self._selector.unregister(pending.socket)
        return True

    def expire(self) -> None:
        """Dismiss those who have had their time."""
        for pending in [pending for pending in self._pending if pending.limit.expired()]:
            self._dismiss(pending)

    def make_room(self) -> None:
        """Dismiss one, if there are any."""
        if self._pending:
            # False comes before True, and the oldest before the others. So a flood of strangers never pushes out a peer
            # that has knocked, and each of them costs the flood a connection.
            self._dismiss(min(self._pending, key=lambda pending: pending.known))

    def close(self) -> None:
        """Dismiss all."""
        for pending in list(self._pending):
            self._dismiss(pending)

    def _dismiss(self, pending: PendingHandshake) -> None:
        del self._pending[pending]
        self._selector.unregister(pending.socket)
        pending.socket.close()


class Listener(Generic[T]):
    """Listens on one port and lets in who knows the secret.

    Args:
        secret: What a peer must know.
        port: To listen on, 0 for any.
        context: For TLS.
        first: Reads what a peer says once it has proved to be one, a generator that yields how many bytes it must have
            next. So this room knows no frames.
        dispatch: Called with each such peer and what ``first`` returned, and must neither block nor raise. From then on
            the connection is its own.
        tick: Called every :data:`HEARTBEAT` or more often.

    Attributes:
        port: Where it listens, on every address of the machine.

    Raises:
        OSError: It cannot listen there.
    """

    def __init__(
        self,
        secret: bytes,
        port: int,
        context: ssl.SSLContext | None,
        first: Callable[[], Generator[int, bytes, T]],
        dispatch: Callable[[Connection, T], None],
        tick: Callable[[], None],
    ) -> None:
        self._dispatch = dispatch
        self._tick = tick
        self._socket = _listen(port)
        self._pacing = _turn_off_pacing(self._socket)
        keep_out_of_forks(self._socket)
        self.port = int(self._socket.getsockname()[1])
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._handshakes = _Handshakes(self._selector, context, lambda: _handshake(secret, first))
        self._closing = False
        self._deaf = False
        # To close one end makes the other readable: a wake-up that needs no byte, and may come twice.
        self._wakeup, self._waker = socket.socketpair()
        self._selector.register(self._wakeup, selectors.EVENT_READ)
        # A daemon: a transport that nobody has shut down would keep the interpreter from ending.
        self._thread = threading.Thread(target=self._run, name="ft_transport-listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening, soon. Any thread; may be called twice."""
        self._closing = True
        self._waker.close()

    def join(self) -> None:
        """Wait until it has stopped. Not from ``dispatch`` or ``tick``."""
        self._thread.join()

    def _run(self) -> None:
        heartbeat = Deadline(HEARTBEAT)
        try:
            while not self._closing:
                for key, _ in self._selector.select(HEARTBEAT.total_seconds()):
                    if key.fileobj is self._socket:
                        self._guarded(self._accept)
                    elif key.data is not None:
                        self._guarded(partial(self._advance, key.data))
                # By the clock and not when select has waited in vain: under a flood it never would.
                if heartbeat.expired():
                    heartbeat = Deadline(HEARTBEAT)
                    if self._deaf:
                        self._selector.register(self._socket, selectors.EVENT_READ)
                        self._deaf = False
                    self._guarded(self._handshakes.expire)
                    self._guarded(self._tick)
        finally:
            self._handshakes.close()
            self._selector.close()
            self._socket.close()
            self._wakeup.close()

    def _accept(self) -> None:
        try:
            sock, (address, *_) = self._socket.accept()
        except BlockingIOError:
            return
        except OSError as exc:
            # No descriptor to be had: those of strangers are the first to go. The selector would report who waits for
            # one again and again, so nobody is looked for until the next heartbeat.
            logger.warning("a connection could not be accepted: %s", exc)
            self._handshakes.make_room()
            self._selector.unregister(self._socket)
            self._deaf = True
            return
        sock.setblocking(False)
        if self._pacing and not is_local(sock):
            with contextlib.suppress(OSError):  # it is gone already
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, self._pacing)
        # An IPv4 peer of a socket for both is shown as IPv6 has it (RFC 4291, 2.5.5.2); reports name what its admin
        # knows.
        self._handshakes.begin(sock, address.removeprefix("::ffff:"))

    def _advance(self, pending: PendingHandshake) -> None:
        if not self._handshakes.advance(pending):
            return
        try:
            connection = pending.taken()
        except Exception:
            pending.socket.close()
            raise
        try:
            self._dispatch(connection, pending.result)
        except Exception:
            connection.abort()  # some thread may have it already
            raise

    def _guarded(self, call: Callable[[], None]) -> None:
        """Call what may raise: the listener lives on."""
        try:
            call()
        except Exception:
            with contextlib.suppress(Exception):  # a filter or handler of the user's
                logger.exception("the listener goes on")


def _handshake(secret: bytes, first: Callable[[], Generator[int, bytes, T]]) -> Generator[bytes | int, bytes, T]:
    yield from server_handshake(secret)
    return (yield from first())


# A backlog for all lanes of a few hundred replicas at once. The system's bound (somaxconn, 4096 today) cuts it; who
# finds no room calls again after a second, without knowing why (TCP's own repetition of a SYN).
def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            sock = socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
            sock.setblocking(False)
            return sock
        except OSError:
            pass  # a kernel that knows IPv6 may still have it turned off
    sock = socket.create_server(("", port), backlog=1024)
    sock.setblocking(False)
    return sock


def _turn_off_pacing(listening: socket.socket) -> bytes:
    """Let connections begin without BBR, where it is the system's choice; gives what it is called there, or nothing."""
    # BBR sets a timer for each packet, also between two processes of one machine, where no wire can be overrun: that
    # took a tenth to nearly a half of a heal over TCP. Pacing that has begun cannot be ended, so connections begin
    # without, and one from another machine gets the system's choice back before its first byte.
    try:
        chosen = listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")
        if not chosen.startswith(b"bbr"):
            return b""
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")  # which no system lacks or forbids
    except (AttributeError, OSError):  # a system without that choice
        return b""
    return chosen
