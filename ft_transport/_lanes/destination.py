"""The destination's side of a transfer over lanes: agree with the source, fetch, pass on, rebuild.

Strategy: what has to be decided is decided before the first byte lands: the state is compared with the template while
nothing of it has been written, so a state that does not fit costs this replica nothing. From then on the template may
be a mix of two states, and whatever ends the receive says so.

Not here: the conversation with the source (``_lanes.control``), and whom to fetch from (``_lanes.move``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from ft_transport._deadline import Deadline
from ft_transport._device import Streams, settle
from ft_transport._lanes.control import ControlConnection, GaveUp, Tally
from ft_transport._lanes.dispatcher import Dispatcher
from ft_transport._lanes.move import Mover
from ft_transport._lanes.pending import PendingMessages
from ft_transport._lanes.protocol import LaneFrame, LaneProtocol, Role, encode
from ft_transport._lanes.relay import Relay
from ft_transport._lanes.session import Session
from ft_transport._lanes.sink import Sink
from ft_transport._net.connection import Wakeup
from ft_transport._net.dial import dial
from ft_transport._net.endpoint import Endpoint
from ft_transport._net.handshake_io import SslContexts
from ft_transport._net.stall import PeerStalled, StallTimer
from ft_transport._options import LaneOptions
from ft_transport._plan.destination import DestinationPlan, plan_destination
from ft_transport._plan.expected import Template, read, template_of
from ft_transport._plan.resume import PartialReceive
from ft_transport._plan.rewrite import Received, Rewrite
from ft_transport._plan.torn import Attempt
from ft_transport._process import no_collection
from ft_transport._telemetry.report import TransferReport, outcome_of
from ft_transport._wire.frames import Frame as CodecFrame
from ft_transport._wire.frames import ManifestHeader, decode_frame
from ft_transport._wire.layout import Layout
from ft_transport.errors import (
    LocalProtocolError,
    RemoteProtocolError,
    TransferError,
    TransferTimeout,
    reason_of,
)

__all__ = ["DestinationTransfer", "LocalPeer"]

logger = logging.getLogger("ft_transport")


class LocalPeer(NamedTuple):
    """This process, as others see it.

    Attributes:
        identity: New for each transport.
        name: For the source's report.
        metadata: Where others can fetch from it.
        dispatcher: Leads them to what they may fetch.
        contexts: For TLS, None without.
    """

    identity: bytes
    name: str
    metadata: str
    dispatcher: Dispatcher
    contexts: SslContexts | None


class _Plan(NamedTuple):
    """What both sides have agreed on."""

    header: ManifestHeader
    layout: Layout
    landing: DestinationPlan
    rewrite: Rewrite | None


class _Planner:
    """Decides where everything lands, before the first byte does.

    Args:
        step: Step that both sides must agree on.
        options: The caller's choices.
        report: Filled with what the state is, and how it fits.
        torn: Learns where it lands.
        trains: Whether the training thread goes on meanwhile.
    """

    def __init__(
        self, step: int, options: LaneOptions, report: TransferReport, torn: Attempt | None, trains: bool
    ) -> None:
        self._step = step
        self._options = options
        self._report = report
        self._torn = torn
        self._trains = trains

    def template(self, state_dict: Callable[[], object] | None) -> Template | None:
        """What the callback gives, and what a source of the same state would send."""
        # As a source cuts it for one destination.
        return template_of(state_dict, replace(self._options, chain=False))

    def plan(self, data: bytes, template: Template | None) -> _Plan:
        """Check the state against the template, and decide where each byte lands."""
        kind, body = decode_frame(data)
        if kind is not CodecFrame.MANIFEST:
            raise RemoteProtocolError(f"expected a manifest, got {kind.name}")
        manifest, header, layout = read(body, template)
        # The source has let us in for this step; that its manifest is of the same is for us to see.
        if header.step != self._step:
            raise RemoteProtocolError(f"expected step {self._step}, source has step {header.step}")
        # Samples and sums exist over a group only. Here a message is passed on, and kept for a resume, on the word of
        # its digest alone.
        if header.digest not in ("", "xxh3") or header.sample >= 0:
            raise RemoteProtocolError(f"expected xxh3 digests of every byte, or none, source has {header.digest!r}")
        landing = plan_destination(manifest, layout, template, self._options, self._report)
        # Before the first byte: from now on the guard can name what is torn.
        if self._torn is not None:
            self._torn.landing = landing
        return _Plan(
            header,
            layout,
            landing,
            Rewrite(layout, landing) if self._trains else None,
        )

    def sink(self, plan: _Plan, earlier: PartialReceive | None, streams: Streams) -> Sink:
        """Where the messages land, with those that may be there already."""
        claims: dict[int, int | None] = {}
        in_template = plan.landing.in_template
        if self._options.skip_unchanged and plan.header.digest:
            claims = dict.fromkeys(filter(in_template, range(len(plan.layout.sizes))))
        if earlier is not None:
            left = earlier.left_for(self._step, plan.layout)
            left = {message: digest for message, digest in left.items() if in_template(message)}
            claims |= left
            # These are in the template already, and the others are not.
            self._report.torn = bool(left)
        pending = PendingMessages(len(plan.layout.sizes))
        verified = bool(plan.header.digest)
        return Sink(
            plan.layout,
            plan.landing,
            pending,
            self._report,
            claims,
            verified=verified,
            rewrite=plan.rewrite,
            streams=streams,
        )


def _relay(dispatcher: Dispatcher, plan: _Plan, sink: Sink, timer: StallTimer, *, fabric: str) -> Relay:
    """What passes on what lands in a sink."""
    return Relay(
        dispatcher,
        plan.layout,
        plan.landing,
        sink.pending,
        timer,
        verified=sink.verified,
        fabric=fabric,
        streams=sink.streams,
        rewrite=plan.rewrite,
    )


def _rebuild(landing: DestinationPlan, streams: Streams, report: TransferReport) -> object:
    """The state, once all of it has landed."""
    # With shadow, this is where the template is written to: what fails in between leaves a mix.
    report.torn = report.torn or landing.copies
    try:
        state = landing.rebuild(streams)
    except BaseException:
        streams.abandon()
        raise
    if landing.copies:
        landing.check()  # once more: it was written to
    return state


class DestinationTransfer:
    """One receive.

    Args:
        endpoint: The source's.
        step: Step that both sides must agree on.
        attempt: Distinct for each receive of this process.
        local: This process.
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
        endpoint: Endpoint,
        step: int,
        attempt: int,
        local: LocalPeer,
        options: LaneOptions,
        deadline: Deadline,
        report: TransferReport,
        torn: Attempt | None = None,
        *,
        trains: bool = False,
    ) -> None:
        self.kept: PartialReceive | None = None
        self._endpoint = endpoint
        self._step = step
        self._attempt = attempt
        self._local = local
        self._options = options
        self._deadline = deadline
        self._report = report
        self._relay: Relay | None = None
        self._cancelled = ""
        self._planner = _Planner(step, options, report, torn, trains)
        self._control: ControlConnection | None = None

    def run(
        self, state_dict: Callable[[], object] | None, earlier: PartialReceive | None
    ) -> tuple[Received, Relay | None]:
        """Receive the state.

        Args:
            state_dict: Gives the template, None for a fresh state.
            earlier: What an earlier receive has left.

        Returns:
            The state, and what goes on passing it on until it is closed; None if nobody would ask.

        Raises:
            TransferError: As it happened. Nothing reads or writes the template any more; ``report.torn`` says whether
                it holds a mix of two states.
        """
        self.kept = earlier
        try:
            if self._cancelled:
                raise LocalProtocolError(self._cancelled)
            return self._run(state_dict, earlier)
        except BaseException as exc:
            # cancel() lets the deadline pass, since that is what every wait looks at.
            if self._cancelled and isinstance(exc, TransferTimeout):
                error = LocalProtocolError(self._cancelled)
                self._end_badly(error)
                raise error from None
            self._end_badly(exc)
            raise
        finally:
            if self._control is not None:
                self._report.peers[0].nbytes_wire += self._control.session.connection.nbytes_wire
                self._control.close()

    def _run(
        self, state_dict: Callable[[], object] | None, earlier: PartialReceive | None
    ) -> tuple[Received, Relay | None]:
        (peer,) = self._report.peers
        with peer.enter("agree", "destination", self._options.on_phase):
            control = self._control = self._call()
            peer.address = control.session.connection.address
            plan, sink = self._agree(control, state_dict, earlier)
        with peer.enter("move", "destination", self._options.on_phase):
            self._move(control, plan, sink)
        with peer.enter("verify", "destination", self._options.on_phase):
            plan.landing.check()
            # Before anything is rebuilt: the source is waited for by its own optimizer, and what follows here is no
            # concern of its.
            control.send_done(verified=sink.verified)
        with peer.enter("rebuild", "destination", self._options.on_phase), no_collection():
            state = _rebuild(plan.landing, sink.streams, self._report)
        # Whole, whatever it was at the beginning: what an earlier receive had left is part of it now.
        self._report.torn = False
        self.kept = None
        peer.outcome = "complete"
        # By these the training thread sees later what forward has changed since.
        if plan.rewrite is not None and plan.header.digest:
            plan.rewrite.note_digests(sink.pending.digests, plan.header.digest)
        return Received(state, plan.landing.written(), plan.rewrite), self._relay

    def cancel(self, reason: str) -> None:
        """Let the receive fail within a moment. Any thread."""
        self._cancelled = reason
        # Every wait looks at it, so no other flag has to be looked at in as many places.
        self._deadline.expire()

    # ------------------------------------------------------------------------------------- agree

    def _call(self) -> ControlConnection:
        options, deadline = self._options, self._deadline
        # Before there is a connection, which would be left open if no descriptor is to be had for this.
        wakeup = Wakeup()
        hello = encode(LaneFrame.HELLO, self._attempt, self._step, body=[self._local.identity, self._local.name])
        connection = dial(
            self._endpoint, hello, StallTimer(deadline, options.stall, "the source"), self._local.contexts
        )
        protocol = LaneProtocol(Role.DESTINATION, self._attempt, self._step)
        protocol.sent(LaneFrame.HELLO)
        session, tally = Session(connection, protocol), Tally(self._report, options.on_progress)
        return ControlConnection(session, wakeup, self._endpoint, deadline, options.stall, tally)

    def _agree(
        self, control: ControlConnection, state_dict: Callable[[], object] | None, earlier: PartialReceive | None
    ) -> tuple[_Plan, Sink]:
        template, failed = None, None
        try:
            # While the source describes its state: a state_dict() that gathers shards takes as long, or longer than
            # the source waits for a word.
            with control.heartbeats(), no_collection():
                template = self._planner.template(state_dict)
        except Exception as exc:
            failed = exc  # there is nothing to refuse yet
        except BaseException as exc:  # Ctrl-C, or the callback ends the process: the source is told as well
            if control.is_offered():
                self._refuse(control, reason_of(exc), wait=False)
            raise
        header, data = control.await_manifest()
        try:
            if failed is not None:
                raise failed
            with control.heartbeats(), no_collection():
                plan = self._planner.plan(data, template)
                # Before a byte lands: what the template's devices still do may read it.
                streams = settle(plan.landing.device_memory(), self._deadline)
                sink = self._planner.sink(plan, earlier, streams)
        except Exception as exc:
            # A callback of the user's has raised, say: the source is to know that it is not at fault.
            error = exc if isinstance(exc, TransferError) else LocalProtocolError(f"{type(exc).__name__}: {exc}")
            self._refuse(control, error.message, wait=True)
            raise error from None
        except BaseException as exc:  # as above
            self._refuse(control, reason_of(exc), wait=False)
            raise
        metadata, ident = "", b""
        if header.number > 1:  # there may be somebody behind
            self._relay = sink.relay = _relay(
                self._local.dispatcher, plan, sink, control.timer(), fabric=self._options.reads_by
            )
            metadata, ident = self._local.metadata, self._relay.ident
        control.send_ready(metadata, ident)
        return plan, sink

    def _refuse(self, control: ControlConnection, reason: str, *, wait: bool) -> None:
        try:
            control.refuse(reason, wait=wait)
        except TransferError as exc:
            # What is wrong with the state counts, for whoever reads of it here and for the next quorum.
            logger.warning("the source could not be told that its state is refused: %s", exc)
        self._report.peers[0].outcome = "refused"

    # -------------------------------------------------------------------------------- move and end

    def _move(self, control: ControlConnection, plan: _Plan, sink: Sink) -> None:
        mover = Mover(control, sink, self._options, self._local.contexts)
        try:
            mover.run()
            sink.streams.begun().finish()
        except BaseException:
            sink.streams.abandon()
            raise
        finally:
            self._report.peers[0].nbytes_wire += mover.nbytes_wire
            self._report.peers[0].nbytes_direct += mover.nbytes_direct
            self._report.peers[0].num_lanes = mover.num_lanes
            # Also of what an earlier receive had left and this one has not come to: it is still in the template.
            if sink.verified and sink.pending.digests:
                known = self.kept.left_for(self._step, plan.layout) if self.kept is not None else {}
                self.kept = PartialReceive(self._step, plan.layout, known | sink.pending.digests)

    def _end_badly(self, exc: BaseException) -> None:
        """Note how it ended, tell the source where it still listens, pass nothing on any more."""
        (peer,) = self._report.peers
        peer.reason = reason_of(exc)
        if self._relay is not None:
            # First: those behind turn to the source then, and are not fed from a state that is a mix.
            self._relay.close()
        refused, outcome = peer.outcome == "refused", outcome_of(exc)
        peer.outcome = "refused" if refused and outcome == "failed" else outcome
        if self._control is not None and self._control.lost is None and not isinstance(exc, GaveUp):
            late = isinstance(exc, (PeerStalled, TransferTimeout))
            self._control.send_failed(peer.reason, refused=refused, late=late)
