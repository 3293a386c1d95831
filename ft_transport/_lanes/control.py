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
from ft_transport._lanes.protocol import Frame, Header
from ft_transport._lanes.session import Talk
from ft_transport._net.connection import Bell
from ft_transport._net.endpoint import Invitation
from ft_transport._net.stall import HEARTBEAT, Patience
from ft_transport._telemetry.progress import report_progress
from ft_transport._telemetry.report import Progress, ProgressCallback, TransferReport
from ft_transport._threads import periodically
from ft_transport.errors import PeerFailure, RemoteProtocolError, TransferError, TransferTimeout

__all__ = ["ControlConnection", "GaveUp", "Tally"]

logger = logging.getLogger("ft_transport")

# How long the source may take to say goodbye, or to read why this side gives up: it has it in a moment or is gone, and
# the caller's training waits for this.
_LAST_WORDS = timedelta(seconds=1)


class GaveUp(PeerFailure):
    """The source has said that it will not go on."""


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
        talk: HELLO was said.
        bell: Rung by lanes.
        invitation: The source's.
        deadline: Of the whole call.
        stall: How long the source may be silent.
        tally: What PROGRESS says.

    Attributes:
        talk: Frames go by it.
        bell: Rung by lanes, for whoever is in :meth:`pump`.
        lost: Why the source cannot be heard any more; None while it can.
    """

    def __init__(
        self, talk: Talk, bell: Bell, invitation: Invitation, deadline: Deadline, stall: timedelta, tally: Tally
    ) -> None:
        self.talk = talk
        self.bell = bell
        self.lost: TransferError | None = None
        self._invitation = invitation
        self._deadline = deadline
        self._stall = stall
        self._tally = tally
        self._beat = Deadline(timedelta(0))
        self._route: Route | None = None  # named, and not yet taken
        self._supply = b""  # by which the source itself is asked
        self._silence = self.patience()

    def patience(self, label: str = "the source") -> Patience:
        """For whatever is done with somebody in this receive."""
        return Patience(self._deadline, self._stall, label)

    # ------------------------------------------------------------------------------------- agree

    def await_manifest(self) -> tuple[Header, bytes]:
        """What the source offers; raises as :func:`_await_manifest`."""
        return _await_manifest(self.talk, self.bell, self._deadline, self._stall)

    def refuse(self, reason: str, *, wait: bool) -> None:
        """Tell the source why its state is not wanted; without ``wait``, this process is about to end."""
        self.talk.say(Frame.REFUSE, self.patience() if wait else Patience(Deadline(_LAST_WORDS)), body=[reason])

    def be_ready(self, metadata: str, ident: bytes) -> None:
        """Agree to the state, and say where those behind can fetch it."""
        self.talk.say(Frame.READY, self.patience(), body=[metadata, ident])
        self._silence.moved()

    # -------------------------------------------------------------------------------------- move

    def ask(self, route: Route, reason: str, *, slow: bool) -> Route | None:
        """Ask for another supplier; gives None if it is the same again, which a slow one may be: nobody is better."""
        self.talk.say(Frame.REROUTE, self.patience(), body=[route.ident, reason, slow])
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
        listening = self.talk.connection if self.lost is None else None
        readable = self.bell.await_ring(listening, min(limit, self._deadline.remaining()))
        self._tally.tell()
        if self.lost is not None:
            return
        try:
            if readable:
                self._hear()
            if self._beat.expired():
                self._beat = Deadline(HEARTBEAT)
                self.talk.say(Frame.PROGRESS, self.patience(), self._tally.nbytes)
            self._silence.check()
        except (GaveUp, TransferTimeout):
            raise
        except TransferError as exc:
            self.lost = exc

    def _hear(self) -> None:
        header, body = self.talk.hear(self._silence)
        if header.frame is Frame.FAILED:
            raise _gave_up(body)
        if header.frame is not Frame.ROUTE:
            return
        metadata, ident, self._supply = body
        if metadata is None:
            self._route = self.from_source
            return
        try:
            self._route = Route(Invitation.decode(metadata), ident, from_source=False)
        except RemoteProtocolError as exc:
            # It is what another destination has said of itself, perhaps one of another version: not the source's fault.
            logger.warning("the source is asked for another supplier: %s", exc.message)
            self.talk.say(Frame.REROUTE, self.patience(), body=[ident, exc.message, False])

    @property
    def from_source(self) -> Route:
        """The way to the source itself, over the address that has answered."""
        here = self._invitation._replace(addresses=(self.talk.connection.address,))
        return Route(here, self._supply, from_source=True)

    def heartbeats(self) -> AbstractContextManager[None]:
        """Say every now and then that this side is alive, while it is busy with something else."""

        def beat() -> bool:
            try:
                self.talk.say(Frame.PROGRESS, self.patience(), self._tally.nbytes)
            except TransferError:
                return True  # whoever talks next finds out
            return False

        return periodically(beat, HEARTBEAT, "heartbeat") if self.lost is None else nullcontext()

    # --------------------------------------------------------------------------------------- end

    def say_done(self, *, verified: bool) -> None:
        """Say that everything is here, and hear whether it is still what the source stands for.

        Raises:
            GaveUp: It is not: the state has changed while it was sent.
            TransferError: Without digests: the source could not be asked.
        """
        self._tally.tell()
        try:
            if self.lost is not None:
                raise self.lost
            patience = Patience(self._deadline, _LAST_WORDS if verified else self._stall)
            self.talk.say(Frame.DONE, patience, self._tally.nbytes)
            while (heard := self.talk.hear(patience))[0].frame is not Frame.BYE:
                if heard[0].frame is Frame.FAILED:
                    raise _gave_up(heard[1])
                patience.check()
        except GaveUp:
            raise  # what is here is whole and agrees, but is not what the source stands for
        except TransferError as exc:
            if not verified:
                raise  # without digests only the source knows whether its memory was still the state's
            # Everything is here and agrees: that the source cannot be told any more is the source's loss alone. If
            # this failed, the source would have committed and this side not, and the next quorum would heal a replica
            # that has the state.
            logger.warning("the source could not be told that its state arrived: %s", exc)

    def say_failed(self, reason: str, *, refused: bool, late: bool) -> None:
        """Tell the source why this side gives up, if it still listens. Never raises.

        Args:
            refused: REFUSE has said so already; it must only arrive.
            late: Who has been silent for so long will hardly answer now, and after the deadline there is no time.
        """
        patience = Patience(Deadline(HEARTBEAT if late else _LAST_WORDS))
        with suppress(TransferError):
            if not refused:
                self.talk.say(Frame.FAILED, patience, body=[reason])
            self.talk.connection.finish(patience)

    def close(self) -> None:
        """Give the descriptors back."""
        self.talk.connection.close()
        self.bell.close()


def _await_manifest(talk: Talk, bell: Bell, deadline: Deadline, stall: timedelta) -> tuple[Header, bytes]:
    """What the source offers. Until it does, it says every now and then that it is there.

    Raises:
        TransferTimeout: It did not in time; the text says whether it was there at all.
    """
    is_there = False
    while True:
        patience = Patience(deadline, stall, "the source")
        while not bell.await_ring(talk.connection, min(HEARTBEAT, deadline.remaining())):
            _check_begun(deadline, is_there)
            patience.check()
        _check_begun(deadline, is_there)
        header, body = talk.hear(patience)
        is_there = True
        if header.frame is Frame.MANIFEST:
            return header, bytes(body)
        if header.frame is Frame.FAILED:
            raise _gave_up(body)


def _check_begun(deadline: Deadline, is_there: bool) -> None:
    # Who waits for a transfer that never begins looks for the reason in the network, if it is not told otherwise.
    if is_there and deadline.expired():
        seconds = deadline.timeout.total_seconds()
        raise TransferTimeout(f"timed out after {seconds:g} s: the source is there and has not begun to send")


def _gave_up(reasons: tuple[str, ...]) -> GaveUp:
    return GaveUp(f"the source gave up: {'; '.join(reasons)}")
