"""The source's side of a transfer over lanes: an offer, which destinations come for.

Strategy: an offer is made once, and then waits for nobody. Each destination that comes has a thread, which holds the
conversation with it, and a supply, whose lanes it fetches the state over. All of them end by the offer's deadline.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

from ft_transport._deadline import Deadline
from ft_transport._lanes.chain import Guest, is_to_blame
from ft_transport._lanes.dispatcher import Desk
from ft_transport._lanes.protocol import Frame, State, Visit
from ft_transport._lanes.session import Talk
from ft_transport._lanes.supplier import Supply
from ft_transport._net.endpoint import Invitation
from ft_transport._net.stall import HEARTBEAT, Patience, Silence
from ft_transport._options import CPU, LaneOptions
from ft_transport._plan.blocks import Held
from ft_transport._plan.buffers import Bucket, aligned, settled_stream
from ft_transport._plan.source import Outbound
from ft_transport._plan.unchanged import Versions
from ft_transport._telemetry.events import publish
from ft_transport._telemetry.progress import Watch, report_progress
from ft_transport._telemetry.report import Outcome, PeerReport, Progress, TransferReport
from ft_transport._telemetry.teller import Teller
from ft_transport._threads import ThreadGroup, uninterrupted
from ft_transport._wire.layout import SMALL_BYTES
from ft_transport.errors import (
    LocalProtocolError,
    PeerFailure,
    RemoteProtocolError,
    TransferError,
    TransferTimeout,
    printable,
    reason_of,
)

__all__ = ["Offer"]

logger = logging.getLogger("ft_transport")


class SourceStock:
    """The messages of a described state; see ``_lanes.supplier.Stock``.

    The small ones are copied here and now: forward goes on meanwhile, and changes small buffers (BatchNorm).
    """

    def __init__(self, outbound: Outbound) -> None:
        self.sizes = outbound.layout.sizes
        self.verified = bool(outbound.header.digest)
        self.steady = self.is_whole_offer = True
        self._error: LocalProtocolError | None = None
        self._gatherer = outbound.gatherer
        self._versions = outbound.versions
        self._digests: dict[int, int] = {}
        self._copies: dict[int, memoryview] = {}
        small, room = [], SMALL_BYTES
        for message in range(len(outbound.layout.messages)):
            nbytes = aligned(self.sizes[message])
            if outbound.layout.is_small(message) and nbytes <= room:
                room -= nbytes
                small.append(message)
        self._bucket = Bucket(CPU)
        self._bucket.reset(SMALL_BYTES - room)
        for message in small:
            self._copies[message] = self._gatherer.view(message, self._bucket)
        self._versions.note_copied(self._copies)

    def check_unchanged(self) -> None:
        """Raises LocalProtocolError if the state has changed or moved since; see ``_plan.unchanged``."""
        self._gatherer.check()
        if self._error is not None:
            raise self._error
        self._versions.check()

    def await_message(self, message: int) -> bool:
        return True

    def view(self, message: int, bucket: Bucket) -> memoryview:
        copied = self._copies.get(message)
        return self._gatherer.view(message, bucket) if copied is None else copied

    def held(self, message: int) -> Held | None:
        return self._gatherer.held(message) if message not in self._copies else None

    def note_error(self, error: LocalProtocolError) -> None:
        self._error = error

    def digest(self, message: int) -> int | None:
        return self._digests.get(message)

    def note_digest(self, message: int, digest: int) -> None:
        self._digests.setdefault(message, digest)


# Destinations that are served at once beyond those that are expected: some are started again, and come anew while the
# source does not know yet that they were gone. Those who find no place wait for one. Each has a thread, and its lanes.
SPARE_GUESTS = 16
# Conversations of one transfer beyond those that are expected, one after the other: each leaves a line in the report.
SPARE_CONVERSATIONS = 1024

# Who waits for a place asks again with each heartbeat; who has not for so long is gone.
_CROWDED = 4 * HEARTBEAT

# The longest identity of a supply that is passed on to others. Ours have 16 bytes.
_MAX_IDENT_BYTES = 64

# How long whoever ends a transfer waits for callbacks that are told of it. What takes longer goes on behind its back.
_TELLING = timedelta(seconds=2)


class _Refused(TransferError):
    """The destination does not accept the state."""


class Offer:
    """A state, open to destinations from :meth:`open` to :meth:`close`.

    Args:
        options: The caller's choices.
        deadline: Of the whole transfer.
        report: Filled with what happened; has a ``PeerReport`` for each expected destination.
        desk: Leads destinations here.
        teller: Calls the caller's callbacks.
    """

    def __init__(
        self, options: LaneOptions, deadline: Deadline, report: TransferReport, desk: Desk, teller: Teller
    ) -> None:
        self.report = report
        assert report.step is not None, "over lanes a transfer always has one"
        self._step = report.step
        # A chain of one is none. Without digests nobody would see what a destination's own forward has made of the
        # memory that it passes on.
        self._options = replace(options, chain=options.chain and len(report.peers) > 1 and bool(options.digest))
        self._deadline = deadline
        self._desk = desk
        self._teller = teller
        self._begin = time.perf_counter()
        self._changed = threading.Condition()
        self._expected = list(report.peers)
        self._guests: dict[bytes, Guest] = {}
        self._chain: list[Guest] = []
        self._crew = ThreadGroup()
        self._over = False
        self._failure = ""
        self._error: LocalProtocolError | None = None  # the source's own, once destinations are served
        self._frame = b""
        self._stock: SourceStock | None = None
        self._versions: Versions | None = None
        self._open = not report.peers  # to whoever comes
        self._stream: Any = None
        self._watch = Watch(report, deadline)
        self._is_watching = False
        self._news: dict[int, Progress] = {}  # of peers, that the progress callback has not been told yet
        # How many may still come, and be served at once.
        self._num_left = len(report.peers) + SPARE_CONVERSATIONS
        self._num_places = len(report.peers) + SPARE_GUESTS
        self._crowded = Deadline(timedelta(0))  # until then somebody may be waiting for a place
        self._is_closing = False

    def open(self, state_dict: object) -> None:
        """Describe the state and let destinations in, those that wait first.

        Raises:
            LocalProtocolError: A leaf cannot travel. Destinations are let in, and told so.
        """
        try:
            with self.report.phase("describe", self._options.on_phase):
                self._stream = settled_stream()
                report = self.report
                outbound = Outbound(state_dict, report.step, self._options, report, lambda reading: self.end_reading())
                self._frame, self._versions = outbound.frame, outbound.versions
                self._stock = SourceStock(outbound)
        except BaseException as exc:
            self._failure = reason_of(exc)
            raise
        finally:
            self._desk.open(self)

    def refuse(self, reason: str) -> None:
        """In the place of :meth:`open`: let destinations in, and tell them why there is no state for them."""
        self._failure = reason
        self._desk.open(self)

    # ------------------------------------------------------------------------------------ guests

    def receive_guest(self, talk: Talk, visit: Visit) -> bool:
        identity, name = visit.body
        with self._changed:
            if visit.header.step > self._step:
                return False  # the next transfer may be for it
            if (reason := self._unwelcome(visit)) is not None:
                self._teller.leave(partial(_log_unwelcome, str(name), talk.connection.address, reason))
                _say_failed(talk, reason, wait=False)
                talk.connection.close()
                return True
            if self._over:
                return False
            if not self._has_place(identity):
                self._crowded = Deadline(_CROWDED)
                return False
            self._num_left -= 1
            peer = self._peer_of(identity)
            peer.address, peer.name = talk.connection.address, str(name)
            patience = Patience(self._deadline, self._options.stall, "the destination")
            guest = Guest(talk, peer, patience)
            self._guests[identity] = guest
            try:
                self._crew.start("guest", self._run, guest)
            except RuntimeError as exc:  # no more threads to be had
                logger.warning("%s cannot be served: %s", peer.label, exc)
                peer.outcome, peer.reason = "failed", reason_of(exc)
                talk.connection.close()
                self._settle()
                self._changed.notify_all()
        return True

    def _unwelcome(self, visit: Visit) -> str | None:
        """Why a destination is never served by this transfer, None if it is."""
        header = visit.header
        if header.step < self._step:
            return f"expected step {header.step}, source has step {self._step}"
        earlier = self._guests.get(visit.body[0])
        if earlier is not None and earlier.talk.conversation.attempt > header.attempt:
            return "a later attempt has come before"
        if not self._num_left:
            return "too many have come for this transfer"
        return None

    def _has_place(self, identity: bytes) -> bool:
        """Whether one more destination can be served now; it takes its own place if it is served already."""
        served = [known for known, guest in self._guests.items() if guest.peer.outcome == "pending"]
        return identity in served or len(served) < self._num_places

    def _peer_of(self, identity: bytes) -> PeerReport:
        """The report's entry for a destination, a new one if it has been here before."""
        earlier = self._guests.get(identity)
        if earlier is not None:
            earlier.talk.connection.abort()
            peer = PeerReport(earlier.peer.rank)
            self.report.peers = [peer if known is earlier.peer else known for known in self.report.peers]
        elif self._expected:
            peer = self._expected.pop(0)
        else:
            peer = PeerReport(-1)
            self.report.peers.append(peer)
        return peer

    def _run(self, guest: Guest) -> None:
        peer, talk = guest.peer, guest.talk
        outcome: Outcome = "failed"
        try:
            versions = self._versions
            with versions.here() if versions is not None else nullcontext():
                self._serve(guest)
            outcome = "complete"
        except Exception as exc:
            peer.reason = reason_of(exc)
            outcome = _outcome(exc, guest.patience)
            if outcome in ("failed", "timed out") and not guest.done:
                # Who has been silent for so long is told, and not waited for.
                _say_failed(talk, peer.reason, wait=not isinstance(exc, Silence))
        finally:
            self._desk.unregister(guest.ident)
            peer.nbytes_wire = talk.connection.nbytes_wire
            if guest.supply is not None:
                guest.supply.close()
                peer.nbytes_wire += guest.supply.nbytes_wire
            talk.connection.close()
            with self._changed:
                peer.outcome = outcome
                self._settle()
                self._changed.notify_all()

    def _serve(self, guest: Guest) -> None:
        peer, talk, patience = guest.peer, guest.talk, guest.patience
        if self._failure:
            raise _Failure(self._failure)
        with peer.enter("agree", "source", self._options.on_phase):
            relays = len(self.report.peers) if self._options.chain else 1
            talk.say(Frame.MANIFEST, patience, relays, self._frame)
            self._hear(guest, until=State.ROUTING)
        with peer.enter("move", "source", self._options.on_phase):
            assert self._stock is not None, "only once nobody is served any more"
            guest.supply = Supply(self._stock, Patience(self._deadline), self._stream)
            self._desk.register(guest.ident, guest.supply)
            while talk.conversation.state is State.ROUTING:
                self._route(guest)
                self._hear(guest, until=State.DONE)
        self._check_unchanged()
        guest.done = True
        talk.say(Frame.BYE, patience)
        talk.connection.finish(Patience(self._deadline, HEARTBEAT))

    def _hear(self, guest: Guest, until: State) -> None:
        """Listen to a destination until it is its turn no more: it is ready, wants another route, or is done."""
        talk, peer, patience = guest.talk, guest.peer, guest.patience
        while True:
            header, body = talk.hear(patience)
            patience.check()
            if header.frame is Frame.PROGRESS or header.frame is Frame.DONE:
                self._progress(peer, header.number)
                if talk.conversation.state is State.MOVING:
                    self._check_unchanged()
                    talk.say(Frame.WAIT, patience)  # the source is alive, too
            elif header.frame is Frame.REFUSE:
                raise _Refused(f"the destination refuses this state: {'; '.join(body)}")
            elif header.frame is Frame.FAILED:
                raise _Failure(f"the destination gave up: {'; '.join(body)}")
            elif header.frame is Frame.READY:
                guest.metadata, guest.relay, _ = body
                if guest.metadata and not _is_invitation(guest.metadata, guest.relay):
                    logger.warning("%s cannot pass the state on: nobody could read its metadata", peer.label)
                    guest.metadata = ""
                with self._changed:
                    self._chain.append(guest)
            elif header.frame is Frame.REROUTE:
                failed, reason, slow = body
                if not slow or is_to_blame(guest.before):
                    if guest.before is not None and failed == guest.before.relay:
                        guest.avoided.add(failed)  # no other, of which one could name any number
                    logger.warning("%s turns to another supplier: %s", peer.label, printable(reason))
            if talk.conversation.state in (until, State.ROUTING):
                return

    def _check_unchanged(self) -> None:
        """Raises LocalProtocolError, which is the whole offer's too, if the state has changed."""
        assert self._stock is not None, "only once nobody is served any more"
        try:
            self._stock.check_unchanged()
        except LocalProtocolError as exc:
            self._error = exc
            raise

    def _progress(self, peer: PeerReport, nbytes: int) -> None:
        nbytes = min(nbytes, self.report.nbytes_total)
        if nbytes != peer.nbytes:
            peer.nbytes = nbytes
            now = Progress("source", self.report.step, peer.rank, nbytes, self.report.nbytes_total)
            if self._options.on_progress is not None:
                with self._changed:
                    is_new, self._news[id(peer)] = id(peer) not in self._news, now
                if is_new:
                    self._teller.leave(partial(self._tell_progress, id(peer)))

    def _tell_progress(self, peer: int) -> None:
        """Tell the newest that is known of a peer: a callback that takes its time misses what was between."""
        with self._changed:
            now = self._news.pop(peer)
        report_progress(self._options.on_progress, now)

    def _route(self, guest: Guest) -> None:
        """Tell a destination where to fetch: from the one before it in the chain, or from here."""
        with self._changed:
            before = self._chain[: self._chain.index(guest)] if self._options.chain else []
            metadata, ident, supplier = None, guest.ident, None
            for other in reversed(before):
                alive = other.peer.outcome in ("pending", "complete")
                if alive and other.metadata and other.relay not in guest.avoided:
                    metadata, ident, supplier = other.metadata, other.relay, other
                    break
            if guest.settling is None or supplier is not guest.before:
                guest.before, guest.settling = supplier, Deadline(self._options.stall)
        guest.talk.say(Frame.ROUTE, guest.patience, body=[metadata, ident, guest.ident])

    # --------------------------------------------------------------------------------------- end

    def _settle(self) -> None:
        """Complete the report, once no destination is expected or served any more. The lock is held."""
        if self._over or self._open or self._expected or any(peer.outcome == "pending" for peer in self.report.peers):
            return
        if not (self._crowded.expired() or self._deadline.expired() or self._is_closing):
            return  # those who had the places are gone, and it is the turn of whoever waits
        self._over = True
        self._stock = None
        self._release()
        # If it has failed, the call has raised, and that was told.
        if not self._failure and self.report.finish(time.perf_counter() - self._begin, self._error):
            self._teller.leave(partial(publish, self.report, self._options.on_event))

    def tick(self) -> None:
        """End an offer whose deadline has passed and for which nobody has come; say how far the others are."""
        with self._changed:
            if self._deadline.expired():
                self._give_up_expected("timed out waiting for it")
            self._settle()
            self._changed.notify_all()
        if self._watch.is_due and not self._is_watching:
            self._is_watching = True
            self._teller.leave(self._look)

    def _look(self) -> None:
        self._watch.tick()
        self._is_watching = False

    def _give_up_expected(self, reason: str) -> None:
        self._open = False
        while self._expected:
            peer = self._expected.pop()
            if peer.outcome == "pending":  # else the call has raised, and that is why it was not served
                peer.outcome, peer.reason = "timed out", reason
        self._settle()
        self._changed.notify_all()

    def drain(self) -> None:
        """Wait until every destination is served or has failed, or the deadline has passed.

        A destination that has not come within the stall time-out from now on is not waited for.
        """
        absent = Deadline(self._options.stall)
        with self._changed:
            if self._open:  # nobody was expected, so nobody is waited for who has not come
                self._give_up_expected("")
            while not self._over and not self._deadline.expired():
                if self._expected and absent.expired():
                    self._give_up_expected(f"it has not come within {absent.timeout.total_seconds():g} s")
                    continue
                limits = [self._deadline.remaining()] + ([absent.remaining()] if self._expected else [])
                self._changed.wait_for(lambda: self._over, min(limits).total_seconds())

    def end_reading(self) -> None:
        """As :meth:`drain`, then as :meth:`close`: somebody is about to change the state."""
        self.drain()
        self.close()

    def within_step(self) -> bool:
        """Whether the state may change before :meth:`drain` is called; see ``_plan.unchanged``."""
        versions = self._versions
        return versions is not None and versions.within_step()

    def close(self, wait: bool = True) -> None:
        """End what is still under way; when this returns, nothing reads the state. Raises nothing but Ctrl-C."""
        uninterrupted(lambda: self._close(wait))

    def _close(self, wait: bool) -> None:
        self._desk.close(self)
        with self._changed:
            self._is_closing = True
            self._give_up_expected("it has not come before the source ended the transfer")
            guests = list(self._guests.values())
            for guest in guests:
                guest.patience.cancel("the source has ended the transfer")
        if not wait:
            for guest in guests:
                guest.talk.connection.abort()
            return
        self._crew.join()
        with self._changed:
            self._stock = None
        self._release()
        self._teller.drain(Deadline(_TELLING))

    def _release(self) -> None:
        """Nothing is read any more: optimizers need not wait."""
        versions, self._versions = self._versions, None
        if versions is not None:
            versions.release()


def _is_invitation(metadata: str, ident: bytes) -> bool:
    """Whether those behind a destination can make something of where it says that they may fetch."""
    try:
        Invitation.decode(metadata)
    except RemoteProtocolError:
        return False
    return len(ident) <= _MAX_IDENT_BYTES


def _log_unwelcome(name: str, address: str, reason: str) -> None:
    logger.warning("%s at %s is not served: %s", name, address, reason)


class _Failure(TransferError):
    """One side has given up for a reason of its own."""


def _outcome(exc: Exception, patience: Patience) -> Outcome:
    if isinstance(exc, _Refused):
        return "refused"
    if isinstance(exc, (TransferTimeout, Silence)):
        return "timed out"
    if isinstance(exc, PeerFailure) and not patience.cancelled:
        return "dead"
    return "failed"


def _say_failed(talk: Talk, reason: str, *, wait: bool) -> None:
    """Tell a destination why there will be no more, if it still listens. Never raises."""
    if talk.conversation.state is State.CLOSED or not (wait or talk.connection.takes_more):
        return
    patience = Patience(Deadline(2 * HEARTBEAT), HEARTBEAT)
    try:
        talk.say(Frame.FAILED, patience, body=[reason])
        if wait:
            talk.connection.finish(patience)
    except (TransferError, RemoteProtocolError):
        pass
