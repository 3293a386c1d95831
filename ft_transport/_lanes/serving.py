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
from ft_transport._lanes.dispatcher import Desk
from ft_transport._lanes.messages import SourceStock
from ft_transport._lanes.news import News
from ft_transport._lanes.protocol import Frame, State
from ft_transport._lanes.session import Talk
from ft_transport._lanes.supplier import Supply
from ft_transport._net.endpoint import Invitation
from ft_transport._net.stall import HEARTBEAT, Patience, Silence
from ft_transport._telemetry.report import Outcome, PhaseCallback, TransferReport
from ft_transport.errors import (
    PeerFailure,
    RemoteProtocolError,
    TransferError,
    TransferTimeout,
    printable,
    reason_of,
)

__all__ = ["Line", "Serving", "say_failed"]

logger = logging.getLogger("ft_transport")

# The longest identity of a supply that is passed on to others, in bytes. Ours have 16; one of another make may differ.
_MAX_IDENT_BYTES = 64


class _Refused(TransferError):
    """The destination does not accept the state."""


class _Failure(TransferError):
    """One side has given up for a reason of its own."""


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
        talk: With the destination, which has said HELLO.
        state: What the others need to know of it.
        patience: Until when it is waited for, and how long it may be silent.
        line: Where it stands behind others.
        desk: Leads its lanes here.
        news: Tells how far it is.
        on_phase: As in ``Options``.
    """

    def __init__(
        self,
        talk: Talk,
        state: DestinationState,
        patience: Patience,
        line: Line,
        desk: Desk,
        news: News,
        on_phase: PhaseCallback | None = None,
    ) -> None:
        self.talk = talk
        self.state = state
        self._patience = patience
        self._line = line
        self._desk = desk
        self._news = news
        self._on_phase = on_phase
        self._supply: Supply | None = None
        self._has_all = False  # and the state had not changed: whatever happens now, it is not told to discard it

    def cancel(self, reason: str) -> None:
        """Let it end at the next heartbeat. Any thread."""
        self._patience.cancel(reason)

    def run(self, stock: SourceStock | None, failure: str) -> Outcome:
        """Serve it, and give how that ended; nothing of the state is read for it any more then.

        Args:
            stock: The state.
            failure: In its place: why there is none.
        """
        peer = self.state.peer
        try:
            self._serve(stock, failure)
            return "complete"
        except Exception as exc:
            peer.reason = reason_of(exc)
            outcome = _outcome(exc, self._patience)
            if outcome in ("failed", "timed out") and not self._has_all:
                # Who has been silent for so long is told, and not waited for.
                say_failed(self.talk, peer.reason, wait=not isinstance(exc, Silence))
            return outcome
        finally:
            self._desk.unregister(self.state.ident)
            peer.nbytes_wire = self.talk.connection.nbytes_wire
            if self._supply is not None:
                self._supply.close()
                peer.nbytes_wire += self._supply.nbytes_wire
            self.talk.connection.close()

    def _serve(self, stock: SourceStock | None, failure: str) -> None:
        if failure:
            raise _Failure(failure)
        assert stock is not None, "only once nobody is served any more"
        peer, talk, patience = self.state.peer, self.talk, self._patience
        with peer.enter("agree", "source", self._on_phase):
            talk.say(Frame.MANIFEST, patience, self._line.longest, stock.frame)
            self._hear(stock, until=State.ROUTING)
        with peer.enter("move", "source", self._on_phase):
            self._supply = Supply(stock, Patience(patience.deadline), stock.stream)
            self._desk.register(self.state.ident, self._supply)
            while talk.conversation.state is State.ROUTING:
                talk.say(Frame.ROUTE, patience, body=self._line.route(self.state))
                self._hear(stock, until=State.DONE)
        stock.check_unchanged()
        self._has_all = True
        talk.say(Frame.BYE, patience)
        talk.connection.finish(Patience(patience.deadline, HEARTBEAT))

    def _hear(self, stock: SourceStock, until: State) -> None:
        """Listen to a destination until it is its turn no more: it is ready, wants another route, or is done."""
        talk, patience = self.talk, self._patience
        while True:
            header, body = talk.hear(patience)
            patience.check()
            if header.frame is Frame.PROGRESS or header.frame is Frame.DONE:
                self._news.progress(self.state.peer, header.number)
                if talk.conversation.state is State.MOVING:
                    stock.check_unchanged()
                    talk.say(Frame.WAIT, patience)  # the source is alive, too
            else:
                self._take(header.frame, body)
            if talk.conversation.state in (until, State.ROUTING):
                return

    def _take(self, frame: Frame, body: Any) -> None:
        state = self.state
        if frame is Frame.REFUSE:
            raise _Refused(f"the destination refuses this state: {'; '.join(body)}")
        if frame is Frame.FAILED:
            raise _Failure(f"the destination gave up: {'; '.join(body)}")
        if frame is Frame.READY:
            state.metadata, state.relay = body
            if state.metadata and not _is_invitation(state.metadata, state.relay):
                # It may be of another version; whoever were sent there would only come back and ask again.
                logger.warning("%s cannot pass the state on: nobody could read its metadata", state.peer.label)
                state.metadata = ""
            self._line.join(state)
        elif frame is Frame.REROUTE:
            failed, reason, slow = body
            if state.turn_away(failed, slow=slow):
                logger.warning("%s turns to another supplier: %s", state.peer.label, printable(reason))


def _is_invitation(metadata: str, ident: bytes) -> bool:
    """Whether those behind a destination can make something of where it says that they may fetch."""
    try:
        Invitation.decode(metadata)
    except RemoteProtocolError:
        return False
    return len(ident) <= _MAX_IDENT_BYTES


def _outcome(exc: Exception, patience: Patience) -> Outcome:
    if isinstance(exc, _Refused):
        return "refused"
    if isinstance(exc, (TransferTimeout, Silence)):
        return "timed out"
    # A cancelled one has ended by our own doing, whatever its connection made of that.
    if isinstance(exc, PeerFailure) and not patience.cancelled:
        return "dead"
    return "failed"


def say_failed(talk: Talk, reason: str, *, wait: bool) -> None:
    """Tell a destination why there will be no more, if it still listens. Never raises.

    Args:
        wait: Until it has read that: closing at once would make the system drop it, if the destination still writes.
    """
    if talk.conversation.state is State.CLOSED or not (wait or talk.connection.takes_more):
        return
    patience = Patience(Deadline(2 * HEARTBEAT), HEARTBEAT)
    try:
        talk.say(Frame.FAILED, patience, body=[reason])
        if wait:
            talk.connection.finish(patience)
    except (TransferError, RemoteProtocolError):
        pass
