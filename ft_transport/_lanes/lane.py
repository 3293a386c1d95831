"""One lane, on the side that fetches: what is asked for on it, and how the answers land.

Strategy: a lane asks for a message while the ones before are on their way. Those that are read where they lie it asks
for by the run: a copy of some MiB leaves nothing of ours in the processor's caches, so what Python does between two
copies takes many times as long as the same for all of a run at once, before and behind.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from ft_transport._lanes import fabric as _fabric
from ft_transport._lanes.fabric import CMA, new_reader
from ft_transport._lanes.protocol import MAX_RUN, LaneFrame, LaneHeader
from ft_transport._lanes.session import Session
from ft_transport._lanes.sink import Landing, Sink
from ft_transport._net.stall import StallTimer
from ft_transport._plan.buffers import by_turns

__all__ = ["Lane"]

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


class Lane:
    """One lane, for the thread that runs it; :meth:`abort` is for any.

    Args:
        session: With the supplier.
        sink: Where messages land.
        timer: Of this lane alone.
        num_messages: How many to fetch; None for as many as there are.
        by_run: Whether to ask for many at once where they can be read.

    Attributes:
        session: With the supplier.
        nbytes: Bytes of the messages that have landed by it.
        fatal: This side's own trouble on it.
        is_open: False once its connection is closed.
        lacks_fabric: Whether the supplier's memory was found not to be readable.
    """

    def __init__(
        self, session: Session, sink: Sink, timer: StallTimer, num_messages: int | None, *, by_run: bool
    ) -> None:
        self.session = session
        self.nbytes = 0
        self.fatal: Exception | None = None
        self.is_open = True
        self.lacks_fabric = False
        self._sink = sink
        self._timer = timer
        self._num_left = num_messages
        self._by_run = by_run
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
        if not self._by_run or reader is None or reader.waits:
            return num
        most, nbytes = min(sink.pending.num_todo // (2 * num_lanes), MAX_RUN), sink.sizes[message]
        while num < most and nbytes < _RUN_BYTES:
            following = message + num
            if not (sink.is_missing(following) and sink.pending.take_next(following)):
                break
            nbytes += sink.sizes[following]
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
        try:
            (landing,) = self._begin((header.number,))
            digest = self.session.recv_message(header, landing.target, verify=self._sink.verified, timer=self._timer)
            sound = self._sink.end(landing, digest)
        except BaseException:
            # It had begun to come and so is no longer among those asked for.
            self.session.protocol.asked.appendleft(header.number)
            raise
        self._note(landing, sound=sound)

    def _land_from(self, first: int, places: Sequence[bytes]) -> None:
        """Read messages from where they are. What each takes beside the copy is done for many, before and behind."""
        owed = deque(range(first, first + len(places)))
        try:
            while owed:
                landings = self._begin(owed)
                targets = [landing.target for landing in landings]
                there, places = places[: len(targets)], places[len(targets) :]
                digests = self.session.read_messages(there, targets, verify=self._sink.verified, timer=self._timer)
                for landing, digest in zip(landings, digests, strict=True):
                    sound = self._sink.end(landing, digest)
                    owed.popleft()
                    self._note(landing, sound=sound)
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

    def _note(self, landing: Landing, *, sound: bool) -> None:
        if sound:
            self.nbytes += len(landing.target.view)
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
