"""How connections come about: dialling, listening, and the addresses of this machine.

Strategy: handshakes are run without blocking, all of a listener by one thread: they are few bytes, and may be a
stranger's.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import logging
import os
import selectors
import socket
import ssl
import threading
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

from ft_transport._deadline import Deadline
from ft_transport._net.connection import HEARTBEAT, Connection, Patience, is_near, keep_out_of_forks
from ft_transport._net.handshake import Handshake, Interface, Invitation, Visit, admit, knock
from ft_transport.errors import PeerFailure, RemoteProtocolError, printable

__all__ = ["Contexts", "Listener", "dial", "interfaces", "resolve"]

logger = logging.getLogger("ft_transport")

# A peer's handshake takes two round trips; what is not through by then is a stranger.
_HANDSHAKE = timedelta(seconds=3)
# Handshakes under way at once; the oldest makes room, of those that have not shown yet that they know the secret.
_MAX_HANDSHAKES = 64
# The next address is tried when the one before has not answered for so long, or has failed.
_STAGGER = timedelta(milliseconds=100)

# For listening, and for dialling.
Contexts = tuple[ssl.SSLContext, ssl.SSLContext]


# ---------------------------------------------------------------------------------------- handshakes


class _Greeting:
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
            return selectors.EVENT_WRITE if self._outgoing and self._shaken else selectors.EVENT_READ
        except ssl.SSLWantWriteError:
            return selectors.EVENT_WRITE

    def _check_connected(self) -> None:
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


def dial(
    invitation: Invitation, first: bytes, patience: Patience, contexts: Contexts | None, label: str = "the source"
) -> Connection:
    """Connect to whoever gave the invitation, over the first of its addresses that answers.

    Args:
        invitation: Its addresses are tried side by side, each a moment after the one before.
        first: The first frame, sent at once.
        patience: For all of it.
        contexts: For TLS.
        label: Who is called, for messages.

    Raises:
        PeerFailure: None answers.
        RemoteProtocolError: One side speaks TLS and the other does not, or the secret is another one.
        TransferTimeout: The deadline passed.
    """
    if invitation.tls != (contexts is not None):
        raise RemoteProtocolError(
            f"{label} {'speaks' if invitation.tls else 'does not speak'} TLS and this side "
            f"{'does' if contexts else 'does not'}: give both an ssl_context, or neither"
        )
    calls = _Calls(invitation, contexts, label)
    try:
        connection = calls.answered(patience)
    finally:
        calls.close()
    try:
        connection.write([first], patience)
    except BaseException:
        connection.close()
        raise
    return connection


class _Calls:
    """Calls under way to the addresses of one invitation."""

    def __init__(self, invitation: Invitation, contexts: Contexts | None, label: str) -> None:
        self._invitation = invitation
        self._context = contexts[1] if contexts else None
        self._label = label
        self._rest = list(invitation.addresses)
        self._failed: list[str] = []
        self._selector = selectors.PollSelector()  # which takes no descriptor

    def answered(self, patience: Patience) -> Connection:
        stagger = Deadline(timedelta(0))
        while True:
            waiting = len(self._selector.get_map())
            if self._rest and (not waiting or stagger.expired()):
                stagger = Deadline(_STAGGER)
                self._start(self._rest.pop(0))
            elif not waiting:
                raise PeerFailure(f"{self._label} does not answer: {'; '.join(self._failed)}")
            limit = min(HEARTBEAT, patience.deadline.remaining(), *([stagger.remaining()] if self._rest else []))
            for key, _ in self._selector.select(limit.total_seconds()):
                if self._advance(key.data):
                    greeting: _Greeting = key.data
                    self._selector.unregister(greeting.socket)
                    return greeting.taken()
            patience.check()

    def _start(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock: socket.socket | None = None
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.setblocking(False)
            sock.connect_ex((address, self._invitation.port))
        except OSError as exc:
            self._failed.append(f"{address}: {exc}")
            if sock is not None:
                sock.close()
            return
        handshake: Handshake = knock(self._invitation.secret)
        wrap = None
        if self._context is not None:
            name = address if self._context.check_hostname else None
            wrap = partial(self._context.wrap_socket, do_handshake_on_connect=False, server_hostname=name)
        greeting = _Greeting(sock, address, handshake, Deadline(_HANDSHAKE), connecting=True, wrap=wrap)
        self._selector.register(sock, selectors.EVENT_WRITE, greeting)

    def _advance(self, greeting: _Greeting) -> bool:
        """Whether this call has been answered."""
        try:
            events = greeting.advance()
        except (OSError, RemoteProtocolError) as exc:
            self._failed.append(f"{greeting.address}: {exc}")
            self._selector.unregister(greeting.socket)
            greeting.socket.close()
            return False
        if events:
            self._selector.modify(greeting.socket, events, greeting)
        return not events

    def close(self) -> None:
        for key in list(self._selector.get_map().values()):
            key.data.socket.close()
        self._selector.close()


# ------------------------------------------------------------------------------------------ listener


class Listener:
    """Listens on one port and lets in who knows the secret.

    Args:
        secret: What a peer must know.
        port: To listen on, 0 for any.
        context: For TLS.
        welcome: Called with each peer that has proved to be one, and must neither block nor raise. From then on the
            connection is its own.
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
        welcome: Callable[[Connection, Visit], None],
        tick: Callable[[], None],
    ) -> None:
        self._secret = secret
        self._context = context
        self._welcome = welcome
        self._tick = tick
        self._greetings: dict[_Greeting, None] = {}  # the oldest first
        self._socket = _listen(port)
        keep_out_of_forks(self._socket)
        self._pacing = _turn_off_pacing(self._socket)
        self.port = int(self._socket.getsockname()[1])
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._closing = False
        self._deaf = False
        self._wakeup, self._waker = socket.socketpair()
        self._selector.register(self._wakeup, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="ft_transport-listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening, soon. Any thread; may be called twice."""
        self._closing = True
        self._waker.close()

    def join(self) -> None:
        """Wait until it has stopped. Not from ``welcome`` or ``tick``."""
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
                if heartbeat.expired():
                    heartbeat = Deadline(HEARTBEAT)
                    if self._deaf:
                        self._selector.register(self._socket, selectors.EVENT_READ)
                        self._deaf = False
                    self._guarded(self._expire)
                    self._guarded(self._tick)
        finally:
            for greeting in list(self._greetings):
                self._dismiss(greeting)
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
            self._make_room()
            self._selector.unregister(self._socket)
            self._deaf = True
            return
        sock.setblocking(False)
        if self._pacing and not is_near(sock):
            with contextlib.suppress(OSError):  # it is gone already
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, self._pacing)
        if len(self._greetings) >= _MAX_HANDSHAKES:
            self._make_room()
        wrap = None
        if self._context is not None:
            wrap = partial(self._context.wrap_socket, server_side=True, do_handshake_on_connect=False)
        address = address.removeprefix("::ffff:")
        greeting = _Greeting(sock, address, admit(self._secret), Deadline(_HANDSHAKE), connecting=False, wrap=wrap)
        self._greetings[greeting] = None
        self._selector.register(sock, selectors.EVENT_READ, greeting)

    def _advance(self, greeting: _Greeting) -> None:
        if greeting not in self._greetings:
            return  # dismissed in this very round
        try:
            events = greeting.advance()
        except Exception as exc:  # whatever a peer sends, or a context that cannot listen does: others are not to blame
            self._dismiss(greeting)
            logger.debug("%s is no peer: %s: %s", greeting.address, type(exc).__name__, printable(str(exc)))
            return
        if events:
            self._selector.modify(greeting.socket, events, greeting)
            return
        del self._greetings[greeting]
        self._selector.unregister(greeting.socket)
        try:
            connection = greeting.taken()
        except Exception:
            greeting.socket.close()
            raise
        try:
            self._welcome(connection, greeting.result)
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

    def _expire(self) -> None:
        for greeting in [greeting for greeting in self._greetings if greeting.limit.expired()]:
            self._dismiss(greeting)

    def _make_room(self) -> None:
        if self._greetings:
            # False comes before True, and the oldest before the others.
            self._dismiss(min(self._greetings, key=lambda greeting: greeting.known))

    def _dismiss(self, greeting: _Greeting) -> None:
        del self._greetings[greeting]
        self._selector.unregister(greeting.socket)
        greeting.socket.close()


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
    """Let connections begin without BBR, where it is the system's choice; gives what it is called there, or nothing.

    It sets a timer for each packet, also between two processes of one machine, where no wire can be overrun: a tenth
    of such a heal. And it cannot be turned off where it has begun.
    """
    try:
        chosen = listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")
        if not chosen.startswith(b"bbr"):
            return b""
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")  # which no system lacks or forbids
    except (AttributeError, OSError):  # a system without that choice
        return b""
    return chosen


# ----------------------------------------------------------------------------------------- addresses


class _SockAddr(ctypes.Structure):
    _fields_ = [("family", ctypes.c_ushort), ("data", ctypes.c_ubyte * 26)]


class _IfAddrs(ctypes.Structure):
    pass


_IfAddrs._fields_ = [
    ("next", ctypes.POINTER(_IfAddrs)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("addr", ctypes.POINTER(_SockAddr)),
]

_IFF_UP = 1


def interfaces() -> list[Interface]:
    """The addresses of this machine's interfaces that are up, in the system's order."""
    libc = ctypes.CDLL(None, use_errno=True)
    head = ctypes.POINTER(_IfAddrs)()
    if libc.getifaddrs(ctypes.byref(head)) != 0:
        raise OSError(ctypes.get_errno(), "getifaddrs")
    found = []
    try:
        entry = head
        while entry:
            each = entry.contents
            if each.addr and each.flags & _IFF_UP and (address := _address(each.addr.contents)):
                found.append(Interface(each.name.decode(), address))
            entry = each.next
    finally:
        libc.freeifaddrs(head)
    return found


def _address(raw: _SockAddr) -> str:
    data = bytes(raw.data)
    if raw.family == socket.AF_INET:
        return socket.inet_ntop(socket.AF_INET, data[2:6])
    if raw.family == socket.AF_INET6:
        return socket.inet_ntop(socket.AF_INET6, data[6:22])
    return ""


def resolve(host: str) -> list[str]:
    """The addresses of a host name, or the address itself.

    Raises:
        ValueError: There is none of that name.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as exc:
        raise ValueError(f"host: {host!r} has no address: {exc}") from None
    # A scope ("%eth0") means nothing to another machine.
    return [str(ipaddress.ip_address(str(entry[4][0]).partition("%")[0])) for entry in found]
