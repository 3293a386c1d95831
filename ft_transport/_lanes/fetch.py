"""Fetches messages over the lanes to one supplier, and lands them.

Strategy: each lane has a thread, which takes a message from the work that all lanes share, asks for it, and lands the
answer; a slow lane so takes fewer. What is asked for on a lane that breaks goes back to the others.
"""

from __future__ import annotations

from collections.abc import Callable

from ft_transport._lanes.chain import Route
from ft_transport._lanes.fabric import CMA
from ft_transport._lanes.lane import Lane
from ft_transport._lanes.opening import Opening
from ft_transport._lanes.session import DIRECT_FROM, Session, Unreadable
from ft_transport._lanes.sink import Incurable, Sink
from ft_transport._net.connection import Wakeup
from ft_transport._net.handshake_io import SslContexts
from ft_transport._net.stall import PeerStalled, StallTimer
from ft_transport._options import LaneOptions
from ft_transport._threads import ThreadGroup, uninterrupted
from ft_transport.errors import LocalProtocolError, TransferError, TransferTimeout

__all__ = ["Fetcher"]


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
        self._by_run = False
        self._lanes: list[Lane] = []
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
        # In a chain, what is asked for at once is passed on at once: there message after message, as it always was.
        self._by_run = self._num_messages is None and route.from_source and self._sink.relay is None
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

    def _add(self, opening: Opening, session: Session, timer: StallTimer) -> Lane:
        try:
            # Each lane has a timer of its own: one that stands still is not excused by its neighbours.
            lane = Lane(session, self._sink, timer, self._num_messages, by_run=self._by_run)
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

    def _run(self, opening: Opening, lane: Lane) -> None:
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
