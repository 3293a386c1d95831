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

from ft_transport._net.stall import HEARTBEAT, StallTimer
from ft_transport._net.zero_copy import SPLICE_FROM, Splicer, new_splicer
from ft_transport._process import keep_out_of_forks
from ft_transport.errors import PeerFailure, TransferError

__all__ = ["Wakeup", "Connection", "is_local"]

# Whoever reads much is woken up once so many bytes are there, and not for every packet.
# Half of a piece that is fingerprinted at once (``_lanes.session``): so there is always something to do while the rest
# comes.
_MUCH_BYTES = 512 << 10

# Memory for what a peer only says that it will send is taken in such steps, each once the bytes of the last are here.
_STEP_BYTES = 1 << 20

View = memoryview


class Connection:
    """One TCP connection to a peer that is known to be one.

    One thread at a time reads and writes it, and closes it; any thread may stop that thread by :meth:`abort`.

    Attributes:
        address: Of the peer.
        is_local: Whether it is on this machine, for all that addresses tell.
        round_trip: Seconds that a packet to it and its answer have taken at the least; 0.0 if the system does not tell.
        nbytes_wire: Bytes in both directions so far.
        nbytes_alive: How many of them only say that this side lives; its user's to count.
    """

    def __init__(self, sock: socket.socket, address: str) -> None:
        self.address, self.nbytes_wire, self.nbytes_alive = address, 0, 0
        self.is_local, self.round_trip = is_local(sock), _round_trip(sock)
        self._socket = sock
        keep_out_of_forks(sock)
        self._tls = isinstance(sock, ssl.SSLSocket)
        self._splicer: Splicer | None = None
        self._can_splice = not self._tls
        # Within a machine there are no packets to wait for; there MSG_WAITALL alone was quicker.
        self._can_read_much = not self._tls and not self.is_local
        # One for each direction: a heartbeat may be written while another thread reads.
        self._readable, self._writable = _poll_for(sock, select.POLLIN), _poll_for(sock, select.POLLOUT)
        _set_up(sock)

    def write(self, parts: Sequence[bytes | View], timer: StallTimer, *, more: bool = False) -> None:
        """Write all parts, one behind the other.

        Args:
            more: More follows at once: the system may wait for it.

        Raises:
            PeerFailure: The connection broke, or the peer takes nothing any more.
            TransferTimeout: The deadline passed.
        After an error: some, all or none of it may have left.
        """
        views = [View(part) for part in parts if len(part)]
        flags, wait = socket.MSG_MORE if more else 0, _waits_by(self._writable, tls=self._tls)

        def send() -> int:
            return self._socket.send(views[0]) if self._tls else self._socket.sendmsg(views, (), flags)

        while views:
            written = self._moved(send, wait, timer) or 0
            while views and written >= len(views[0]):
                written -= len(views.pop(0))
            if written:
                views[0] = views[0][written:]
            if views:
                timer.check()  # a trickle is no silence, but has a deadline

    def write_zero_copy(self, view: View, timer: StallTimer) -> None:
        """Write memory without a copy, where the system can; raises as :meth:`write`.

        It must stay as it is until the peer has read it, or this connection is closed.
        """
        splicer = self._have_splicer() if len(view) >= SPLICE_FROM else None
        wait = _waits_by(self._writable, tls=self._tls)
        while splicer is not None and (len(view) or not splicer.empty):
            if splicer.empty:
                try:
                    view = view[splicer.fill(view) :]
                except OSError:
                    break  # memory of a device, say
            self._moved(functools.partial(splicer.drain, self._socket.fileno()), wait, timer)
            if len(view) or not splicer.empty:
                timer.check()
        if len(view):
            self.write([view], timer, more=True)

    def _have_splicer(self) -> Splicer | None:
        if self._can_splice and self._splicer is None:
            self._splicer = new_splicer()
            self._can_splice = self._splicer is not None
        return self._splicer

    def read_into(self, view: View, timer: StallTimer) -> None:
        """Fill ``view``; raises as :meth:`write`, and if the peer has closed the connection."""
        done = self._read_much(view, timer) if len(view) > _MUCH_BYTES and self._can_read_much else 0
        flags, wait = 0 if self._tls else socket.MSG_WAITALL, _waits_by(self._readable, tls=self._tls)
        while done < len(view):
            # Never more than asked for, so nothing is left in a buffer of ours.
            done += self._read_some(functools.partial(self._socket.recv_into, view[done:], 0, flags), wait, timer)
            if done < len(view):
                timer.check()  # as in write

    def _read_much(self, view: View, timer: StallTimer) -> int:
        """Read all of ``view`` but less than :data:`_MUCH_BYTES`; gives how many bytes."""
        if not _wake_up_at(self._socket, _MUCH_BYTES):
            self._can_read_much = False
            return 0
        poll, done = _poll_for(self._socket, select.POLLIN), 0

        def wait() -> None:
            # What has come by then is read, however little: a peer that is slow is not silent.
            poll.poll(HEARTBEAT.total_seconds() * 1000)

        try:
            while len(view) - done >= _MUCH_BYTES:
                some = functools.partial(self._socket.recv_into, view[done:], 0, socket.MSG_DONTWAIT)
                done += self._read_some(some, wait, timer)
                if done < len(view):
                    timer.check()  # there may be something to read each time, long after the deadline
        finally:
            _wake_up_at(self._socket, 1)
        return done

    def _read_some(self, read: Callable[[], int], wait: Callable[[], None], timer: StallTimer) -> int:
        count = self._moved(read, wait, timer)
        if count == 0:
            raise PeerFailure("the connection was closed by the peer")
        return count or 0

    def _moved(self, move: Callable[[], int], wait: Callable[[], None], timer: StallTimer) -> int | None:
        """Have the system move some bytes; gives how many, None if it could not for a heartbeat."""
        try:
            wait()
            count = move()
        except (BlockingIOError, TimeoutError):
            # The kernel's own time-out is the first of these, TLS's the second. So is ETIMEDOUT, by which the kernel
            # gives up a connection; it says so once, and the next call raises EPIPE.
            timer.check()
            return None
        except OSError as exc:
            raise PeerFailure(f"the connection broke: {type(exc).__name__}: {exc}") from None
        if count:
            timer.progressed()
            self.nbytes_wire += count
        return count

    def read(self, nbytes: int, timer: StallTimer) -> bytearray:
        """The next ``nbytes``; raises as :meth:`read_into`. Takes memory as they come."""
        data = bytearray(min(nbytes, _STEP_BYTES))
        self.read_into(View(data), timer)
        while len(data) < nbytes:
            timer.check()  # each step may find all that it wants, long after the deadline
            step = bytearray(min(nbytes - len(data), _STEP_BYTES))
            self.read_into(View(step), timer)
            data += step
        return data

    @property
    def idle(self) -> bool:
        """Whether the peer has neither said anything nor closed its side."""
        return _is_idle(self._socket)

    def await_peer(self, limit: timedelta) -> bool:
        """Wait until the peer says something, or closes its side, for so long at the most; gives whether it has."""
        return self.pending() or bool(self._readable.poll(limit.total_seconds() * 1000))

    @property
    def nbytes_arrived(self) -> int:
        """As ``nbytes_wire``, without ``nbytes_alive`` and what the peer's system has not taken yet; nearly, with TLS.

        Any thread. It may fall, while what says that this side lives is not taken.
        """
        try:
            return self.nbytes_wire - self.nbytes_alive - _unsent_bytes(self._socket)
        except (OSError, ValueError):
            return self.nbytes_wire - self.nbytes_alive  # it was closed just now

    @property
    def takes_more(self) -> bool:
        """Whether some more bytes can be written without waiting for the peer. Needs no descriptor of its own."""
        return bool(_poll_for(self._socket, select.POLLOUT).poll(0))

    def pending(self) -> bool:
        """Whether bytes are here that a poll of the descriptor does not show."""
        return isinstance(self._socket, ssl.SSLSocket) and self._socket.pending() > 0

    def fileno(self) -> int:
        """The descriptor, to poll."""
        return self._socket.fileno()

    def abort(self) -> None:
        """End the connection: whoever reads or writes it raises at once. Any thread."""
        # Not close(): a thread in a call would stay there, and the descriptor may be a new file's before it looks
        # again.
        _shut(self._socket, socket.SHUT_RDWR)

    def finish(self, timer: StallTimer) -> None:
        """Write no more, and wait until the peer has closed its side: what was written has arrived then. Never raises.

        Closing at once would make the system drop what the peer has not read yet, if the peer still writes.
        """
        _shut(self._socket, socket.SHUT_WR)
        try:
            while True:
                self.read(1, timer)
                timer.check()  # a peer that goes on talking is not waited for any longer
        except TransferError:
            pass

    def close(self) -> None:
        """Give the descriptor back. The owner only, once no thread uses it.

        Memory that was written by :meth:`write_zero_copy` is not read any more afterwards.
        """
        splicer, self._splicer = self._splicer, None
        if splicer is not None:
            splicer.close()
            if _unsent_bytes(self._socket):
                # Some of it has not arrived: drop it (RST in the place of FIN), rather than send it once this side goes
                # on, when the pages that the kernel refers to hold something else.
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
        self._socket.close()


def _set_up(sock: socket.socket) -> None:
    """Let its calls block, for a heartbeat at most."""
    # A frame of a few bytes waits for nothing: Nagle's algorithm would hold it back until the one before is answered.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if isinstance(sock, ssl.SSLSocket):
        # Not the kernel's time-out: Python's ssl calls OpenSSL again and again when that has passed (CPython 3.11).
        sock.settimeout(HEARTBEAT.total_seconds())
        return
    # Not settimeout: then the descriptor does not block, and each piece that has come wakes up the interpreter.
    sock.setblocking(True)
    tick = struct.pack("@ll", 0, int(HEARTBEAT.total_seconds() * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, tick)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, tick)
    # SO_SNDBUF and SO_RCVBUF are left alone: to set one turns off the kernel's own tuning of it.


def _poll_for(sock: socket.socket, events: int) -> select.poll:
    poll = select.poll()
    poll.register(sock, events)
    return poll


def _unsent_bytes(sock: socket.socket) -> int:
    """How many bytes of what was written the peer's system has not acknowledged."""
    return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def _shut(sock: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):
        # Not SSLSocket's own, after which a writer in another thread would go on in the clear.
        socket.socket.shutdown(sock, how)


def _is_idle(sock: socket.socket) -> bool:
    try:
        # Not recv(), which looks no further than the time-out that a socket of TLS has, and waits for that.
        return not _poll_for(sock, select.POLLIN).poll(0)
    except (OSError, ValueError):
        return False  # it was closed just now


def _wake_up_at(sock: socket.socket, nbytes: int) -> bool:
    """Let a poll say that there is something to read once so many bytes are there; gives whether it can."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, nbytes)
    except OSError:
        return False
    return True


def _waits_by(poll: select.poll, *, tls: bool) -> Callable[[], None]:
    """What waits until at least a byte can be moved, where the call that moves it must not.

    A call that moves none is begun anew, with the whole of the kernel's time-out, whenever a signal's handler has
    run (PEP 475): with one every 100 ms it would never end. A poll's time goes on. Signals are for the main thread;
    the lanes have threads of their own, and are spared the poll.

    Raises:
        BlockingIOError: By what is returned: none could for a heartbeat.
    """
    if tls or threading.get_ident() != threading.main_thread().ident:
        return _at_once
    return functools.partial(_await, poll)


def _await(poll: select.poll) -> None:
    if not poll.poll(HEARTBEAT.total_seconds() * 1000):
        raise BlockingIOError


def _at_once() -> None:
    pass


# Equal addresses, and no look at routes: a peer at another address of this machine passes for a far one, which is
# slower and no more.
def is_local(sock: socket.socket) -> bool:
    """Whether the peer is on this machine."""
    try:
        return bool(sock.getsockname()[0] == sock.getpeername()[0])
    except OSError:
        return False  # it is gone already


def _round_trip(sock: socket.socket) -> float:
    try:
        # Not the mean, in which delayed acknowledgements of 40 ms are: the answer to the first packet comes at once.
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _MIN_RTT.stop)
    except (OSError, AttributeError):  # it is gone already; or no Linux
        return 0.0
    microseconds = int.from_bytes(info[_MIN_RTT], sys.byteorder)
    return microseconds / 1e6 if microseconds < _NO_SAMPLE else 0.0


# Where ``struct tcp_info`` (linux/tcp.h) has tcpi_min_rtt, microseconds; empty before Linux 4.6.
_MIN_RTT = slice(148, 152)
_NO_SAMPLE = 0xFFFFFFFF


# An eventfd is one descriptor where a pipe is two, and is never full: however often it is woken up before it looks,
# once is what it sees.
class Wakeup:
    """Wakes up one thread that waits for it or for a connection."""

    _descriptor = -1

    def __init__(self) -> None:
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def wake(self) -> None:
        """Wake it up, now or when it waits next. Any thread, not after :meth:`close`."""
        os.eventfd_write(self._descriptor, 1)

    def await_wake(self, connection: Connection | None, limit: timedelta) -> bool:
        """Wait to be woken up, for the connection, or the limit; gives whether the connection can be read."""
        # OpenSSL decrypts a record as a whole: the rest of it lies in its memory, of which a poll knows nothing.
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

    def fileno(self) -> int:
        """For a selector: it can be read once somebody has woken it up, until somebody waits."""
        return self._descriptor

    def close(self) -> None:
        """May be called twice."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    __del__ = close
