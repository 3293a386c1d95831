"""TCP connections between two ranks.

Strategy: once a connection is made, its socket blocks in the kernel, with a kernel time-out that is short against every
time that matters, and takes or gives as much as was asked for (``MSG_WAITALL``): the interpreter is out of the way
while bytes move, and wakes up often enough to see that none do. Whoever wants to stop a thread that is in such a call
shuts the connection down; only the connection's owner closes it, so a descriptor is never reused under a reader.

Not here: where connections come from (``_net.dial``, ``_net.listener``), and how long a call may go on
(``_net.stall``).
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import select
import socket
import ssl
import struct
import sys
import termios
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta

from ft_transport._net.stall import HEARTBEAT, Patience
from ft_transport._net.zero_copy import SPLICE_FROM, Splicer
from ft_transport._process import keep_out_of_forks
from ft_transport.errors import PeerFailure, TransferError

__all__ = ["Bell", "Connection", "is_near"]

# Whoever reads much is woken up once so many bytes are there, and not for every packet.
_MUCH_BYTES = 512 << 10

# Memory for what a peer only says that it will send is taken in such steps, each once the bytes of the last are here.
_STEP_BYTES = 1 << 20

View = memoryview


class Connection:
    """One TCP connection to a peer that is known to be one.

    One thread at a time reads and writes it, and closes it; any thread may stop that thread by :meth:`abort`.

    Attributes:
        address: Of the peer.
        nbytes_wire: Bytes in both directions so far.
    """

    def __init__(self, sock: socket.socket, address: str) -> None:
        self.address = address
        self.nbytes_wire = 0
        self._socket = sock
        keep_out_of_forks(sock)
        self._tls = isinstance(sock, ssl.SSLSocket)
        self._splicer: Splicer | None = None
        self._can_splice = not self._tls
        self._can_read_much = not self._tls and not is_near(sock) and hasattr(select, "poll")
        # One for each direction: a heartbeat may be written while another thread reads.
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(sock, select.POLLIN)
        self._writable.register(sock, select.POLLOUT)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._tls:
            sock.settimeout(HEARTBEAT.total_seconds())
        else:
            sock.setblocking(True)
            tick = struct.pack("@ll", 0, int(HEARTBEAT.total_seconds() * 1e6))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, tick)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, tick)

    def write(self, parts: Sequence[bytes | View], patience: Patience, *, more: bool = False) -> None:
        """Write all parts, one behind the other.

        Args:
            more: More follows at once: the system may wait for it.

        Raises:
            PeerFailure: The connection broke, or the peer takes nothing any more.
            TransferTimeout: The deadline passed.
        After an error: some, all or none of it may have left.
        """
        views = [View(part) for part in parts if len(part)]
        flags, wait = socket.MSG_MORE if more else 0, self._waits_by(self._writable)
        while views:
            try:
                wait()
                written = self._socket.send(views[0]) if self._tls else self._socket.sendmsg(views, (), flags)
            except (BlockingIOError, TimeoutError):
                patience.check()
                continue
            except OSError as exc:
                raise self._broken(exc) from None
            patience.moved()
            self.nbytes_wire += written
            while views and written >= len(views[0]):
                written -= len(views.pop(0))
            if written:
                views[0] = views[0][written:]
            if views:
                patience.check()  # a trickle is no silence, but has a deadline

    def write_steady(self, view: View, patience: Patience) -> None:
        """Write memory without a copy, where the system can; raises as :meth:`write`.

        It must stay as it is until the peer has read it, or this connection is closed.
        """
        splicer, wait = self._have_splicer() if len(view) >= SPLICE_FROM else None, self._waits_by(self._writable)
        while splicer is not None and (len(view) or not splicer.empty):
            if splicer.empty:
                try:
                    view = view[splicer.fill(view) :]
                except OSError:
                    break  # memory of a device, say
            try:
                wait()
                self.nbytes_wire += splicer.drain(self._socket.fileno())
            except BlockingIOError:
                patience.check()
                continue
            except OSError as exc:
                raise self._broken(exc) from None
            patience.moved()
            if len(view) or not splicer.empty:
                patience.check()
        if len(view):
            self.write([view], patience, more=True)

    def _have_splicer(self) -> Splicer | None:
        if self._can_splice and self._splicer is None:
            try:
                self._splicer = Splicer()
            except OSError:
                self._can_splice = False
        return self._splicer

    def read_into(self, view: View, patience: Patience) -> None:
        """Fill ``view``; raises as :meth:`write`, and if the peer has closed the connection."""
        done = self._read_much(view, patience) if len(view) > _MUCH_BYTES and self._can_read_much else 0
        wait = self._waits_by(self._readable)
        while done < len(view):
            try:
                wait()
                # Never more than asked for, so nothing is left in a buffer of ours.
                rest = view[done:]
                count = self._socket.recv_into(rest, 0, 0 if self._tls else socket.MSG_WAITALL)
            except (BlockingIOError, TimeoutError):
                patience.check()
                continue
            except OSError as exc:
                raise self._broken(exc) from None
            done += self._note_read(count, patience)
            if done < len(view):
                patience.check()  # as in write

    def _read_much(self, view: View, patience: Patience) -> int:
        """Read all of ``view`` but less than :data:`_MUCH_BYTES`; gives how many bytes."""
        if not self._wake_up_at(_MUCH_BYTES):
            self._can_read_much = False
            return 0
        poll, done = select.poll(), 0
        poll.register(self._socket, select.POLLIN)
        try:
            while len(view) - done >= _MUCH_BYTES:
                if not poll.poll(HEARTBEAT.total_seconds() * 1000):
                    patience.check()
                try:
                    count = self._socket.recv_into(view[done:], 0, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    continue
                except OSError as exc:
                    raise self._broken(exc) from None
                done += self._note_read(count, patience)
                if done < len(view):
                    patience.check()  # there may be something to read each time, long after the deadline
        finally:
            self._wake_up_at(1)
        return done

    def _waits_by(self, poll: select.poll) -> Callable[[], None]:
        """What waits until at least a byte can be moved, where the call that moves it must not.

        A call that moves none is begun anew, with the whole of the kernel's time-out, whenever a signal's handler has
        run (PEP 475): with one every 100 ms it would never end. A poll's time goes on. Signals are for the main thread;
        the lanes have threads of their own, and are spared the poll.

        Raises:
            BlockingIOError: By what is returned: none could for a heartbeat.
        """
        if self._tls or threading.get_ident() != threading.main_thread().ident:
            return _at_once
        return functools.partial(_await, poll)

    def _wake_up_at(self, nbytes: int) -> bool:
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, nbytes)
        except OSError:
            return False
        return True

    def _note_read(self, count: int, patience: Patience) -> int:
        if count == 0:
            raise PeerFailure("the connection was closed by the peer")
        patience.moved()
        self.nbytes_wire += count
        return count

    def read(self, nbytes: int, patience: Patience) -> bytearray:
        """The next ``nbytes``; raises as :meth:`read_into`. Takes memory as they come."""
        data = bytearray(min(nbytes, _STEP_BYTES))
        self.read_into(View(data), patience)
        while len(data) < nbytes:
            patience.check()  # each step may find all that it wants, long after the deadline
            step = bytearray(min(nbytes - len(data), _STEP_BYTES))
            self.read_into(View(step), patience)
            data += step
        return data

    def _broken(self, exc: OSError) -> PeerFailure:
        return PeerFailure(f"the connection broke: {type(exc).__name__}: {exc}")

    @property
    def idle(self) -> bool:
        """Whether the peer has neither said anything nor closed its side."""
        try:
            socket.socket.recv(self._socket, 1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    @property
    def nbytes_arrived(self) -> int:
        """As ``nbytes_wire``, without what the peer's system has not taken yet; nearly, with TLS. Any thread."""
        try:
            waiting = int.from_bytes(fcntl.ioctl(self._socket, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        except (OSError, ValueError):
            waiting = 0  # it was closed just now
        return self.nbytes_wire - waiting

    @property
    def takes_more(self) -> bool:
        """Whether some more bytes can be written without waiting for the peer. Needs no descriptor of its own."""
        poll = select.poll()
        poll.register(self._socket, select.POLLOUT)
        return bool(poll.poll(0))

    def pending(self) -> bool:
        """Whether bytes are here that a poll of the descriptor does not show."""
        return isinstance(self._socket, ssl.SSLSocket) and self._socket.pending() > 0

    def fileno(self) -> int:
        """The descriptor, to poll."""
        return self._socket.fileno()

    def abort(self) -> None:
        """End the connection: whoever reads or writes it raises at once. Any thread."""
        self._shut(socket.SHUT_RDWR)

    def finish(self, patience: Patience) -> None:
        """Write no more, and wait until the peer has closed its side: what was written has arrived then. Never raises.

        Closing at once would make the system drop what the peer has not read yet, if the peer still writes.
        """
        self._shut(socket.SHUT_WR)
        try:
            while True:
                self.read(1, patience)
                patience.check()  # a peer that goes on talking is not waited for any longer
        except TransferError:
            pass

    def _shut(self, how: int) -> None:
        with contextlib.suppress(OSError):
            # Not SSLSocket's own, after which a writer in another thread would go on in the clear.
            socket.socket.shutdown(self._socket, how)

    def close(self) -> None:
        """Give the descriptor back. The owner only, once no thread uses it.

        Memory that was written by :meth:`write_steady` is not read any more afterwards.
        """
        splicer, self._splicer = self._splicer, None
        if splicer is not None:
            splicer.close()
            if int.from_bytes(fcntl.ioctl(self._socket, termios.TIOCOUTQ, bytes(4)), sys.byteorder):
                # Some of it has not arrived: drop it, rather than send it once this side goes on.
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
        self._socket.close()


def _await(poll: select.poll) -> None:
    if not poll.poll(HEARTBEAT.total_seconds() * 1000):
        raise BlockingIOError


def _at_once() -> None:
    pass


def is_near(sock: socket.socket) -> bool:
    """Whether the peer is on this machine."""
    try:
        return bool(sock.getsockname()[0] == sock.getpeername()[0])
    except OSError:
        return False  # it is gone already


class Bell:
    """Wakes up one thread that waits for it or for a connection."""

    _descriptor = -1

    def __init__(self) -> None:
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def ring(self) -> None:
        """Wake it up, now or when it waits next. Any thread, not after :meth:`close`."""
        os.eventfd_write(self._descriptor, 1)

    def await_ring(self, connection: Connection | None, limit: timedelta) -> bool:
        """Wait for the bell, the connection, or the limit; gives whether the connection can be read."""
        if connection is not None and connection.pending():
            return True
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        if connection is not None:
            poll.register(connection, select.POLLIN)
        ready = [descriptor for descriptor, _ in poll.poll(limit.total_seconds() * 1000)]
        if self._descriptor in ready:
            os.eventfd_read(self._descriptor)
        return connection is not None and connection.fileno() in ready

    def close(self) -> None:
        """May be called twice."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    __del__ = close
