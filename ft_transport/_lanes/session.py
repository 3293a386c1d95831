"""One side of a session over a connection: frames and messages, held to the table as they pass.

Strategy: a message is read and written piece by piece, and each piece is fingerprinted while it is in the processor's
cache: to read a state once more for its digests alone would cost a fifth of the speed where cores are few. Memory of a
user's may be given back while it is read; what tells so (``Held``) is asked where it is read, and after an error.

A message may be told by its place in the supplier's memory, and is read there (``_lanes.fabric``). All else is as for
one that comes over the connection: who asks for it, its digest behind it, what is done about damage. Where such a read
is under way for as long as the peer lets it, the connection says whether there is a peer.

Not here: what frames mean (``_lanes.protocol``), and how long a peer is waited for (``_net.stall``).
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import xxhash

from ft_transport._deadline import MAX_WAIT, Deadline
from ft_transport._lanes.fabric import Reader, Shown
from ft_transport._lanes.protocol import (
    HEADER_BYTES,
    TRAILER,
    LaneFrame,
    LaneHeader,
    LaneProtocol,
    State,
    decode_body,
    decode_header,
    encode,
    encode_header,
    num_messages,
)
from ft_transport._net.connection import Connection
from ft_transport._net.one_sided import Job
from ft_transport._net.stall import HEARTBEAT, StallTimer
from ft_transport._plan.blocks import Held
from ft_transport.errors import PeerFailure, RemoteProtocolError, TransferError

__all__ = ["DIRECT_FROM", "Session", "Target", "Unreadable", "fingerprint"]

logger = logging.getLogger("ft_transport")

# A message moves in pieces of this size, each of which is fingerprinted while it is in the processor's cache. Wherever
# one begins, its pages fit into a pipe of 1 MiB.
_PIECE_BYTES = (1 << 20) - mmap.PAGESIZE
# The same of what is read where it lies, and is only fingerprinted: fewer calls, and the outer cache is quick enough.
_READ_BYTES = 2 << 20
# Of so many bytes that are read where they lie, the digests are said at once.
_SAID_BYTES = 16 << 20
# Fewer bytes are as quickly here as the word where they are.
DIRECT_FROM = 64 << 10
# How often whoever waits for a read looks whether the peer has spoken, or somebody has ended the connection.
_LOOK = timedelta(milliseconds=50)


class Unreadable(PeerFailure):
    """Memory of the supplier's, which could be read before, cannot be read (any more)."""


class Target(NamedTuple):
    """Memory that a message is read into.

    Attributes:
        view: The bytes.
        held: What they are of, if it is a user's memory.
        provide: Called right before they are written to, if they may not be memory yet.
    """

    view: memoryview
    held: Held | None = None
    provide: Callable[[], None] | None = None


class Session:
    """A connection, and how far what is said on it has come.

    Args:
        connection: To the peer.
        protocol: New, or as far as it has come.

    Attributes:
        reader: As a destination, by what the supplier's memory is read; None if all comes over the connection.
        shown: As a supplier, by what this side's may be read.
        nbytes_direct: How many bytes were read from there.
    """

    def __init__(self, connection: Connection, protocol: LaneProtocol) -> None:
        self.connection = connection
        self.protocol = protocol
        self.reader: Reader | None = None
        self.shown: Shown | None = None
        self.nbytes_direct = 0
        self._early: int | None = None  # the digest of the message that is being read
        self._hidden: list[Shown] = []

    def send(self, frame: LaneFrame, timer: StallTimer, number: int = 0, body: Any = None) -> None:
        """Send a frame; raises as ``Connection.write``."""
        protocol = self.protocol
        protocol.sent(frame, number, num_messages(frame, body))
        if frame is LaneFrame.WAIT:
            self.connection.nbytes_alive += HEADER_BYTES
        self.connection.write([encode(frame, protocol.attempt, protocol.step, number, body)], timer)

    def recv(self, timer: StallTimer) -> tuple[LaneHeader, Any]:
        """The next frame, which must not be a message, and its body.

        Raises:
            RemoteProtocolError: It is damaged or out of order.
            PeerFailure, TransferTimeout: As ``Connection.read_into``.
        """
        header = self.recv_header(timer)
        if header.frame in (LaneFrame.MESSAGE, LaneFrame.PLACE):
            raise RemoteProtocolError(f"message {header.number} is out of order")
        return header, self.recv_body(header, timer)

    def recv_body(self, header: LaneHeader, timer: StallTimer) -> Any:
        """The body of a frame whose header is here already; raises as :meth:`recv`."""
        body = decode_body(header, bytes(self.connection.read(header.nbytes, timer)))
        self.protocol.received_body(header, body)
        return body

    def recv_header(self, timer: StallTimer) -> LaneHeader:
        """The next frame's header; raises as :meth:`recv`."""
        # Two reads for a frame, and none for what is behind it: nothing is kept in a buffer of ours, so a message can
        # go where it belongs.
        header = decode_header(self.connection.read(HEADER_BYTES, timer))
        self.protocol.received(header)
        return header

    def send_message(
        self,
        number: int,
        view: memoryview,
        digest: int | None,
        timer: StallTimer,
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
        protocol, connection = self.protocol, self.connection
        protocol.sent(LaneFrame.MESSAGE, number)
        header = LaneHeader(LaneFrame.MESSAGE, protocol.attempt, protocol.step, number, len(view))
        # The header waits in the kernel for the first bytes of the message, else it would be a packet of its own.
        connection.write([encode_header(header)], timer, more=True)
        hashed = xxhash.xxh3_64()
        update = _reads(hashed, held)
        # A digest that is known already leaves nothing to do on the way: all of it goes into one call.
        for piece in _pieces(view, len(view) if digest is not None else _PIECE_BYTES):
            if digest is None:
                update(piece)
            try:
                if steady:
                    connection.write_zero_copy(piece, timer)
                else:
                    connection.write([piece], timer, more=True)
            except PeerFailure:
                _check(held)  # the system cannot read what is not there either
                raise
        _check(held)
        digest = hashed.intdigest() if digest is None else digest
        connection.write([TRAILER.pack(digest)], timer)
        return digest

    @property
    def tells_places(self) -> bool:
        """Whether, as a supplier, it says where messages are, and not one by one."""
        return self.shown is not None and not self.shown.waits and self.protocol.state is State.DIRECT

    def place(self, view: memoryview, timer: StallTimer, held: Held | None) -> bytes | None:
        """Where the peer can read a message, which stays as it is until it has; None if it is to be sent.

        Raises:
            LocalProtocolError: Its memory was taken away.
            PeerFailure, TransferTimeout: As ``Connection.write``.
        """
        if self.shown is None or self.protocol.state is not State.DIRECT or len(view) < DIRECT_FROM:
            return None
        _check(held)
        try:
            return self.shown.place(view, held, partial(self.speak, timer=timer))
        except OSError as exc:
            logger.warning("%s is sent what it could have read: %s", self.connection.address, exc)
            self.hide()
            return None

    def send_places(
        self,
        number: int,
        places: Sequence[bytes],
        messages: Sequence[tuple[memoryview, int | None, Held | None]],
        timer: StallTimer,
    ) -> list[int]:
        """Say where the messages from ``number`` on are, and then their digests; gives these.

        Args:
            number: The first one's.
            places: Of each, by :meth:`place`.
            messages: Of each the bytes, the digest where it is known, and what the bytes are of.
            timer: As ever.

        Raises:
            As :meth:`place`.
        """
        self.send(LaneFrame.PLACE, timer, number, places)
        digests: list[int] = []
        num_said = nbytes = 0
        for view, digest, held in messages:
            # While the peer reads. Should its memory be given back meanwhile, neither side's read ends a process, and
            # what the peer has is not what the digest is of.
            digests.append(fingerprint(view, held) if digest is None else digest)
            nbytes += len(view)
            # Now and then, so that neither side is silent for as long as all of them take, nor goes on when it is over.
            if nbytes >= _SAID_BYTES or len(digests) == len(messages):
                self.connection.write([b"".join(map(TRAILER.pack, digests[num_said:]))], timer)
                self.connection.nbytes_wire += nbytes
                num_said, nbytes = len(digests), 0
                timer.check()
        return digests

    def recv_message(self, header: LaneHeader, target: Target, *, verify: bool, timer: StallTimer) -> int | None:
        """Receive a message, whose header is here already.

        Returns:
            Its digest, None if it came damaged.

        Raises:
            LocalProtocolError: Memory of a user's was taken away.
            RemoteProtocolError: It is of another length.
            PeerFailure, TransferTimeout: As ``Connection.read_into``.
        After an error: the target holds some, all or none of it.
        """
        view, held, provide = target
        if header.nbytes != len(view):
            raise RemoteProtocolError(f"message {header.number}: expected {len(view)} bytes, got {header.nbytes}")
        if provide is not None:
            provide()
        hashed = xxhash.xxh3_64()
        update = _reads(hashed, held)
        for piece in _pieces(view, _PIECE_BYTES if verify else len(view)):
            try:
                self.connection.read_into(piece, timer)
            except PeerFailure:
                _check(held)
                raise
            if verify:
                update(piece)
        _check(held)
        (expected,) = self._recv_digests(1, timer)
        return expected if not verify or hashed.intdigest() == expected else None

    def read_messages(
        self,
        places: Sequence[bytes],
        targets: Sequence[Target],
        *,
        verify: bool,
        timer: StallTimer,
    ) -> list[int | None]:
        """Read messages from where the supplier has them; gives the digest of each, None if it came damaged.

        After an error: any of the memory holds some, all or none of its message.

        Args:
            places: Of each.
            targets: Where each is to land.
            verify: As in :meth:`recv_message`, and what is raised as well.
            timer: As ever.
        """
        assert self.reader is not None, "this side has said DIRECT"
        wait = partial(self._hear_of_message, timer=timer)
        try:
            # All of them first, since what runs between two copies finds nothing of its own in the caches.
            fills = []
            for place, (view, held, provide) in zip(places, targets, strict=True):
                hashed = xxhash.xxh3_64()
                read = self.reader.read_from(place, len(view), held, wait)
                fills.append((view, provide, read, _reads(hashed, held), hashed))
            for view, provide, read, update, _ in fills:
                if provide is not None:
                    provide()
                for piece in _pieces(view, _READ_BYTES):
                    read(piece)
                    if verify:
                        update(piece)
                    self.connection.nbytes_wire += len(piece)
                    self.nbytes_direct += len(piece)
                    timer.progressed()
                    timer.check()  # whatever else it is, a copy is not waited for: the deadline holds between two
        except TransferError:
            raise  # a TransferTimeout is an OSError, too
        except OSError as exc:
            for target in targets:
                _check(target.held)
            raise Unreadable(f"the supplier's memory cannot be read: {exc}") from None
        for target in targets:
            _check(target.held)
        there = self._recv_digests(len(fills), timer)
        if not verify:
            return [*there]
        return [
            expected if hashed.intdigest() == expected else None
            for (*_, hashed), expected in zip(fills, there, strict=True)
        ]

    def _recv_digests(self, num: int, timer: StallTimer) -> list[int]:
        # Behind the messages, so that the one who reads them first can take their digests while they leave.
        early, self._early = self._early, None
        if early is not None:
            return [early]
        return [digest for (digest,) in TRAILER.iter_unpack(self.connection.read(num * TRAILER.size, timer))]

    def hide(self) -> None:
        """As a supplier, begin to let nothing of this side be read any more. Returns at once."""
        shown, self.shown = self.shown, None
        if shown is not None:
            self._hidden.append(shown)
            shown.close()

    def end(self) -> None:
        """As a supplier, at the lane's end: hide what is shown, and wait until nobody can read it, nor what was."""
        # Not in hide: while it is waited for, nobody says that this side lives.
        self.hide()
        for shown in self._hidden:
            shown.await_closed()

    # ------------------------------------------------------- while something goes on past the connection

    def _hear_of_message(self, job: Job[Any], timer: StallTimer) -> None:
        # What comes next is its digest, and then nothing but WAIT: on such a lane one message is asked for at a time.
        (self._early,) = self._recv_digests(1, timer)
        self.hear(job, timer)

    def hear(self, job: Job[Any], timer: StallTimer, limit: timedelta = MAX_WAIT) -> None:
        """Wait until a job is done, as long as the supplier says that it lives: that the job goes on says nothing.

        Raises:
            OSError: It takes longer than the limit.
            RemoteProtocolError: The supplier says something else.
            PeerFailure, TransferTimeout: As ``Connection.read_into``.
        """
        patience = Deadline(limit)
        while not job.await_done(_LOOK):
            _check_patience(patience)
            while not self.connection.idle:
                header, _ = self.recv(timer)
                if header.frame is not LaneFrame.WAIT:
                    raise RemoteProtocolError(f"{header.frame.name} in the place of WAIT")
                timer.check()  # there may be something to read each time
            timer.check()
        timer.progressed()

    def speak(self, job: Job[Any], timer: StallTimer, limit: timedelta = MAX_WAIT) -> None:
        """Wait until a job is done, and say meanwhile that this side lives.

        Raises:
            OSError: It takes longer than the limit.
            PeerFailure, TransferTimeout: As ``Connection.write``.
        """
        patience = Deadline(limit)
        while not job.await_done(HEARTBEAT):
            _check_patience(patience)
            self.send(LaneFrame.WAIT, timer)
            timer.check()

    def await_question(self, timer: StallTimer) -> None:
        """Wait until the peer says something, and say meanwhile that this side lives, if it listens to that."""
        # Also once something has been hidden: that its messages are sent is no news to the peer.
        shown = self.shown or next(reversed(self._hidden), None)
        while shown is not None and shown.waits and not self.connection.await_peer(HEARTBEAT):
            self.send(LaneFrame.WAIT, timer)
            timer.check()


def _check_patience(patience: Deadline) -> None:
    if patience.expired():
        raise OSError(f"no answer within {patience.timeout.total_seconds():g} s")


def _pieces(view: memoryview, step: int) -> Iterator[memoryview]:
    return (view[begin : begin + step] for begin in range(0, len(view), step or 1))


def _check(held: Held | None) -> None:
    if held is not None:
        held.check()


def _reads(hashed: xxhash.xxh3_64, held: Held | None) -> Callable[[memoryview], object]:
    return hashed.update if held is None else held.reads(hashed.update)


def fingerprint(view: memoryview, held: Held | None = None) -> int:
    """The digest that :meth:`Session.send_message` would send; raises as it."""
    hashed = xxhash.xxh3_64()
    update = _reads(hashed, held)
    # Whoever gives memory back waits for its readers (``_plan.lent``): for a piece, and not for a message.
    for piece in _pieces(view, len(view) if held is None else _READ_BYTES):
        update(piece)
    return hashed.intdigest()
