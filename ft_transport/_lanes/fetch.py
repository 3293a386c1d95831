"""Fetches messages over the lanes to one supplier, and lands them.

Strategy: each lane has a thread, which takes a message from the work that all lanes share, asks for it, and lands the
answer; a slow lane so takes fewer. What is asked for on a lane that breaks goes back to the others.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from ft_transport._lanes import fabric as _fabric
from ft_transport._lanes.chain import Route
from ft_transport._lanes.fabric import CMA, new_reader
from ft_transport._lanes.opening import Opening
from ft_transport._lanes.protocol import MAX_RUN, LaneFrame, LaneHeader
from ft_transport._lanes.session import DIRECT_FROM, Session, Unreadable
from ft_transport._lanes.sink import Incurable, Landing, Sink
from ft_transport._net.connection import Wakeup
from ft_transport._net.handshake_io import SslContexts
from ft_transport._net.stall import PeerStalled, StallTimer
from ft_transport._options import LaneOptions
from ft_transport._plan.buffers import by_turns
from ft_transport._threads import ThreadGroup, uninterrupted
from ft_transport.errors import LocalProtocolError, TransferError, TransferTimeout

__all__ = ["Fetcher"]

logger = logging.getLogger("ft_transport")

# Messages that one lane has asked for: while one is on its way, the next ones are asked for already. With two, the lane
# would run dry whenever an answer's last byte and the next question cross; more only move the work away from lanes that
# are quicker.
_WINDOW = 3
# Of those that are read where they lie, so many bytes are asked for at once, and no more than half of a lane's share of
# what is left: so lanes end at about the same time. A copy of 2 MiB leaves nothing of ours in the caches, and what
# Python does for one message costs some 0.4 ms then; what it does for many of them, one behind the other, next to
# nothing. With 16 MiB it was seen to be a tenth slower, with 256 MiB no quicker.
_RUN_BYTES = 128 << 20


class Fetcher:
    """The lanes to one supplier. All but the lanes themselves is for one thread.

    Args:
        sink: Where messages land.
        wakeup: Rung when a message has landed or a lane has ended.
        options: How many lanes, and whether each message is worth a ring.
        attempt: As in every header.
        step: As in every header.
        num_messages: How many to fetch, over one lane; None for all that are left.
        direct: Whether to read the memory of a supplier, if the options say so.

    Attributes:
        error: Why a lane could not be opened or has ended, the newest; None while all is well.
        unreadable: Whether that memory could not be read any more: new lanes should not try.
    """

    def __init__(
        self,
        sink: Sink,
        wakeup: Wakeup,
        options: LaneOptions,
        attempt: int,
        step: int,
        *,
        num_messages: int | None = None,
        direct: bool = True,
    ) -> None:
        self.error: TransferError | None = None
        self.unreadable = False
        self._sink = sink
        self._wakeup = wakeup
        self._options = options
        self._ids = (attempt, step)
        self._num_messages = num_messages
        # Who would be sent all of it, message by message, need not ask.
        self._fabric = options.reads_by if direct and max(sink.sizes, default=0) >= DIRECT_FROM else ""
        self._is_alone = False  # one lane, since it may have a fabric
        self._most = 1  # lanes
        self._lanes: list[_Lane] = []
        self._crew = ThreadGroup()
        self._closing = False
        self._opening: Opening | None = None

    def open(self, route: Route, contexts: SslContexts | None, timer: Callable[[str], StallTimer]) -> None:
        """Open the lanes. What keeps one from opening is in ``error``; the others are opened all the same.

        Raises:
            TransferTimeout: The deadline passed.
        """
        try:
            self._opening = opening = Opening(route, *self._ids, contexts, timer)
            own = opening.begin()
            session = opening.dial(own)
        except TransferTimeout:
            raise
        except TransferError as exc:
            self.error = exc
            return
        except OSError as exc:
            self.error = LocalProtocolError(f"a lane cannot be opened: {exc}")
            return
        lanes = self._options.lanes if self._num_messages is None else 1
        # Each lane has an endpoint, and a thread of a backend's that keeps a core busy, on either side: so one, unless
        # somebody asks for more. Who turns out to have no such fabric gets the others, see :meth:`look`.
        self._is_alone = lanes == "auto" and self._fabric not in ("", CMA)
        opening.decide(1 if self._is_alone else lanes, session, self._sink.lane_bytes)
        # One more than there are messages would be opened, and waited for at the end, for nothing.
        self._most = max(self._sink.pending.num_todo, 1)
        lane = self._add(opening, session, own)
        if self._start(self._run, opening, lane):
            self._open_rest(opening)
        else:
            lane.close()

    def look(self) -> None:
        """Open more lanes, if that pays. Call it often."""
        opening = self._opening
        if opening is None:
            return
        if self._is_alone and any(lane.lacks_fabric for lane in self._lanes):
            self._is_alone, self._fabric = False, ""
            opening.decide(self._options.lanes, self._lanes[0].session, self._sink.lane_bytes)
            self._open_rest(opening)
        elif opening.count.look(self.nbytes_wire):
            self._open_rest(opening)

    def _open_rest(self, opening: Opening) -> None:
        while opening.num_begun < min(opening.count.number, self._most):
            timer = opening.begin()
            if not self._start(self._run_another, opening, timer):
                opening.end(timer)
                return

    def _start(self, run: Callable[..., None], *args: object) -> bool:
        """Have a lane run in a thread of its own; gives whether there is one."""
        try:
            self._crew.start("lane", run, *args)
        except RuntimeError as exc:  # no more threads to be had
            self._note(LocalProtocolError(f"a lane cannot be served: {exc}"))
            return False
        return True

    def _note(self, error: TransferError) -> None:
        """Say why there is one lane less than there could be."""
        # What has ended a lane says more: whether new ones would help is asked of it.
        if not self._closing and self.error is None:
            self.error = error

    def _run_another(self, opening: Opening, timer: StallTimer) -> None:
        try:
            lane = self._add(opening, opening.dial(timer), timer)
        except TransferError as exc:
            self._note(exc)
        except Exception as exc:
            self._note(LocalProtocolError(f"a lane cannot be opened: {type(exc).__name__}: {exc}"))
        else:
            self._run(opening, lane)
        finally:
            opening.end(timer)
            self._wakeup.wake()

    def _add(self, opening: Opening, session: Session, timer: StallTimer) -> _Lane:
        try:
            # Each lane has a timer of its own: one that stands still is not excused by its neighbours.
            lane = _Lane(session, self._sink, timer, self._num_messages)
        except BaseException:
            session.connection.close()
            raise
        self._lanes.append(lane)
        # Only now: until it is a lane it counts as one that is coming.
        opening.end(timer)
        # And this last: whoever closes all goes through the list once it has said so.
        if self._closing:
            lane.abort()
        return lane

    @property
    def alive(self) -> bool:
        """Whether a lane is open, or may yet be."""
        # In this order: what is dialled is a lane before it is not dialled any more.
        opening = self._opening
        return (opening is not None and opening.is_under_way) or any(lane.is_open for lane in self._lanes)

    @property
    def nbytes(self) -> int:
        """Bytes of the messages that have landed."""
        return sum(lane.nbytes for lane in self._lanes)

    @property
    def nbytes_wire(self) -> int:
        """All bytes of the lanes, in both directions."""
        return sum(lane.session.connection.nbytes_wire for lane in self._lanes)

    @property
    def num_lanes(self) -> int:
        """How many there have been."""
        return len(self._lanes)

    @property
    def nbytes_direct(self) -> int:
        """Bytes that were read from the supplier's memory."""
        return sum(lane.session.nbytes_direct for lane in self._lanes)

    @property
    def fatal(self) -> Exception | None:
        """This side's own trouble, which no other supplier would mend."""
        return next((lane.fatal for lane in self._lanes if lane.fatal is not None), None)

    @property
    def hopeless(self) -> bool:
        """Whether opening new lanes to the same supplier would not help."""
        # New lanes help where a connection has broken. Who is silent, or sends what is always damaged, would be at the
        # other end of them, too.
        return isinstance(self.error, (PeerStalled, Incurable))

    def close(self) -> None:
        """End all lanes; when this returns, nothing lands any more. May be called twice."""
        uninterrupted(self._close)

    def _close(self) -> None:
        self._closing = True
        self._sink.pending.wake()
        if (opening := self._opening) is not None:
            opening.cancel()
        for lane in self._lanes:
            lane.abort()
        self._crew.join()
        # In this order: interrupted in between, this is called again.
        self._opening = None
        if opening is not None:
            opening.close()

    def _run(self, opening: Opening, lane: _Lane) -> None:
        # This wakes up the thread that holds the conversation with the source. Once every few milliseconds would be
        # nothing, but it would be once for each message, and the reader of progress is the only one to want it.
        eager = self._options.on_progress is not None
        try:
            with self._sink.streams.use(for_good=True):
                if self._fabric:
                    lane.try_fabric(self._fabric)
                    self._wakeup.wake()
                while lane.ask(lambda: self._closing, lambda: opening.count.number):
                    lane.take_answer()
                    if eager or self._sink.pending.complete:
                        self._wakeup.wake()
        except LocalProtocolError as exc:
            lane.fatal = self._sink.named(exc)
        except TransferError as exc:
            self.unreadable |= isinstance(exc, Unreadable)
            if not self._closing:
                self.error = exc
        except Exception as exc:
            lane.fatal = exc
        finally:
            lane.close()
            self._wakeup.wake()


class _Lane:
    """One lane, for the thread that runs it; :meth:`abort` is for any.

    Attributes:
        session: With the supplier.
        nbytes: Bytes of the messages that have landed by it.
        fatal: This side's own trouble on it.
        is_open: False once its connection is closed.
        lacks_fabric: Whether the supplier's memory was found not to be readable.
    """

    def __init__(self, session: Session, sink: Sink, timer: StallTimer, num_messages: int | None) -> None:
        self.session = session
        self.nbytes = 0
        self.fatal: Exception | None = None
        self.is_open = True
        self.lacks_fabric = False
        self._sink = sink
        self._timer = timer
        self._num_left = num_messages
        # What has landed in one is copied to an accelerator while the next message lands in the other.
        self._buckets = by_turns(sink.streams)
        self._lock = threading.Lock()

    def try_fabric(self, fabric: str) -> None:
        """Find out whether the supplier's memory can be read; if so, it tells from now on where messages are."""
        session, timer = self.session, self._timer
        if fabric == CMA and not session.connection.is_local:
            return
        try:
            session.reader = reader = new_reader(fabric, max(self._sink.sizes, default=0))
            # The supplier has nothing to say yet, and is not silent.
            hello = reader.hello(partial(session.hear, timer=StallTimer(timer.deadline), limit=_fabric.OPENING))
            timer.progressed()
            session.send(LaneFrame.LOCATE, timer, body=[fabric, hello])
            reader.reach(self._location(), partial(session.hear, timer=timer, limit=_fabric.OPENING))
        except OSError as exc:
            # As within a machine on most with containers, and on none of two: messages come over the connection then.
            # Whoever has asked for one by name wants to know.
            level = logging.DEBUG if fabric == CMA else logging.WARNING
            logger.log(level, "the memory of %s cannot be read by %s: %s", session.connection.address, fabric, exc)
            self._leave_fabric()
            self.lacks_fabric = True
            return
        session.send(LaneFrame.DIRECT, timer)

    def _location(self) -> bytes:
        while (heard := self.session.recv(self._timer))[0].frame is LaneFrame.WAIT:
            self._timer.check()
        (location,) = heard[1]
        if not location:
            raise OSError("it does not have that, or will not be read")
        return bytes(location)

    def _leave_fabric(self) -> None:
        reader, self.session.reader = self.session.reader, None
        if reader is not None:
            reader.close()

    def ask(self, stopped: Callable[[], bool], num_lanes: Callable[[], int]) -> bool:
        """Ask for as much as a lane may have asked for; False at the end."""
        pending, asked = self._sink.pending, self.session.protocol.asked
        # One that waits hears of nothing but the message that it waits for.
        window = 1 if self.session.reader is not None and self.session.reader.waits else _WINDOW
        while len(asked) < window and self._num_left != 0:
            # A second one once there is one for each of the others, also for those that are being opened.
            message = pending.take(stopped, block=not asked, leave=num_lanes() - 1 if asked else 0)
            if message is None:
                break
            if not asked:
                self._timer.progressed()  # nothing was asked for: it was not the supplier's silence
            self._ask_for(message, num_lanes())
        return bool(asked)

    def _ask_for(self, message: int, num_lanes: int) -> None:
        # Only now, and not for all messages beforehand: memory is read once, just before it is asked about, by as many
        # threads as there are lanes.
        num, claim = 1, self._sink.claim(message, self._buckets[-1])
        if claim is not None:
            self.session.send(LaneFrame.CHECK, self._timer, message, [claim])
        else:
            num = self._run_from(message, num_lanes)
            self.session.send(LaneFrame.WANT, self._timer, message, [num])
        if self._num_left is not None:
            self._num_left -= num

    def _run_from(self, message: int, num_lanes: int) -> int:
        """Take those behind a message as well, to ask for all at once; gives how many they are together."""
        sink, reader, num = self._sink, self.session.reader, 1
        if reader is None or reader.waits or self._num_left is not None:
            return num
        most, nbytes = min(sink.pending.num_todo // (2 * num_lanes), MAX_RUN), sink.sizes[message]
        while num < most and nbytes < _RUN_BYTES and sink.pending.take_next(message + num, may=sink.is_missing):
            nbytes += sink.sizes[message + num]
            num += 1
        return num

    def take_answer(self) -> None:
        """Read one frame, and land the messages if it is of any."""
        header = self.session.recv_header(self._timer)
        if header.frame is LaneFrame.MESSAGE:
            self._land(header)
            return
        body = self.session.recv_body(header, self._timer)
        if header.frame is LaneFrame.PLACE:
            self._land_from(header.number, body)
        elif header.frame is LaneFrame.SAME:
            self._sink.keep(header.number)

    def _land(self, header: LaneHeader) -> None:
        with self._owed(range(header.number, header.number + 1)) as owed:
            (landing,) = self._begin(owed)
            digest = self.session.recv_message(
                header, landing.view, verify=self._sink.verified, timer=self._timer, held=landing.held
            )
            self._end(owed, [landing], [digest])

    def _land_from(self, first: int, places: Sequence[bytes]) -> None:
        """Read messages from where they are. What each takes beside the copy is done for many, before and behind."""
        with self._owed(range(first, first + len(places))) as owed:
            while owed:
                landings = self._begin(owed)
                targets = [(landing.view, landing.held) for landing in landings]
                there, places = places[: len(targets)], places[len(targets) :]
                digests = self.session.read_messages(there, targets, verify=self._sink.verified, timer=self._timer)
                self._end(owed, landings, digests)

    @contextmanager
    def _owed(self, messages: range) -> Iterator[deque[int]]:
        """Messages that have begun to come, and so are no longer among those asked for; after an error they are."""
        owed = deque(messages)
        try:
            yield owed
        except BaseException:
            self.session.protocol.asked.extendleft(reversed(owed))
            raise

    def _begin(self, messages: Iterable[int]) -> list[Landing]:
        """Where messages land that come now; not yet of those behind one that is staged, which may need its bucket."""
        landings: list[Landing] = []
        for message in messages:
            self._buckets.rotate()
            landings.append(self._sink.begin(message, self._buckets[0]))
            if landings[-1].staged is not None:
                break
        return landings

    def _end(self, owed: deque[int], landings: Sequence[Landing], digests: Sequence[int | None]) -> None:
        for landing, digest in zip(landings, digests, strict=True):
            sound = self._sink.end(landing, digest)
            owed.popleft()
            if sound:
                self.nbytes += len(landing.view)
            else:
                # It is back among what is to be fetched, and any lane may be the next to ask for it.
                self._sink.note_damage(landing.message)

    def abort(self) -> None:
        """Let whoever is in a call on it raise at once."""
        with self._lock:  # else it could be closed just now, and the descriptor be somebody else's already
            if self.is_open:
                self.session.connection.abort()
        self._timer.cancel("the lane was closed")  # it may be reading memory, and not from the connection

    def close(self) -> None:
        """Give back what was asked for and has not come, then the descriptor."""
        self._leave_fabric()
        # Before it counts as closed: whoever sees that no lane is open looks at what is left.
        self._sink.pending.give_back(self.session.protocol.asked)
        with self._lock:
            self.is_open = False
            self.session.connection.close()
