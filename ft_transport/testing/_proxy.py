"""A TCP proxy in front of a LaneTransport, on which everything goes wrong that was asked for."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

from ft_transport._deadline import Deadline
from ft_transport._net.endpoint import Endpoint
from ft_transport.testing._faults import Faults
from ft_transport.testing._stream import FrameStream

__all__ = ["FaultProxy", "Tamper"]

P = TypeVar("P", bound="FaultProxy")

Tamper = Callable[[int, str, int, bytes], "bytes | None"]
"""Called with the connection (counted from 0), the direction (``"up"`` to the listener, ``"down"`` from it), the
position of the first byte in that direction, and the bytes; gives what passes on instead, None to cut the connection.
"""

# Where proxies listen; see FaultProxy. All of 127.0.0.0/8 is this machine (RFC 1122, 3.2.1.3).
_ADDRESS = "127.0.0.2"

# Taken at once; small enough for throttling to be smooth.
_PIECE_BYTES = 1 << 16
# Held back at most in each direction of a connection, where bytes are late.
_MAX_LATE_BYTES = 8 << 20


class _Link:
    """When the bytes of all connections have passed a link of some width."""

    def __init__(self) -> None:
        # Only its `elapsed` is used: one class reads the clock, and a time-out of 0 never decides anything here.
        self._clock = Deadline(timedelta(0))
        self._lock = threading.Lock()
        self._free_at = 0.0  # when it has passed on what it has taken

    def now(self) -> float:
        """Seconds since it was made."""
        return self._clock.elapsed()

    def passed(self, nbytes: int, rate: float) -> float:
        """When bytes that come now are through; at once if there is no rate."""
        if not rate:
            return self.now()
        with self._lock:
            # One clock for all connections, both ways: a link is as wide as it is, however many lanes share it.
            self._free_at = max(self.now(), self._free_at) + nbytes / rate
            return self._free_at


class FaultProxy(Faults):
    """Stands between a :class:`~ft_transport.LaneTransport` and those who fetch from it.

    ::

        with FaultProxy(source.metadata()).corrupt(3).throttle(10e6) as proxy:
            destination.recv_checkpoint(0, proxy.metadata, step, timeout)

    Args:
        metadata: Of the transport.
        tamper: For what the vocabulary lacks: sees and changes the bytes that pass.
        seed: For what is left to chance.

    Attributes:
        metadata: What those who fetch are given instead.
        nbytes: Bytes passed on so far, in both directions.
        num_connections: Accepted so far.

    Raises:
        RemoteProtocolError: The metadata is not a LaneTransport's.

    Give it its faults before anybody connects. With TLS, messages cannot be told apart: only faults without one work.
    Threading: any. Two threads for each connection, none after :meth:`close`.
    """

    def __init__(self, metadata: str, tamper: Tamper | None = None, *, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.nbytes = 0
        self.num_connections = 0
        self._nbytes_down = 0
        self._target = Endpoint.decode(metadata)
        self._tamper = tamper
        self._frozen = False
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._link = _Link()
        # Loopback only: whatever passes is a state dict, and no fault is worth offering it to the network.
        # And at another address than a process's own: what it passes on is tampered with, so it must not be taken for a
        # way within the machine, on which messages go past every connection (``fabric``).
        listener = socket.create_server((_ADDRESS, 0), backlog=64)
        self._sockets = [listener]
        port = listener.getsockname()[1]
        # The secret stays the source's: the proxy passes the handshake on and does not take part in it.
        self.metadata = self._target._replace(addresses=(_ADDRESS,), port=port).encode()
        self._threads = [threading.Thread(target=self._accept, args=(listener,), name="fault proxy", daemon=True)]
        self._threads[0].start()

    def __enter__(self: P) -> P:
        return self

    def __exit__(
        self, cls: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def cut(self) -> None:
        """Cut every connection, as the death of the process behind would, and take no new one."""
        self._over.set()
        with self._lock:
            for end in self._sockets:
                # `shutdown` and not `close`: a close does not wake the thread that is blocked in a read or accept of
                # this socket, and its number may be another file's by the time that thread goes on.
                _shut(end)

    def freeze(self) -> None:
        """Let nothing pass any more, and close nothing, as a network that is cut or a process that is stopped."""
        # The sockets stay open and the kernel goes on to acknowledge what fits into its buffers, as with a stopped
        # process: a peer sees no error, only that nothing comes.
        self._frozen = True

    def close(self) -> None:
        """Cut everything, and wait until no thread is left."""
        self.cut()
        self._threads[0].join()
        for thread in self._threads[1:]:
            thread.join()
        for end in self._sockets:
            end.close()

    # ---------------------------------------------------------------------------------------- inside

    def _accept(self, listener: socket.socket) -> None:
        while not self._over.is_set():
            try:
                near, _ = listener.accept()
            except OSError:
                return
            far = self._dial()
            if far is None:
                near.close()
                continue
            with self._lock:
                self._sockets += [near, far]
                number, self.num_connections = self.num_connections, self.num_connections + 1
                # Cut while it was dialled: `cut` has walked through the list without these two.
                if self._over.is_set():
                    _shut(near)
            for direction, source, target in (("up", near, far), ("down", far, near)):
                pump = _Pump(self, number, direction, source, target)
                thread = threading.Thread(target=pump.run, name="fault proxy", daemon=True)
                self._threads.append(thread)
                thread.start()

    def _dial(self) -> socket.socket | None:
        for address in self._target.addresses:
            with contextlib.suppress(OSError):
                far = socket.create_connection((address, self._target.port), timeout=3)
                # The time-out was for the connect. Left on, a pause in the transfer would look like a connection that
                # broke.
                far.settimeout(None)
                return far
        return None

    def _due(self, nbytes: int) -> float:
        """When bytes that come now pass on."""
        return self._link.passed(nbytes, self._amount("throttle")) + self._amount("delay")

    def _passing(self, position: int, nbytes: int) -> tuple[int, str]:
        """How many of these bytes pass to the destination, and what happens then: "cut", "freeze", "end" or nothing."""
        passing, then = nbytes, ""
        for fault in self._faults:
            if fault.what not in ("drop_after", "freeze_after"):
                continue
            alone = fault.what == "drop_after" and fault.amount > 0  # of each connection
            # To the byte, so that a test can cut inside of a header, of a digest, or of the last message.
            left = max(0, fault.nbytes - (position if alone else self._nbytes_down))
            if left < passing and fault.due():
                passing, then = left, "end" if alone else {"drop_after": "cut", "freeze_after": "freeze"}[fault.what]
        self._nbytes_down += passing
        return passing, then


class _Pump:
    """Passes on the bytes of one connection in one direction."""

    def __init__(
        self, proxy: FaultProxy, number: int, direction: str, source: socket.socket, target: socket.socket
    ) -> None:
        self._proxy = proxy
        self._number = number
        self._direction = direction
        self._source = source
        self._target = target
        self._stream = FrameStream(proxy, direction)
        self._late: deque[tuple[float, bytes]] = deque()
        self._late_bytes = 0
        self._taken = 0
        self._passed = 0
        self._ended = False

    def run(self) -> None:
        with contextlib.suppress(OSError), selectors.DefaultSelector() as selector:
            selector.register(self._source, selectors.EVENT_READ)
            while self._step(selector):
                pass
        _shut(self._source)
        _shut(self._target)

    def _step(self, selector: selectors.BaseSelector) -> bool:
        """Pass on what is due, or take what is there; gives whether to go on."""
        proxy, late = self._proxy, self._late
        if proxy._frozen:
            proxy._over.wait()
        if proxy._over.is_set() or (self._ended and not late):
            return False
        wait = max(0.0, late[0][0] - proxy._link.now()) if late else None
        if wait == 0:
            return self._pass_on(late.popleft()[1])
        # Reads no more while so much is held back: the sender's window then fills, and it slows down as on a real slow
        # link.
        if self._ended or self._late_bytes >= _MAX_LATE_BYTES:
            proxy._over.wait(wait)
        elif selector.select(wait):
            return self._take(self._source.recv(_PIECE_BYTES))
        return True

    def _take(self, data: bytes) -> bool:
        # The other side has closed. What is still late goes out first: TCP delivers what was sent before a FIN.
        if not data:
            self._ended = True
            return True
        proxy, tampered = self._proxy, data
        if proxy._tamper is not None:
            passed = proxy._tamper(self._number, self._direction, self._taken, data)
            if passed is None:
                return False
            tampered = passed
        self._taken += len(data)
        due = proxy._due(len(data))
        tampered = self._stream.feed(tampered)
        self._late.append((due, tampered))
        self._late_bytes += len(tampered)
        return True

    def _pass_on(self, data: bytes) -> bool:
        proxy, count, then = self._proxy, len(data), ""
        self._late_bytes -= count
        if self._direction == "down":
            with proxy._lock:
                count, then = proxy._passing(self._passed, count)
        # Outside of the lock, as it blocks for as long as the peer does not read.
        self._target.sendall(data[:count])
        self._passed += count
        proxy.nbytes += count
        if then == "cut":
            proxy.cut()
        elif then == "freeze":
            proxy.freeze()
        return then != "end"


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
