"""The source's side of one destination's conversation, from HELLO to BYE.

Strategy: each destination has a thread here, so one that is slow, silent or malicious holds up nobody else. The thread
says little: the manifest, whom to fetch from, and that the source is alive. Bytes move on lanes (``_lanes.supplier``),
which have threads of their own and outlive no conversation.
"""

from __future__ import annotations

import logging
import threading
from datetime import timedelta
from typing import Any

from ft_transport._deadline import Deadline
from ft_transport._lanes.chain import DestinationState, supplier_of
from ft_transport._lanes.dispatcher import Dispatcher
from ft_transport._lanes.messages import StateMessages
from ft_transport._lanes.news import News
from ft_transport._lanes.protocol import LaneFrame, State
from ft_transport._lanes.session import Session
from ft_transport._lanes.supplier import Supplier
from ft_transport._net.endpoint import Endpoint
from ft_transport._net.stall import HEARTBEAT, PeerStalled, StallTimer
from ft_transport._telemetry.report import Outcome, PhaseCallback, TransferReport, outcome_of
from ft_transport.errors import (
    RemoteProtocolError,
    TransferError,
    ended,
    printable,
    reason_of,
)

__all__ = ["Line", "Serving", "send_failed"]

logger = logging.getLogger("ft_transport")

# The longest identity of a supplier that is passed on to others, in bytes. Ours have 16; another make's may differ.
_MAX_IDENT_BYTES = 64


class Line:
    """The destinations of one transfer in the order in which they were ready. Any thread.

    Args:
        report: Of the transfer.
        is_chain: Whether destinations supply each other.
        stall: How long one that has got another supplier need not be quick.
    """

    def __init__(self, report: TransferReport, is_chain: bool, stall: timedelta) -> None:
        self._report = report
        self._is_chain = is_chain
        self._stall = stall
        self._lock = threading.Lock()
        self._ready: list[DestinationState] = []

    @property
    def longest(self) -> int:
        """How many there may be in a row: 1 says that nobody need pass anything on."""
        # Known before all have come, and so said to each in MANIFEST: the last one makes a relay that nobody will ask.
        return len(self._report.peers) if self._is_chain else 1

    def join(self, state: DestinationState) -> None:
        """One more has agreed to the state."""
        with self._lock:
            self._ready.append(state)

    def route(self, state: DestinationState) -> list[Any]:
        """The body of the ROUTE that tells a destination whom to fetch from."""
        with self._lock:
            supplier = supplier_of(state, self._ready) if self._is_chain else None
            state.follow(supplier, self._stall)
        if supplier is None:
            return [None, state.ident, state.ident]
        return [supplier.metadata, supplier.relay, state.ident]


class Serving:
    """One destination, while it is served. For its own thread, but for :meth:`cancel`.

    Args:
        session: With the destination, which has said HELLO.
        state: What the others need to know of it.
        timer: Until when it is waited for, and how long it may be silent.
        line: Where it stands behind others.
        dispatcher: Leads its lanes here.
        news: Tells how far it is.
        on_phase: As in ``Options``.
    """

    def __init__(
        self,
        session: Session,
        state: DestinationState,
        timer: StallTimer,
        line: Line,
        dispatcher: Dispatcher,
        news: News,
        on_phase: PhaseCallback | None = None,
    ) -> None:
        self.session = session
        self.state = state
        self._timer = timer
        self._line = line
        self._dispatcher = dispatcher
        self._news = news
        self._on_phase = on_phase
        self._supplier: Supplier | None = None
        self._has_all = False  # and the state had not changed: whatever happens now, it is not told to discard it

    def cancel(self, reason: str) -> None:
        """Let it end at the next heartbeat. Any thread."""
        self._timer.cancel(reason)

    def run(self, store: StateMessages | None, failure: str) -> Outcome:
        """Serve it, and give how that ended; nothing of the state is read for it any more then.

        Args:
            store: The state.
            failure: In its place: why there is none.
        """
        peer = self.state.peer
        try:
            self._serve(store, failure)
            return "complete"
        except Exception as exc:
            peer.reason = reason_of(exc)
            outcome = outcome_of(exc, cancelled=self._timer.cancelled)
            if outcome in ("failed", "timed out") and not self._has_all:
                # Who has been silent for so long is told, and not waited for.
                send_failed(self.session, peer.reason, wait=not isinstance(exc, PeerStalled))
            return outcome
        finally:
            # In this order: no new lane, then no lane, then no connection.
            self._dispatcher.unregister(self.state.ident)
            peer.nbytes_wire = self.session.connection.nbytes_wire
            if self._supplier is not None:
                self._supplier.close()
                peer.nbytes_wire += self._supplier.nbytes_wire
                self._supplier = None  # it has the state
            self.session.connection.close()

    def _serve(self, store: StateMessages | None, failure: str) -> None:
        if failure:
            raise TransferError(failure)
        assert store is not None, "only once nobody is served any more"
        peer, session, timer = self.state.peer, self.session, self._timer
        with peer.enter("agree", "source", self._on_phase):
            session.send(LaneFrame.MANIFEST, timer, self._line.longest, store.frame)
            self._recv(store, until=State.ROUTING)
        with peer.enter("move", "source", self._on_phase):
            # Also for one that fetches from another destination: it may come back at any moment, when that one is gone.
            self._supplier = Supplier(store, StallTimer(timer.deadline), store.streams)
            self._dispatcher.register(self.state.ident, self._supplier)
            while session.protocol.state is State.ROUTING:
                session.send(LaneFrame.ROUTE, timer, body=self._line.route(self.state))
                self._recv(store, until=State.DONE)
        store.check_unchanged()
        # Before BYE and not by it: what keeps this side from saying goodbye must not void a state that has arrived.
        self._has_all = True
        session.send(LaneFrame.BYE, timer)
        # BYE is worth a moment: a destination that does not hear it has its state all the same, and logs a warning.
        session.connection.finish(StallTimer(timer.deadline, HEARTBEAT))

    def _recv(self, store: StateMessages, until: State) -> None:
        """Listen to a destination until it is its turn no more: it is ready, wants another route, or is done."""
        session, timer = self.session, self._timer
        while True:
            header, body = session.recv(timer)
            timer.check()
            if header.frame is LaneFrame.PROGRESS or header.frame is LaneFrame.DONE:
                self._news.progress(self.state.peer, header.number)
                # A change is found at the next PROGRESS, so that nobody fetches a whole state that is void already.
                if session.protocol.state is State.MOVING:
                    store.check_unchanged()
                    session.send(LaneFrame.WAIT, timer)  # the source is alive, too
            else:
                self._take(header.frame, body)
            if session.protocol.state in (until, State.ROUTING):
                return

    def _take(self, frame: LaneFrame, body: Any) -> None:
        state = self.state
        if frame is LaneFrame.REFUSE:
            raise ended(TransferError(f"the destination refuses this state: {'; '.join(body)}"), "refused")
        if frame is LaneFrame.FAILED:
            raise TransferError(f"the destination gave up: {'; '.join(body)}")
        if frame is LaneFrame.READY:
            state.metadata, state.relay = body
            if state.metadata and not _is_endpoint(state.metadata, state.relay):
                # It may be of another version; whoever were sent there would only come back and ask again.
                logger.warning("%s cannot pass the state on: nobody could read its metadata", state.peer.label)
                state.metadata = ""
            self._line.join(state)
        elif frame is LaneFrame.REROUTE:
            failed, reason, slow = body
            if state.turn_away(failed, slow=slow):
                logger.warning("%s turns to another supplier: %s", state.peer.label, printable(reason))


def _is_endpoint(metadata: str, ident: bytes) -> bool:
    """Whether those behind a destination can make something of where it says that they may fetch."""
    try:
        Endpoint.decode(metadata)
    except RemoteProtocolError:
        return False
    return len(ident) <= _MAX_IDENT_BYTES


def send_failed(session: Session, reason: str, *, wait: bool) -> None:
    """Tell a destination why there will be no more, if it still listens. Never raises.

    Args:
        wait: Until it has read that: closing at once would make the system drop it, if the destination still writes.
    """
    # From the dispatcher (``wait`` is False) this runs under a lock, and a peer that reads nothing would hold it.
    if session.protocol.state is State.CLOSED or not (wait or session.connection.takes_more):
        return
    timer = StallTimer(Deadline(2 * HEARTBEAT), HEARTBEAT)
    try:
        session.send(LaneFrame.FAILED, timer, body=[reason])
        if wait:
            session.connection.finish(timer)
    except (TransferError, RemoteProtocolError):
        pass
