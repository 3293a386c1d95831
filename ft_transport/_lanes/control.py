"""The control connection to the source, as a destination has it: what is agreed, and who is named to fetch from.

Strategy: the thread that called ``recv_checkpoint`` holds this conversation, and does nothing that lasts while it does;
lanes have threads of their own, and ring when there is something to look at. Where that thread is busy all the same (it
describes a template, dials), a heartbeat speaks in its place: a source cannot tell who is busy from who is gone.

A source that is lost while bytes move is noted and no more: a destination before this one may have everything, and
:mod:`ft_transport._lanes.chain` says what follows.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta

from ft_transport._deadline import Deadline
from ft_transport._lanes.chain import Route
from ft_transport._lanes.protocol import LaneFrame, LaneHeader, State
from ft_transport._lanes.session import Session
from ft_transport._net.connection import Wakeup
from ft_transport._net.endpoint import Endpoint
from ft_transport._net.stall import HEARTBEAT, StallTimer
from ft_transport._telemetry.progress import report_progress
from ft_transport._telemetry.report import Progress, ProgressCallback, TransferReport
from ft_transport._threads import Ticker
from ft_transport.errors import PeerFailure, RemoteProtocolError, TransferError, TransferTimeout

__all__ = ["ControlConnection", "GaveUp", "Tally"]

logger = logging.getLogger("ft_transport")

# How long the source may take to say goodbye, or to read why this side gives up: it has it in a moment or is gone, and
# the caller's training waits for this.
_LAST_WORDS = timedelta(seconds=1)


class GaveUp(PeerFailure):
    """The source has said that it will not go on."""

    _outcome = "failed"


class Tally:
    """How many bytes are here, and how many of them the caller's callback knows of."""

    def __init__(self, report: TransferReport, callback: ProgressCallback | None) -> None:
        self._report = report
        self._callback = callback
        self._told = 0

    @property
    def nbytes(self) -> int:
        """Bytes that have landed or were here already."""
        return self._report.peers[0].nbytes + self._report.nbytes_kept

    def tell(self) -> None:
        """Call the caller's callback, if there is something new."""
        nbytes, report = self.nbytes, self._report
        if nbytes != self._told:
            self._told = nbytes
            now = Progress("destination", report.step, report.peers[0].rank, nbytes, report.nbytes_total)
            report_progress(self._callback, now)


class ControlConnection:
    """The conversation with the source, from HELLO to BYE. For one thread, but for its heartbeats.

    Args:
        session: HELLO was said.
        wakeup: Rung by lanes.
        endpoint: The source's.
        deadline: Of the whole call.
        stall: How long the source may be silent.
        tally: What PROGRESS says.

    Attributes:
        session: Frames go by it.
        wakeup: Rung by lanes, for whoever is in :meth:`pump`.
        lost: Why the source cannot be heard any more; None while it can.
    """

    def __init__(
        self, session: Session, wakeup: Wakeup, endpoint: Endpoint, deadline: Deadline, stall: timedelta, tally: Tally
    ) -> None:
        self.session = session
        self.wakeup = wakeup
        self.lost: TransferError | None = None
        self._endpoint = endpoint
        self._deadline = deadline
        self._stall = stall
        self._tally = tally
        self._beat = Deadline(timedelta(0))
        self._offer: tuple[LaneHeader, bytes] | TransferError | None = None  # heard by a heartbeat
        self._route: Route | None = None  # named, and not yet taken
        self._source_ident = b""  # by which the source itself is asked
        self._silence = self.timer()
        self._heartbeats = Ticker(self._beat_once, HEARTBEAT, "heartbeat")

    def timer(self, label: str = "the source") -> StallTimer:
        """For whatever is done with somebody in this receive."""
        return StallTimer(self._deadline, self._stall, label)

    # ------------------------------------------------------------------------------------- agree

    def await_manifest(self) -> tuple[LaneHeader, bytes]:
        """What the source offers; raises as :func:`_await_manifest`."""
        if isinstance(self._offer, TransferError):
            raise self._offer
        return self._offer or _await_manifest(self.session, self.wakeup, self._deadline, self._stall)

    def is_offered(self) -> bool:
        """Whether the source has sent its manifest, or does so within a moment; it waits for an answer then.

        For a side that ends before it could be asked for one. Until the manifest is here there is no frame that would
        say so, and a source whose destination merely hangs up takes it for dead.
        """
        self._heartbeats.end()  # Ctrl-C may have come just when some were about to begin
        session, until = self.session, Deadline(_LAST_WORDS)
        self._listen()
        while session.protocol.state is State.WAITING and self._offer is None and not until.expired():
            if session.connection.await_peer(until.remaining()):
                self._listen()
        return session.protocol.state is State.PLANNING

    def _listen(self) -> None:
        """Take what the source has said already, up to its manifest."""
        session, timer = self.session, self.timer()
        try:
            while session.protocol.state is State.WAITING and session.connection.await_peer(timedelta(0)):
                header, body = session.recv(timer)
                if header.frame is LaneFrame.MANIFEST:
                    self._offer = header, bytes(body)
                elif header.frame is LaneFrame.FAILED:
                    raise _gave_up(body)
        except TransferError as exc:
            self._offer = exc

    def refuse(self, reason: str, *, wait: bool) -> None:
        """Tell the source why its state is not wanted; without ``wait``, this process is about to end."""
        self._heartbeats.end()  # as above
        self.session.send(LaneFrame.REFUSE, self.timer() if wait else StallTimer(Deadline(_LAST_WORDS)), body=[reason])

    def send_ready(self, metadata: str, ident: bytes) -> None:
        """Agree to the state, and say where those behind can fetch it."""
        self.session.send(LaneFrame.READY, self.timer(), body=[metadata, ident])
        # That this side is alive is said with it; and the source looks through all of its state when it hears so.
        self._beat = Deadline(HEARTBEAT)
        self._silence.progressed()

    # -------------------------------------------------------------------------------------- move

    def ask(self, route: Route, reason: str, *, slow: bool) -> Route | None:
        """Ask for another supplier; gives None if it is the same again, which a slow one may be: nobody is better."""
        # By its identity: the source believes only what is said of the one that it has named.
        self.session.send(LaneFrame.REROUTE, self.timer(), body=[route.ident, reason, slow])
        named = self.await_route()
        return None if slow and named.ident == route.ident else named

    def await_route(self) -> Route:
        """Whom to fetch from, as the source says. Lanes that are open go on meanwhile.

        Raises:
            TransferError: It does not say.
        """
        while (route := self._route) is None:
            self.pump()
            if self.lost is not None:
                raise self.lost
        self._route = None
        return route

    def pump(self, limit: timedelta = HEARTBEAT) -> None:
        """Wait for news from the lanes or the source, and say that this side is alive.

        Raises:
            TransferTimeout: The deadline passed.
            GaveUp: The source will not go on. If it is merely lost, that is noted: the lanes may have everything.
        """
        if self._deadline.expired():
            raise TransferTimeout(f"timed out after {self._deadline.timeout.total_seconds():g} s")
        listening = self.session.connection if self.lost is None else None
        # Lanes wake this up when they end or everything is here; else it looks by itself with each heartbeat.
        readable = self.wakeup.await_wake(listening, min(limit, self._deadline.remaining()))
        self._tally.tell()
        if self.lost is not None:
            return
        try:
            if readable:
                self._recv()
            # Also while bytes move: they move from somebody else, perhaps, and the source sees none of them.
            if self._beat.expired():
                self._beat = Deadline(HEARTBEAT)
                self.session.send(LaneFrame.PROGRESS, self.timer(), self._tally.nbytes)
            self._silence.check()
        except (GaveUp, TransferTimeout):
            raise
        except TransferError as exc:
            self.lost = exc

    def _recv(self) -> None:
        header, body = self.session.recv(self._silence)
        if header.frame is LaneFrame.FAILED:
            raise _gave_up(body)
        if header.frame is not LaneFrame.ROUTE:
            return
        metadata, ident, self._source_ident = body
        if metadata is None:
            self._route = self.from_source
            return
        try:
            self._route = Route(Endpoint.decode(metadata), ident, from_source=False)
        except RemoteProtocolError as exc:
            # It is what another destination has said of itself, perhaps one of another version: not the source's fault.
            logger.warning("the source is asked for another supplier: %s", exc.message)
            self.session.send(LaneFrame.REROUTE, self.timer(), body=[ident, exc.message, False])

    @property
    def from_source(self) -> Route:
        """The way to the source itself, over the address that has answered."""
        # Its other addresses may lead nowhere from here, and would be tried again for each lane.
        here = self._endpoint._replace(addresses=(self.session.connection.address,))
        return Route(here, self._source_ident, from_source=True)

    def heartbeats(self) -> AbstractContextManager[None]:
        """Say every now and then that this side is alive, while it is busy with something else.

        From its manifest on, which may come meanwhile: a source that has not begun takes any word for a breach.
        """
        return self._heartbeats if self.lost is None else nullcontext()

    def _beat_once(self) -> bool:
        """Say it once; gives whether there is nobody to say it to."""
        self._listen()
        if isinstance(self._offer, TransferError):
            return True
        if self.session.protocol.state is State.WAITING:
            return False
        try:
            self.session.send(LaneFrame.PROGRESS, self.timer(), self._tally.nbytes)
        except TransferError:
            return True  # whoever talks next finds out
        return False

    # --------------------------------------------------------------------------------------- end

    def send_done(self, *, verified: bool) -> None:
        """Say that everything is here, and hear whether it is still what the source stands for.

        Raises:
            GaveUp: It is not: the state has changed while it was sent.
            TransferError: Without digests: the source could not be asked.
        """
        self._tally.tell()
        try:
            if self.lost is not None:
                raise self.lost
            timer = StallTimer(self._deadline, _LAST_WORDS if verified else self._stall)
            self.session.send(LaneFrame.DONE, timer, self._tally.nbytes)
            while (heard := self.session.recv(timer))[0].frame is not LaneFrame.BYE:
                if heard[0].frame is LaneFrame.FAILED:
                    raise _gave_up(heard[1])
                timer.check()
        except GaveUp:
            raise  # what is here is whole and agrees, but is not what the source stands for
        except TransferError as exc:
            if not verified:
                raise  # without digests only the source knows whether its memory was still the state's
            # Everything is here and agrees: that the source cannot be told any more is the source's loss alone. If
            # this failed, the source would have committed and this side not, and the next quorum would heal a replica
            # that has the state.
            logger.warning("the source could not be told that its state arrived: %s", exc)

    def send_failed(self, reason: str, *, refused: bool, late: bool) -> None:
        """Tell the source why this side gives up, if it still listens. Never raises.

        Args:
            refused: REFUSE has said so already; it must only arrive.
            late: Who has been silent for so long will hardly answer now, and after the deadline there is no time.
        """
        self._heartbeats.end()  # as above; first, since one may be under way, and the source not listen
        timer = StallTimer(Deadline(HEARTBEAT if late else _LAST_WORDS))
        with suppress(TransferError):
            if not refused:
                self.session.send(LaneFrame.FAILED, timer, body=[reason])
            self.session.connection.finish(timer)

    def close(self) -> None:
        """End the heartbeats, and give the descriptors back."""
        self._heartbeats.end()
        self.session.connection.close()
        self.wakeup.close()


def _await_manifest(session: Session, wakeup: Wakeup, deadline: Deadline, stall: timedelta) -> tuple[LaneHeader, bytes]:
    """What the source offers. Until it does, it says every now and then that it is there.

    Raises:
        TransferTimeout: It did not in time; the text says whether it was there at all.
    """
    is_there = False
    while True:
        timer = StallTimer(deadline, stall, "the source")
        while not wakeup.await_wake(session.connection, min(HEARTBEAT, deadline.remaining())):
            _check_begun(deadline, is_there)
            timer.check()
        _check_begun(deadline, is_there)
        header, body = session.recv(timer)
        is_there = True
        if header.frame is LaneFrame.MANIFEST:
            return header, bytes(body)
        if header.frame is LaneFrame.FAILED:
            raise _gave_up(body)


def _check_begun(deadline: Deadline, is_there: bool) -> None:
    # Who waits for a transfer that never begins looks for the reason in the network, if it is not told otherwise.
    if is_there and deadline.expired():
        seconds = deadline.timeout.total_seconds()
        raise TransferTimeout(f"timed out after {seconds:g} s: the source is there and has not begun to send")


def _gave_up(reasons: tuple[str, ...]) -> GaveUp:
    return GaveUp(f"the source gave up: {'; '.join(reasons)}")
