"""The destination's side of a transfer over lanes: agree with the source, fetch, pass on, rebuild.

Strategy: the thread that called holds the conversation with the source and decides where to fetch; ``fetch`` does
that in threads of its own. When all lanes to a destination before this one have ended, the source is asked for somebody
else; when all lanes to the source have, they are opened again as long as that may help.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch

from ft_transport._deadline import Deadline
from ft_transport._lanes.chain import Route
from ft_transport._lanes.dispatcher import Desk
from ft_transport._lanes.fetch import Fetcher
from ft_transport._lanes.pending import Work
from ft_transport._lanes.probe import TRIAL_MESSAGES, Trial
from ft_transport._lanes.protocol import Conversation, Frame, Header, Role, encode
from ft_transport._lanes.relay import Relay
from ft_transport._lanes.session import Talk
from ft_transport._lanes.sink import Sink
from ft_transport._net.connection import Bell
from ft_transport._net.dial import dial
from ft_transport._net.endpoint import Invitation
from ft_transport._net.handshake_io import Contexts
from ft_transport._net.stall import HEARTBEAT, Patience, Silence
from ft_transport._options import CPU, LaneOptions
from ft_transport._plan.buffers import settled_stream
from ft_transport._plan.destination import Landing
from ft_transport._plan.resume import Kept, state_of
from ft_transport._plan.rewrite import Rewrite
from ft_transport._plan.template import fit
from ft_transport._plan.torn import Attempt
from ft_transport._process import no_collection
from ft_transport._state.manifest import Manifest
from ft_transport._telemetry.progress import report_progress
from ft_transport._telemetry.report import Progress, TransferReport
from ft_transport._threads import periodically
from ft_transport._wire.decode import decode_manifest
from ft_transport._wire.frames import Frame as CodecFrame
from ft_transport._wire.frames import Header as ManifestHeader
from ft_transport._wire.frames import decode_frame
from ft_transport._wire.layout import Layout, lay_out
from ft_transport.errors import (
    LocalProtocolError,
    PeerFailure,
    RemoteProtocolError,
    TransferError,
    TransferTimeout,
    reason_of,
)

__all__ = ["Received", "Reception", "Self"]

logger = logging.getLogger("ft_transport")

# How often all lanes to the source may break before the receive does.
_MAX_BREAKS = 3
# How long the source may take to say goodbye, or to read why this side gives up.
_LAST_WORDS = timedelta(seconds=1)


class Self(NamedTuple):
    """This process, as others see it.

    Attributes:
        identity: New for each transport.
        name: For the source's report.
        metadata: Where others can fetch from it.
        desk: Leads them to what they may fetch.
        contexts: For TLS, None without.
    """

    identity: bytes
    name: str
    metadata: str
    desk: Desk
    contexts: Contexts | None


class Received(NamedTuple):
    """A received state.

    Attributes:
        state: The state dict.
        written: The template's tensors that hold a new value; autograd has not been told of it.
        relay: Goes on passing the state on until it is closed; None if nobody would ask.
        rewrite: Makes it the source's again before the optimizer steps; None if nobody trains meanwhile.
    """

    state: object
    written: list[torch.Tensor]
    relay: Relay | None
    rewrite: Rewrite | None


class _Plan(NamedTuple):
    """What both sides have agreed on."""

    header: ManifestHeader
    state: int
    layout: Layout
    landing: Landing
    rewrite: Rewrite | None


class _GaveUp(PeerFailure):
    """The source has said that it will not go on."""


class Reception:
    """One receive.

    Args:
        invitation: The source's.
        step: Step that both sides must agree on.
        attempt: Distinct for each receive of this process.
        me: This process.
        options: The caller's choices.
        deadline: Of the whole call.
        report: Filled with what happened; its only peer is the source.
        torn: Learns where the state lands.
        trains: Whether the training thread goes on meanwhile.

    Attributes:
        kept: After an error, what it has left in the template; else None.
    """

    def __init__(
        self,
        invitation: Invitation,
        step: int,
        attempt: int,
        me: Self,
        options: LaneOptions,
        deadline: Deadline,
        report: TransferReport,
        torn: Attempt | None = None,
        *,
        trains: bool = False,
    ) -> None:
        self.kept: Kept | None = None
        self._torn = torn
        self._trains = trains
        self._invitation = invitation
        self._step = step
        self._attempt = attempt
        self._me = me
        self._options = options
        self._deadline = deadline
        self._report = report
        (self._peer,) = report.peers
        self._bell = Bell()
        self._talk: Talk | None = None
        self._lost: TransferError | None = None  # why the source cannot be heard any more
        self._source = self._patience()
        self._beat = Deadline(timedelta(0))
        self._told = 0  # bytes that the progress callback knows of
        self._route: Route | None = None
        self._supply = b""  # by which the source itself is asked
        self._relay: Relay | None = None
        self._stream: Any = None
        self._lane_wire = 0
        self._hopeless = False  # whether the source's lanes would break again
        self._cancelled = ""

    def run(self, state_dict: Callable[[], object] | None, earlier: Kept | None) -> Received:
        """Receive the state.

        Args:
            state_dict: Gives the template, None for a fresh state.
            earlier: What an earlier receive has left.

        Raises:
            TransferError: As it happened. Nothing reads or writes the template any more; ``report.torn`` says whether
                it holds a mix of two states.
        """
        peer, self.kept = self._peer, earlier
        try:
            if self._cancelled:
                raise LocalProtocolError(self._cancelled)
            with peer.enter("agree", "destination", self._options.on_phase):
                talk = self._call()
                plan, sink = self._agree(talk, state_dict, earlier)
            with peer.enter("move", "destination", self._options.on_phase):
                self._move(talk, plan, sink)
            with peer.enter("verify", "destination", self._options.on_phase):
                plan.landing.check()
                self._say_done(talk, verified=sink.verified)
            with peer.enter("rebuild", "destination", self._options.on_phase), no_collection():
                self._report.torn = self._report.torn or plan.landing.copies
                state = plan.landing.rebuild()
                if plan.landing.copies:
                    plan.landing.check()  # once more: it was written to
            self._report.torn = False
            self.kept = None
            peer.outcome = "complete"
            if plan.rewrite is not None and plan.header.digest:
                plan.rewrite.note_digests(sink.todo.digests, plan.header.digest)
            return Received(state, plan.landing.written(), self._relay, plan.rewrite)
        except BaseException as exc:
            if self._cancelled and isinstance(exc, TransferTimeout):
                error = LocalProtocolError(self._cancelled)
                self._end_badly(error)
                raise error from None
            self._end_badly(exc)
            raise
        finally:
            peer.nbytes_wire = self._lane_wire
            if self._talk is not None:
                peer.nbytes_wire += self._talk.connection.nbytes_wire
                self._talk.connection.close()
            self._bell.close()

    def cancel(self, reason: str) -> None:
        """Let the receive fail within a moment. Any thread."""
        self._cancelled = reason
        self._deadline.expire()

    def _patience(self, label: str = "the source") -> Patience:
        return Patience(self._deadline, self._options.stall, label)

    # ------------------------------------------------------------------------------------- agree

    def _call(self) -> Talk:
        hello = encode(Frame.HELLO, self._attempt, self._step, body=[self._me.identity, self._me.name])
        connection = dial(self._invitation, hello, self._patience(), self._me.contexts)
        conversation = Conversation(Role.DESTINATION, self._attempt, self._step)
        conversation.sent(Frame.HELLO)
        self._talk = Talk(connection, conversation)
        self._peer.address = connection.address
        return self._talk

    def _agree(self, talk: Talk, state_dict: Callable[[], object] | None, earlier: Kept | None) -> tuple[_Plan, Sink]:
        header, data = self._await_manifest(talk)
        try:
            with self._heartbeats(talk), no_collection():
                self._stream = settled_stream()
                plan = self._plan(data, state_dict)
                sink = self._sink(plan, earlier)
        except Exception as exc:
            error = exc if isinstance(exc, TransferError) else LocalProtocolError(f"{type(exc).__name__}: {exc}")
            talk.say(Frame.REFUSE, self._patience(), body=[error.message])
            self._peer.outcome = "refused"
            raise error from None
        except BaseException as exc:  # Ctrl-C, or the callback ends the process: the source is told as well
            with suppress(TransferError):
                talk.say(Frame.REFUSE, Patience(Deadline(_LAST_WORDS)), body=[reason_of(exc)])
            self._peer.outcome = "refused"
            raise
        metadata, ident = "", b""
        if header.number > 1:
            self._relay = sink.relay = Relay(
                self._me.desk,
                plan.layout,
                plan.landing,
                sink.todo,
                self._patience(),
                verified=sink.verified,
                stream=self._stream,
                rewrite=plan.rewrite,
            )
            metadata, ident = self._me.metadata, self._relay.ident
        talk.say(Frame.READY, self._patience(), body=[metadata, ident, sink.bitmap()])
        return plan, sink

    def _await_manifest(self, talk: Talk) -> tuple[Header, bytes]:
        is_there = False
        while True:
            patience = self._patience()
            while not self._bell.await_ring(talk.connection, min(HEARTBEAT, self._deadline.remaining())):
                if is_there and self._deadline.expired():
                    break
                patience.check()
            if is_there and self._deadline.expired():
                seconds = self._deadline.timeout.total_seconds()
                raise TransferTimeout(f"timed out after {seconds:g} s: the source is there and has not begun to send")
            header, body = talk.hear(patience)
            is_there = True
            if header.frame is Frame.MANIFEST:
                return header, bytes(body)
            if header.frame is Frame.FAILED:
                raise _GaveUp(f"the source gave up: {'; '.join(body)}")

    def _plan(self, data: bytes, state_dict: Callable[[], object] | None) -> _Plan:
        """Check the state against the template, and decide where each byte lands."""
        kind, body = decode_frame(data)
        if kind is not CodecFrame.MANIFEST:
            raise RemoteProtocolError(f"expected a manifest, got {kind.name}")
        manifest, header = decode_manifest(body)
        if header.step != self._step:
            raise RemoteProtocolError(f"expected step {self._step}, source has step {header.step}")
        if header.digest not in ("", "xxh3") or header.sample >= 0:
            raise RemoteProtocolError(f"expected xxh3 digests of every byte, or none, source has {header.digest!r}")
        layout = lay_out(manifest, header.limits)
        landing = self._landing(manifest, layout, state_dict)
        self._report.num_leaves = len(manifest.leaves)
        self._report.num_messages = len(layout.messages)
        self._report.nbytes_total = layout.nbytes
        if self._torn is not None:
            self._torn.landing = landing
        return _Plan(
            header, state_of(data, body[0]), layout, landing, Rewrite(layout, landing) if self._trains else None
        )

    def _landing(self, manifest: Manifest, layout: Layout, state_dict: Callable[[], object] | None) -> Landing:
        report, options = self._report, self._options
        matched, targets, here = fit(
            manifest,
            state_dict,
            report,
            strict=options.strict,
            on_mismatch=options.on_mismatch,
            copies=options.copies,
        )
        return Landing(
            manifest,
            layout,
            matched,
            targets,
            CPU,
            report,
            surroundings=here,
            fresh_device=options.fresh_device,
            shadow=options.shadow,
        )

    def _sink(self, plan: _Plan, earlier: Kept | None) -> Sink:
        """Where the messages land, with those that may be there already."""
        claims: dict[int, int | None] = {}
        in_template = plan.landing.in_template
        if self._options.skip_unchanged and plan.header.digest:
            claims = dict.fromkeys(filter(in_template, range(len(plan.layout.messages))))
        if earlier is not None:
            left = earlier.left_for(self._step, plan.state, plan.layout)
            left = {message: digest for message, digest in left.items() if in_template(message)}
            claims |= left
            # These are in the template already, and the others are not.
            self._report.torn = bool(left)
        work = Work(len(plan.layout.messages))
        verified = bool(plan.header.digest)
        return Sink(plan.layout, plan.landing, work, self._report, claims, verified=verified, rewrite=plan.rewrite)

    # -------------------------------------------------------------------------------------- move

    def _move(self, talk: Talk, plan: _Plan, sink: Sink) -> None:
        """Fetch everything, from whomever it takes."""
        work, breaks = sink.todo, 0
        try:
            self._source.moved()
            self._await_route(talk)
            while not work.complete:
                route, self._route = self._route, None
                assert route is not None
                error = self._fetch(talk, route, plan, sink)
                if work.complete:
                    if sink.fetch_written_again():
                        self._route = self._route or route
                    continue
                if self._route is not None:
                    continue
                if not route.from_source and self._lost is None:
                    work.forgive()
                    self._reroute(talk, route, error.message, slow=False)
                    continue
                breaks += 1
                if self._lost or breaks == _MAX_BREAKS or self._hopeless:
                    raise error if route.from_source or self._lost is None else self._lost
                logger.warning("the lanes are opened again: %s", error)
                self._route = route
        finally:
            if sink.verified and work.digests:
                known = self.kept.left_for(self._step, plan.state, plan.layout) if self.kept is not None else {}
                self.kept = Kept(self._step, plan.state, plan.layout, known | work.digests)

    def _fetch(self, talk: Talk, route: Route, plan: _Plan, sink: Sink) -> TransferError:
        """Fetch from one supplier until everything is here, its lanes have ended, or the source has named another one;
        gives why the lanes have ended."""
        fetcher = Fetcher(sink, self._bell, self._options, self._attempt, self._step, self._stream)
        trial = Trial(fetcher, lambda: self._try_source(talk, sink), self._options.stall)
        try:
            self._open(fetcher, talk, route)
            while not sink.todo.complete and fetcher.alive:
                self._pump(talk)
                if fetcher.fatal is not None:
                    raise fetcher.fatal
                if not route.from_source and self._lost is None and trial.look():
                    self._reroute(talk, route, "it is much slower than the source", slow=True)
                    if self._route is not None:
                        break
        finally:
            try:
                trial.close()
            finally:
                fetcher.close()
            self._lane_wire += fetcher.nbytes_wire + trial.nbytes_wire
        if fetcher.fatal is not None:
            raise fetcher.fatal
        if not sink.todo.complete:
            # Whoever ends the lanes may have said why.
            self._pump(talk, timedelta(milliseconds=1))
        self._hopeless = fetcher.hopeless
        return fetcher.error or PeerFailure(f"{route.label} has ended its lanes")

    def _try_source(self, talk: Talk, sink: Sink) -> Fetcher:
        """Begin to fetch some messages from the source itself."""
        fetcher = Fetcher(
            sink, self._bell, self._options, self._attempt, self._step, self._stream, num_messages=TRIAL_MESSAGES
        )
        self._open(fetcher, talk, self._from_source(talk))
        return fetcher

    def _open(self, fetcher: Fetcher, talk: Talk, route: Route) -> None:
        # Whoever does not answer is waited for as long as the source waits for a word from here.
        with self._heartbeats(talk) if self._lost is None else nullcontext():
            fetcher.open(route, self._me.contexts, self._patience)

    def _reroute(self, talk: Talk, route: Route, reason: str, *, slow: bool) -> None:
        """Ask the source for another supplier; if it was slow, perhaps there is no better one."""
        talk.say(Frame.REROUTE, self._patience(), body=[route.ident, reason, slow])
        self._await_route(talk)
        if slow and self._route is not None and self._route.ident == route.ident:
            self._route = None

    def _await_route(self, talk: Talk) -> None:
        while self._route is None:
            self._pump(talk)
            if self._lost is not None:
                raise self._lost

    def _pump(self, talk: Talk, limit: timedelta = HEARTBEAT) -> None:
        """Wait for news from the lanes or the source, and say that this side is alive.

        Raises:
            TransferTimeout: The deadline passed.
            _GaveUp: The source will not go on. If it is merely lost, that is noted: the lanes may have everything.
        """
        if self._deadline.expired():
            raise TransferTimeout(f"timed out after {self._deadline.timeout.total_seconds():g} s")
        listening = talk.connection if self._lost is None else None
        readable = self._bell.await_ring(listening, min(limit, self._deadline.remaining()))
        self._tell_progress()
        if self._lost is not None:
            return
        try:
            if readable:
                self._hear(talk)
            if self._beat.expired():
                self._beat = Deadline(HEARTBEAT)
                talk.say(Frame.PROGRESS, self._patience(), self._nbytes_here)
            self._source.check()
        except (_GaveUp, TransferTimeout):
            raise
        except TransferError as exc:
            self._lost = exc

    def _hear(self, talk: Talk) -> None:
        header, body = talk.hear(self._source)
        if header.frame is Frame.FAILED:
            raise _GaveUp(f"the source gave up: {'; '.join(body)}")
        if header.frame is Frame.ROUTE:
            metadata, ident, self._supply = body
            if metadata is None:
                self._route = self._from_source(talk)
            else:
                try:
                    self._route = Route(Invitation.decode(metadata), ident, from_source=False)
                except RemoteProtocolError as exc:  # what another destination has said of itself
                    logger.warning("the source is asked for another supplier: %s", exc.message)
                    talk.say(Frame.REROUTE, self._patience(), body=[ident, exc.message, False])

    def _from_source(self, talk: Talk) -> Route:
        here = self._invitation._replace(addresses=(talk.connection.address,))
        return Route(here, self._supply, from_source=True)

    @property
    def _nbytes_here(self) -> int:
        return self._peer.nbytes + self._report.nbytes_kept

    def _tell_progress(self) -> None:
        nbytes = self._nbytes_here
        if nbytes != self._told:
            self._told = nbytes
            now = Progress("destination", self._step, self._peer.rank, nbytes, self._report.nbytes_total)
            report_progress(self._options.on_progress, now)

    def _heartbeats(self, talk: Talk) -> AbstractContextManager[None]:
        """Say every now and then that this side is alive, while it is busy with something else."""

        def beat() -> bool:
            try:
                talk.say(Frame.PROGRESS, self._patience(), self._nbytes_here)
            except TransferError:
                return True  # whoever talks next finds out
            return False

        return periodically(beat, HEARTBEAT, "heartbeat")

    # --------------------------------------------------------------------------------------- end

    def _say_done(self, talk: Talk, *, verified: bool) -> None:
        self._tell_progress()
        try:
            if self._lost is not None:
                raise self._lost
            patience = Patience(self._deadline, _LAST_WORDS if verified else self._options.stall)
            talk.say(Frame.DONE, patience, self._nbytes_here)
            while (heard := talk.hear(patience))[0].frame is not Frame.BYE:
                if heard[0].frame is Frame.FAILED:
                    raise _GaveUp(f"the source gave up: {'; '.join(heard[1])}")
                patience.check()
        except _GaveUp:
            raise  # what is here is whole and agrees, but is not what the source stands for
        except TransferError as exc:
            if not verified:
                raise  # without digests only the source knows whether its memory was still the state's
            # Everything is here and agrees: that the source cannot be told any more is the source's loss alone.
            logger.warning("the source could not be told that its state arrived: %s", exc)

    def _end_badly(self, exc: BaseException) -> None:
        """Note how it ended, tell the source where it still listens, pass nothing on any more."""
        peer = self._peer
        peer.reason = reason_of(exc)
        if self._relay is not None:
            self._relay.close()
        refused = peer.outcome == "refused"
        if isinstance(exc, (TransferTimeout, Silence)):
            peer.outcome = "timed out"
        elif isinstance(exc, PeerFailure) and not isinstance(exc, _GaveUp):
            peer.outcome = "dead"
        elif not refused:
            peer.outcome = "failed"
        if self._talk is not None and self._lost is None and not isinstance(exc, _GaveUp):
            # Who has been silent for so long will hardly answer now, and after the deadline there is no time.
            is_late = isinstance(exc, (Silence, TransferTimeout))
            patience = Patience(Deadline(HEARTBEAT if is_late else _LAST_WORDS))
            try:
                if not refused:
                    self._talk.say(Frame.FAILED, patience, body=[peer.reason])
                self._talk.connection.finish(patience)
            except TransferError:
                pass
