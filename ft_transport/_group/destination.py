"""The destination's side of a transfer: agree, land, verify, rebuild."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ft_transport._deadline import Deadline
from ft_transport._device import NO_STREAMS, Streams, settle
from ft_transport._group.ahead import Ahead
from ft_transport._group.channel import Channel, Pending
from ft_transport._group.control import FIRST_MESSAGE_TAG, Control
from ft_transport._group.fan_out import close_failed
from ft_transport._options import NUM_BUCKETS, Options
from ft_transport._plan.buffers import Bucket, aligned
from ft_transport._plan.destination import DestinationPlan, plan_destination
from ft_transport._plan.expected import Template, read, template_of
from ft_transport._plan.rewrite import Received, Rewrite
from ft_transport._plan.torn import Attempt
from ft_transport._process import no_collection
from ft_transport._telemetry.progress import report_progress
from ft_transport._telemetry.report import Progress, TransferReport
from ft_transport._wire.digest import ALGORITHMS, digest_bytes, digest_message
from ft_transport._wire.frames import Frame, ManifestHeader, encode_frame
from ft_transport._wire.layout import Layout
from ft_transport.errors import LocalProtocolError, PeerFailure, RemoteProtocolError, TransferError, ended

__all__ = ["receive"]

logger = logging.getLogger("ft_transport")

# Leaves that an error names.
_MAX_NAMED = 3
# Flights that are posted while the memory of the next one is waited for: one lands, the other is there when it has.
_MOVING_MEANWHILE = 2


def receive(
    channel: Channel,
    step: int | None,
    state_dict: Callable[[], object] | None,
    options: Options,
    deadline: Deadline,
    report: TransferReport,
    *,
    attempt: Attempt | None = None,
    beside: set[str] | None = None,
) -> Received:
    """Receive one state.

    Args:
        channel: To the source.
        step: Step that both sides must agree on.
        state_dict: Gives the template, None for a fresh state.
        options: The caller's choices.
        deadline: Of the whole call.
        report: Filled with what happened; its only peer is the source.
        attempt: Learns where the state lands.
        beside: Set where the training thread goes on meanwhile: paths of large leaves that forward is known to write,
            which so land beside the template. Learns of more.

    Raises:
        TransferError: As it happened. Nothing writes to the template any more; ``report.torn`` says whether it
            holds a mix of two states.
    """
    (peer,) = report.peers
    control, streams = Control(channel, options.device, deadline), NO_STREAMS
    try:
        with peer.enter("agree", "destination", options.on_phase):
            # The template is untouched until here, whatever goes wrong, so a refusal costs this replica nothing.
            plan = _agree(control, step, state_dict, options, report, beside)
            header, landing, rewrite, streams = plan.header, plan.landing, plan.rewrite, plan.streams
            if attempt is not None:
                attempt.landing = landing
        with peer.enter("move", "destination", options.on_phase):
            flights = _DestinationFlights(control, plan, options, report)
            with streams.use():
                flights.receive()
            streams.begun().finish()
        with peer.enter("verify", "destination", options.on_phase):
            # Nothing is under way any more: a source that gives up here need not break the channel.
            # Also where there are no digests: it says that the state has not changed at the source while it was sent.
            expected = control.recv_frame(Frame.DIGESTS)
            flights.confirm()
            if header.digest:
                _verify(flights.digests, expected)
            landing.check()
            if rewrite is not None and beside is not None:
                _check_unwritten(rewrite, beside)
            _say_done(control)
        with peer.enter("rebuild", "destination", options.on_phase), no_collection():
            # From here on copies go into the template, if it was received beside it: a class whose code raises in the
            # middle of that leaves a mix.
            report.torn = report.torn or landing.copies
            result = landing.rebuild(streams)
            if landing.copies:
                landing.check()  # once more: it was written to
        # Whole again. What follows only keeps the books.
        report.torn = False
        peer.outcome = "complete"
        if rewrite is not None and header.digest:
            rewrite.note_digests(dict(enumerate(flights.digests)), header.digest, header.sample)
        return Received(result, landing.written(), rewrite)
    except BaseException as exc:
        close_failed(control, peer, exc)
        # This replica will not take part in the step: break the group, so that nobody waits for it there.
        channel.abort()
        # Behind it: an operation of the group that never ends would keep a copy waiting.
        streams.abandon()
        raise
    finally:
        channel.drop()
        peer.nbytes_wire = channel.nbytes_wire


# --------------------------------------------------------------------------------------------- agree


class _Plan(NamedTuple):
    """What both sides have agreed on."""

    header: ManifestHeader
    layout: Layout
    landing: DestinationPlan
    rewrite: Rewrite | None
    streams: Streams


def _agree(
    control: Control,
    step: int | None,
    state_dict: Callable[[], object] | None,
    options: Options,
    report: TransferReport,
    beside: set[str] | None,
) -> _Plan:
    template: Template | None = None
    failed: BaseException | None = None
    try:
        # While the source describes its state.
        with no_collection():
            template = template_of(state_dict, options)
    except BaseException as exc:
        # Ctrl-C, too: there is nothing to refuse yet, and a source hears the reason only behind its manifest.
        failed = exc
    data = control.recv_bytes()
    try:
        if failed is not None:
            raise failed
        with no_collection():
            manifest, header, layout = read(control.check(Frame.MANIFEST, data), template)
            _check_header(header, step)
            landing = plan_destination(manifest, layout, template, options, report, beside or frozenset())
            # Before a byte lands: what the template's devices still do may read it.
            streams = settle(landing.device_memory(), control.deadline, options.device)
    # Nobody to refuse anything to.
    except PeerFailure:
        raise
    except Exception as exc:
        # Whatever it is: the template's own code runs in here, and the source waits for an answer, for as long as its
        # deadline.
        error = exc if isinstance(exc, TransferError) else LocalProtocolError(f"{type(exc).__name__}: {exc}")
        try:
            control.give_up(error.message, Frame.REFUSE)
        except TransferError as untold:
            # What is wrong with the state counts, for whoever reads of it here and for the next quorum.
            logger.warning("rank %d could not be told that its state is refused: %s", control.channel.peer_rank, untold)
        raise ended(error, "refused") from None
    # The digest of the manifest goes back with it: both sides derive all messages from that, and one flipped bit in it
    # would have them receive what was not sent.
    control.send_frame(encode_frame(Frame.READY, [digest_bytes(data)]))
    return _Plan(header, layout, landing, Rewrite(layout, landing) if beside is not None else None, streams)


def _check_header(header: ManifestHeader, step: int | None) -> None:
    if header.step != step:
        raise RemoteProtocolError(f"expected step {step}, source has step {header.step}")
    # By name, since this version cannot compute what it does not know. None at all is the source's choice.
    if header.digest and header.digest not in ALGORITHMS:
        raise RemoteProtocolError(f"expected a digest of {', '.join(ALGORITHMS)}, source has {header.digest!r}")


# ---------------------------------------------------------------------------------------------- move


class _Arrival(NamedTuple):
    """One message under way: where its bytes land, and whether that is a bucket."""

    message: int
    data: torch.Tensor
    staged: bool
    work: Pending


class _DestinationFlights:
    """The flights from the source.

    Attributes:
        digests: Of the messages that have landed, in order.
    """

    def __init__(
        self,
        control: Control,
        plan: _Plan,
        options: Options,
        report: TransferReport,
    ) -> None:
        self.digests: list[int] = []
        self._control = control
        self._plan = plan
        _, self._layout, self._landing, self._rewrite, _ = plan
        self._options = options
        self._report = report
        # While gloo fills one, the other is emptied. With none free the next flight is not posted yet.
        self._buckets = [self._bucket() for _ in range(NUM_BUCKETS)]
        self._moving: deque[tuple[list[_Arrival], Bucket | None]] = deque()
        self._answers: deque[Pending] = deque()
        self._next = 0
        self._ahead = Ahead(self._layout, self._landing)

    def receive(self) -> None:
        """Receive all flights."""
        try:
            self._ahead.start()
            self._receive()
        finally:
            self._ahead.close()

    def _receive(self) -> None:
        for flight in range(len(self._layout.flights)):
            # Ahead, so that the bytes of the next flights find their receives: one that is not posted stops the pair.
            self._post_ahead(flight)
            self._control.recv_signal(flight)
            arrivals, bucket = self._moving.popleft()
            for arrival in arrivals:
                self._control.channel.wait(arrival.work, self._control.deadline)
            # What is staged must be read now: its bucket takes the next flight.
            digests = [self._digest(arrival) if arrival.staged else None for arrival in arrivals]
            self._unstage(arrivals, bucket)
            # As soon as may be, since the source waits for it to send another one. What was not read yet is read
            # meanwhile.
            self._answer(flight)
            # Memory of its own can be read while the next flights are under way, a bucket could not.
            self._post_ahead(flight + 1)
            self.digests += [
                self._digest(arrival) if digest is None else digest
                for arrival, digest in zip(arrivals, digests, strict=True)
            ]
            self._tell(arrivals)

    def confirm(self) -> None:
        """Take back the answers' memory, once the source has been heard of after the last one."""
        while self._answers:
            self._control.channel.wait(self._answers.popleft(), self._control.deadline)

    def _post_ahead(self, landed: int) -> None:
        """Post flights as far as the window and the buckets allow."""
        end = min(landed + self._plan.header.limits.window, len(self._layout.flights))
        self._ahead.go_on(end)
        while self._next < end:
            messages = self._layout.flights[self._next]
            targets = [self._landing.placement.direct(message) for message in messages]
            staged = [m for m, target in zip(messages, targets, strict=True) if target is None]
            # Not waited for: the flights that hold the buckets are landed by this same thread.
            if staged and not self._buckets:
                return
            if not self._ahead.is_there(self._next):
                if len(self._moving) >= _MOVING_MEANWHILE:
                    return
                self._ahead.await_memory(self._next, self._control.deadline)
            bucket = self._buckets.pop() if staged else None
            if bucket is not None:
                bucket.reset(sum(aligned(self._layout.sizes[message]) for message in staged))
            self._moving.append(([], bucket))
            self._post(messages, targets, bucket)
            self._next += 1

    def _post(self, messages: range, targets: list[torch.Tensor | None], bucket: Bucket | None) -> None:
        # With the post and not with the arrival: from now on gloo may write, whether anybody waits or not.
        self._report.torn = self._report.torn or self._landing.in_place
        arrivals, _ = self._moving[-1]
        for message, target in zip(messages, targets, strict=True):
            if target is None:
                assert bucket is not None
                target = bucket.take(self._layout.sizes[message])
                arrivals.append(self._expect(message, target, staged=True))
            else:
                arrivals.append(self._expect(message, target, staged=False))
        # Of the signal behind them. Gloo finds it by its tag, whenever it is posted, and is quicker with fewer posted.
        if self._control.channel.in_order:
            self._control.expect_ahead()

    def _expect(self, message: int, data: torch.Tensor, *, staged: bool) -> _Arrival:
        return _Arrival(message, data, staged, self._control.channel.recv(data, FIRST_MESSAGE_TAG + message))

    def _unstage(self, arrivals: list[_Arrival], bucket: Bucket | None) -> None:
        for arrival in arrivals:
            if arrival.staged:
                # Unverified, as everything that lands in place is: the replica counts as torn until all digests agree.
                self._landing.placement.scatter(arrival.message, arrival.data)
                self._report.nbytes_staged += arrival.data.numel()
        if bucket is not None:
            bucket.lend(self._plan.streams.begun())
            self._buckets.append(self._keep(arrivals, bucket))

    def _bucket(self) -> Bucket:
        return Bucket(self._options.device, pinned=self._plan.streams.cross)

    def _keep(self, arrivals: list[_Arrival], bucket: Bucket) -> Bucket:
        """Keep the small messages that were staged; gives a bucket to go on with."""
        if self._rewrite is None:
            return bucket
        staged = [arrival for arrival in arrivals if arrival.staged]
        # Small ones alone may be written by forward without tearing anything (BatchNorm's statistics): with their bytes
        # kept they are the source's again before the optimizer steps.
        small = [arrival for arrival in staged if self._layout.is_small(arrival.message)]
        if len(small) == len(staged) and self._rewrite.keep_if_room({each.message: each.data for each in small}):
            return self._bucket()  # the memory of the old one is kept as it is
        for each in small:
            kept = self._rewrite.take(each.message)
            if kept is not None:
                kept.copy_(each.data)
                self._rewrite.keep(each.message, kept)
        return bucket

    def _answer(self, flight: int) -> None:
        self._answers.append(self._control.send_signal(flight))
        # Else there would be one Work for each flight until the end: a state of a terabyte has sixteen thousand.
        if len(self._answers) > self._plan.header.limits.window:
            # The source has sent the flight that just landed only after it had this answer.
            self._control.channel.wait(self._answers.popleft(), self._control.deadline)

    def _digest(self, arrival: _Arrival) -> int:
        if not self._plan.header.digest:
            return 0
        # Memory of the template may be taken away meanwhile (untyped_storage().resize_(0)), and reading it would end
        # the process. So it is read while it is held.
        held = None if arrival.staged else self._landing.placement.held(arrival.message)
        try:
            return digest_message(arrival.data, self._plan.header.digest, self._plan.header.sample, held)
        except LocalProtocolError:
            self._landing.check()  # which names it
            raise

    def _tell(self, arrivals: list[_Arrival]) -> None:
        (peer,) = self._report.peers
        peer.nbytes += sum(arrival.data.numel() for arrival in arrivals)
        progress = Progress("destination", self._plan.header.step, peer.rank, peer.nbytes, self._layout.nbytes)
        report_progress(self._options.on_progress, progress)


# -------------------------------------------------------------------------------------------- verify


def _verify(digests: list[int], expected: Any) -> None:
    if not isinstance(expected, tuple) or len(expected) != len(digests):
        got = f"{len(expected)} of them" if isinstance(expected, tuple) else type(expected).__name__
        raise RemoteProtocolError(f"expected the digests of {len(digests)} messages, got {got}")
    # All are compared, and not up to the first: how many differ tells a flipped bit from a state that has changed.
    damaged = [m for m, (mine, theirs) in enumerate(zip(digests, expected, strict=True)) if mine != theirs]
    if damaged:
        raise RemoteProtocolError(
            f"{len(damaged)} of {len(digests)} messages differ from what the source sent, the first is message "
            f"{damaged[0]}: damaged on the way, or changed at the source while it was sent"
        )


def _check_unwritten(rewrite: Rewrite, beside: set[str]) -> None:
    """Refuse what forward has written to: the source's bytes of it are gone, and its conversation is at its end."""
    written = rewrite.paths(rewrite.written())
    if written:
        # Remembered for this transport's life: the same buffers are written by each forward.
        beside.update(written)
        raise LocalProtocolError(
            f"forward has written to {', '.join(written[:_MAX_NAMED])} while the state landed there. The next receive "
            "puts that beside the template first; shadow=True does so with all, from the start"
        )


def _say_done(control: Control) -> None:
    try:
        control.send_frame(encode_frame(Frame.DONE, []))
        control.flush()
    except TransferError as exc:
        # Everything is here and agrees: that the source cannot be told any more is the source's loss alone.
        logger.warning("rank %d could not be told that its state arrived: %s", control.channel.peer_rank, exc)
