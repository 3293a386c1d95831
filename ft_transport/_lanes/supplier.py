"""Answers on lanes: the source to its destinations, and a destination to the one behind it in the chain.

Strategy: it keeps no account of anybody. A question comes, the answer goes, a thread for each lane; who has what, who
was sent something damaged and what a broken lane owed is known where it is asked. Source and relay differ in what they
have (:class:`MessageStore`) and in nothing else. From an accelerator, the next answer is copied to the host while the
one before is sent.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, NoReturn, Protocol

from ft_transport._deadline import Deadline
from ft_transport._device import NO_STREAMS, NOTHING, Copies, Streams
from ft_transport._lanes import fabric as _fabric
from ft_transport._lanes.fabric import new_shown
from ft_transport._lanes.protocol import MAX_RUN, LaneFrame, LaneHeader, LaneProtocol, Role, num_messages
from ft_transport._lanes.session import Session, fingerprint
from ft_transport._net.connection import Connection
from ft_transport._net.stall import HEARTBEAT, StallTimer
from ft_transport._plan.blocks import Held
from ft_transport._plan.buffers import Bucket, aligned, by_turns
from ft_transport._threads import ThreadGroup, uninterrupted
from ft_transport.errors import LocalProtocolError, RemoteProtocolError, TransferError

__all__ = ["MessageStore", "Supplier"]

logger = logging.getLogger("ft_transport")

# Bounds what somebody who knows the secret can make us start: a thread for each lane.
# A destination opens 1 to 16, and as many again while the ones before are not known to be gone.
MAX_LANES = 64

# Who is waited for, and has taken no byte for so long, is not waited for any longer.
_STILL = 2 * HEARTBEAT


class MessageStore(Protocol):
    """Messages to supply.

    Attributes:
        sizes: Bytes of each message.
        verified: Whether messages have digests.
        steady: Whether their memory stays as it is until its reader has it, or learns that the transfer has failed.
        fabric: By what readers may take it from this process's memory themselves (``_lanes.fabric``); empty for none.
        is_whole_transfer: Whether a message that cannot be read ends the transfer, as the reader learns elsewhere.
    """

    verified: bool
    fabric: str
    is_whole_transfer: bool

    @property
    def steady(self) -> bool: ...
    @property
    def sizes(self) -> Sequence[int]: ...

    def has(self, message: int) -> bool:
        """Whether a message is there by now."""
        ...

    def await_message(self, message: int) -> bool:
        """Wait for a message, no longer than a heartbeat; gives whether it is there."""
        ...

    def view(self, message: int, bucket: Bucket) -> memoryview:
        """The bytes of a message; in the bucket, which has room for it, where they are not in one place.

        From an accelerator they are only on their way there, in the calling thread's streams."""
        ...

    def held(self, message: int) -> Held | None:
        """Where :meth:`view` gives a user's memory, what tells whether it is there."""
        ...

    def note_error(self, error: LocalProtocolError) -> None:
        """Memory that was to be read is not there any more."""
        ...

    def digest(self, message: int) -> int | None:
        """The digest that a message has for everybody, None while nobody has taken it."""
        ...

    def note_digest(self, message: int, digest: int) -> None:
        """What the first one to read a message took; later ones change nothing."""
        ...


class Supplier:
    """The lanes of one destination, each with a thread.

    Args:
        store: What there is to supply. Read until :meth:`close` has returned.
        timer: No lane outlasts its deadline. It learns of all that moves.
        streams: To copy in.

    Attributes:
        nbytes_wire: All bytes of the lanes that have ended.
    """

    def __init__(self, store: MessageStore, timer: StallTimer, streams: Streams = NO_STREAMS) -> None:
        self.nbytes_wire = 0
        self._store = store
        self._timer = timer
        self._streams = streams
        self._changed = threading.Condition()
        self._closed = False
        self._lanes: set[Connection] = set()
        self._crew = ThreadGroup()

    def attach(self, connection: Connection, header: LaneHeader) -> None:
        """Serve a lane, whose first frame was ``header``, in a thread of its own."""
        with self._changed:
            if self._closed or len(self._lanes) >= MAX_LANES:
                connection.close()
                return
            self._lanes.add(connection)
            try:
                self._crew.start("supplier", self._run, connection, header)
            except RuntimeError as exc:  # no more threads to be had
                logger.warning("a lane of %s cannot be served: %s", connection.address, exc)
                self._lanes.discard(connection)
                connection.close()

    def _run(self, connection: Connection, header: LaneHeader) -> None:
        try:
            self._serve(connection, header)
        except LocalProtocolError as exc:
            logger.warning("a lane of %s has ended: %s", connection.address, exc)
            # Memory that was given back is not the destination's fault, nor the connection's: the whole transfer is
            # void by it.
            self._store.note_error(exc)
            if self._store.is_whole_transfer:
                self._await_close()
        except TransferError as exc:
            # The destination closes its lanes once it has everything, and asks elsewhere for what a lane still owed.
            logger.debug("a lane of %s has ended: %s", connection.address, exc)
        except Exception:
            logger.exception("a lane of %s has failed", connection.address)
        finally:
            connection.close()
            with self._changed:
                self.nbytes_wire += connection.nbytes_wire
                self._lanes.discard(connection)
                self._changed.notify_all()

    def _serve(self, connection: Connection, header: LaneHeader) -> None:
        protocol = LaneProtocol(Role.SOURCE, header.attempt, header.step)
        protocol.received(header)
        # Without a stall time-out: a destination asks when it has room. That it lives is seen on its control
        # connection.
        timer = StallTimer(self._timer.deadline)
        session = Session(connection, protocol)
        lane = _Lane(session, self._store, self._streams, timer, self._timer.progressed)
        try:
            with self._streams.use(for_good=True):
                lane.run()
        finally:
            session.end()

    def _await_close(self) -> None:
        """Keep a lane that has nothing more to say: without it, the destination would ask for the same again."""
        with self._changed:
            while not self._changed.wait_for(lambda: self._closed, HEARTBEAT.total_seconds()):
                if self._timer.deadline.expired():
                    break

    @property
    def num_lanes(self) -> int:
        """How many are open."""
        return len(self._lanes)

    def drain(self) -> None:
        """Wait until no lane is open, as long as bytes arrive on one and the deadline has not passed. Never raises.

        Whoever stands still can have the rest from the source, which waits for it longer: the one who waits here has
        its state, and a step to do.
        """
        deadline, still, arrived = self._timer.deadline, Deadline(_STILL), -1
        with self._changed:
            while self._lanes and not deadline.expired():
                now = self.nbytes_wire + sum(lane.nbytes_arrived for lane in self._lanes)
                if now > arrived:
                    still, arrived = Deadline(_STILL), now
                elif still.expired():
                    break
                limit = min(HEARTBEAT / 2, deadline.remaining(), still.remaining())
                self._changed.wait_for(lambda: not self._lanes, limit.total_seconds())
            if self._lanes:
                why = "stands still" if still.expired() else "has not come to an end by the deadline"
                logger.warning("a destination has not fetched everything from here, and %s", why)

    def close(self) -> None:
        """End all lanes. When this returns, no thread reads the store any more. May be called twice."""
        uninterrupted(self._close)

    def _close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            for connection in self._lanes:
                # By shutdown; each lane's own thread closes it.
                connection.abort()
        self._crew.join()


class _Question(NamedTuple):
    """What was asked: which message, and with CHECK the asker's digest."""

    message: int
    digest: int | None


class _Answer(NamedTuple):
    """What is sent.

    Attributes:
        question: The question.
        digest: Of the message, None where nobody has taken it.
        view: The bytes of the message.
        held: What tells whether they are there, of a user's memory.
        staged: Whether they are in a bucket.
        copied: Behind what brings them there from an accelerator.
    """

    question: _Question
    digest: int | None
    view: memoryview
    held: Held | None
    staged: bool
    copied: Copies


class _Lane:
    """One lane, for the thread that serves it.

    Args:
        session: With the one who asks.
        store: What there is to supply.
        streams: That the thread copies in.
        timer: Until when it is served.
        progressed: Called whenever it has moved.
    """

    def __init__(
        self,
        session: Session,
        store: MessageStore,
        streams: Streams,
        timer: StallTimer,
        progressed: Callable[[], None],
    ) -> None:
        self._session = session
        self._store = store
        self._streams = streams
        self._timer = timer
        self._progressed = progressed
        # A message is in the kernel, or in the peer's hands, when the next one is asked for. From an accelerator the
        # next one is copied while the one before is sent.
        self._buckets = by_turns(streams)
        self._questions: deque[_Question] = deque()
        self._answers: deque[_Answer] = deque()

    def run(self) -> NoReturn:
        """Answer; raises in the end, as ``Session.recv`` does when the other side closes the lane."""
        while True:
            if not self._answers:
                self._begin(waiting=True)
            while self._has_room() and self._begin(waiting=False):
                pass
            self._send(self._answers.popleft())

    def _has_room(self) -> bool:
        """Whether one more answer can be begun: if its message is staged, there is a bucket."""
        # Where messages are told by their places, as many as were asked for are told at once.
        most = MAX_RUN if self._session.tells_places and self._store.steady else len(self._buckets)
        return len(self._answers) < most and sum(answer.staged for answer in self._answers) < len(self._buckets)

    def _begin(self, *, waiting: bool) -> bool:
        """Begin to answer the next question. Without waiting: if there is one, and its message is here; gives whether.

        All that is said of a message is asked for now: what is here may be taken back, and fetched again, before the
        answer goes, and a digest that was taken then would be of what forward has written meanwhile.
        """
        connection, store = self._session.connection, self._store
        while not self._questions:
            if not waiting and connection.idle and not connection.pending():
                return False
            self._read()
        message = self._questions[0].message
        while not store.has(message):
            if not waiting:
                return False
            # A relay has not got it yet. To say so keeps the one who asks from taking it for frozen.
            if not store.await_message(message):
                self._session.send(LaneFrame.WAIT, self._timer)
                self._timer.check()
        digest = store.digest(message) if store.verified else 0
        if digest is None and not store.is_whole_transfer:
            return self._begin(waiting=waiting)  # it was taken back just now
        # The one that was used longest ago: at most as many answers are staged as there are buckets, so it has left.
        bucket = self._buckets[0]
        bucket.reset(aligned(store.sizes[message]))
        view = store.view(message, bucket)
        staged = not bucket.untouched
        if staged:
            self._buckets.rotate(-1)
        copied = self._streams.begun() if staged else NOTHING
        answer = _Answer(self._questions.popleft(), digest, view, store.held(message), staged, copied)
        self._answers.append(answer)
        return True

    def _read(self) -> None:
        """Read a frame, a question unless it is about how to answer."""
        session, timer = self._session, self._timer
        session.await_question(timer)
        asked, body = session.recv(timer)
        self._progressed()
        if asked.frame is LaneFrame.LOCATE:
            session.send(LaneFrame.LOCATION, timer, body=[self._show(*body)])
        elif asked.frame is not LaneFrame.DIRECT:  # which the protocol has noted
            end = asked.number + num_messages(asked.frame, body)
            if end > len(self._store.sizes):
                raise RemoteProtocolError(f"message {end - 1} of {len(self._store.sizes)}")
            digest = body[0] if asked.frame is LaneFrame.CHECK else None
            self._questions += [_Question(message, digest) for message in range(asked.number, end)]

    def _show(self, fabric: str, hello: bytes) -> bytes:
        """Let the other side read this one's memory, if both have the fabric; gives what that takes, or nothing."""
        session = self._session
        # What was shown before, to one who asks twice; to its end, or somebody could have us make any number.
        session.end()
        if fabric != self._store.fabric:
            return b""
        try:
            session.shown = new_shown(fabric)
            return session.shown.answer(hello, partial(session.speak, timer=self._timer, limit=_fabric.OPENING))
        except OSError as exc:
            logger.warning("%s cannot read by %s: %s", session.connection.address, fabric, exc)
            session.hide()
            return b""

    def _send(self, answer: _Answer) -> None:
        (message, expected), digest, view, held, staged, copied = answer
        store, session, timer = self._store, self._session, self._timer
        copied.finish()
        # To compare costs a read on both sides, and saves the wire; a digest that somebody has taken before costs
        # nothing.
        if expected is not None and digest is None:
            digest = fingerprint(view, held)
            store.note_digest(message, digest)
        if expected is not None and digest == expected:
            session.send(LaneFrame.SAME, timer, message)
            return
        if (place := self._place(answer)) is not None:
            self._send_places(answer, place)
        else:
            # What is in a bucket is overwritten by one of the next messages, perhaps before the peer has it.
            steady = store.steady and not staged
            store.note_digest(message, session.send_message(message, view, digest, timer, steady=steady, held=held))
        self._progressed()

    def _place(self, answer: _Answer) -> bytes | None:
        """Where the other side can read a message, None if it is sent."""
        if answer.staged or not self._store.steady:
            return None
        return self._session.place(answer.view, self._timer, answer.held)

    def _send_places(self, first: _Answer, place: bytes) -> None:
        """Say where a message is, and those behind it that are asked for, and can be told, as well."""
        message, answers = first.question.message, self._answers
        told, places = [first], [place]
        while answers and answers[0].question == (message + len(told), None):
            following = self._place(answers[0])
            if following is None:
                break
            told.append(answers.popleft())
            places.append(following)
        messages = [(answer.view, answer.digest, answer.held) for answer in told]
        for answer, digest in zip(told, self._session.send_places(message, places, messages, self._timer), strict=True):
            self._store.note_digest(answer.question.message, digest)
