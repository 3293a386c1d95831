"""Drives one transfer: describe, lay out, agree, move, verify, rebuild.

Strategy: both sides walk through the same flights in the same order. After each flight the source sends a small
*signal*, and the destination answers with one once the flight has landed; ``WINDOW`` flights are under way. All
waiting is for signals and frames (see ``_channel``), so a death is noticed at once and a finished transfer is one
that the destination has confirmed.

A *control* message is one int64: positive, the length of a frame that follows (and is followed by its length once
more, so that nobody waits for the frame itself); negative, signal number ``-1 - value``.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from ft_transport._channel import Channel, Pending
from ft_transport._codec import (
    MAX_FRAME_BYTES,
    Frame,
    Header,
    decode_frame,
    decode_manifest,
    encode_frame,
    encode_manifest,
)
from ft_transport._deadline import Deadline
from ft_transport._digest import ALGORITHMS, digest_message
from ft_transport._landing import Landing, match_template
from ft_transport._layout import Layout, Limits, lay_out
from ft_transport._manifest import Manifest, Regions, describe
from ft_transport._memory import Bucket, aligned, copy_bytes
from ft_transport.errors import LocalProtocolError, PeerFailure, RemoteProtocolError, TransferError, TransferTimeout
from ft_transport.report import PeerReport, Progress, ProgressCallback, TransferReport

__all__ = ["Inbound", "Options", "Outbound", "encode_outbound", "for_each", "receive", "serve", "tell_failure"]

logger = logging.getLogger("ft_transport")

CONTROL_TAG = 1
FRAME_TAG = 2
FIRST_MESSAGE_TAG = 3

# Flights under way at once, part of the wire. While one moves, the other is verified or staged.
WINDOW = 2

# How long a side that gives up waits for its reason to leave, before it breaks the channel.
_LAST_WORDS = timedelta(seconds=1)
# Bounds the reasons that cross in one frame.
_MAX_REASONS = 100


@dataclass(frozen=True)
class Options:
    """What the caller may choose about a transfer.

    Attributes:
        device: Where messages live that the channel moves.
        limits: How the source cuts messages.
        verify: Whether the source sends digests of its messages.
        strict: Whether missing and unused template leaves are an error.
        progress: Called after each flight, from the thread that serves the peer.
    """

    device: torch.device
    limits: Limits = Limits()
    verify: bool = True
    strict: bool = False
    progress: ProgressCallback | None = None


# ------------------------------------------------------------------------------------------- control


class _Control:
    """Frames and signals over a channel.

    Attributes:
        peer_gave_up: Whether the peer has said that it will not go on.
    """

    def __init__(self, channel: Channel, device: torch.device, deadline: Deadline) -> None:
        self.channel = channel
        self.deadline = deadline
        self.peer_gave_up = False
        self._device = device
        # Sends of frames, reclaimed when the peer has answered.
        self._unconfirmed: list[Pending] = []

    def send_frame(self, data: bytes) -> None:
        body = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self._device)
        self._unconfirmed += [
            self._send_number(len(data)),
            self.channel.send(body, FRAME_TAG),
            self._send_number(len(data)),
        ]

    def send_signal(self, number: int) -> Pending:
        """Send a signal; the caller waits for it once the peer must have it."""
        return self._send_number(-1 - number)

    def _send_number(self, number: int) -> Pending:
        tensor = torch.tensor([number], dtype=torch.int64, device=self._device)
        return self.channel.send(tensor, CONTROL_TAG)

    def flush(self, deadline: Deadline | None = None) -> None:
        """Wait until every frame sent so far has left."""
        # The last one first: it is small, and once it has left so have the others.
        while self._unconfirmed:
            self.channel.wait(self._unconfirmed.pop(), deadline or self.deadline)

    def recv_frame(self) -> tuple[Frame, Any]:
        number = self._recv_number()
        if number <= 0:
            raise RemoteProtocolError(f"expected a frame, got signal {-1 - number}")
        frame = self._recv_body(number)
        self.flush()
        return frame

    def recv_signal(self, expected: int) -> None:
        number = self._recv_number()
        if number > 0:
            self.fail(*self._recv_body(number))
        if -1 - number != expected:
            raise RemoteProtocolError(f"expected signal {expected}, got {-1 - number}")

    def _recv_number(self) -> int:
        number = torch.zeros(1, dtype=torch.int64, device=self._device)
        self.channel.wait(self.channel.recv(number, CONTROL_TAG), self.deadline)
        return int(number.item())

    def _recv_body(self, nbytes: int) -> tuple[Frame, Any]:
        if nbytes > MAX_FRAME_BYTES:
            raise RemoteProtocolError(f"a frame of {nbytes} bytes, at most {MAX_FRAME_BYTES} are accepted")
        body = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        pending = self.channel.recv(body, FRAME_TAG)
        again = self._recv_number()
        self.channel.wait(pending, self.deadline)
        if again != nbytes:
            raise RemoteProtocolError(f"a frame of {nbytes} bytes ends with {again}")
        local = body.cpu()
        return decode_frame(ctypes.string_at(local.data_ptr(), nbytes))

    def fail(self, kind: Frame, body: Any) -> None:
        """Raise what a REFUSE or FAILED frame says; anything else is out of order."""
        reasons = "; ".join(map(str, body)) if isinstance(body, list) else str(body)
        if kind is Frame.REFUSE:
            raise RemoteProtocolError(f"the destination refuses this state: {reasons}")
        if kind is Frame.FAILED:
            self.peer_gave_up = True
            raise PeerFailure(f"the peer gave up: {reasons}")
        raise RemoteProtocolError(f"a frame out of order: {kind.name}")

    def last_words(self, reason: str) -> None:
        """Tell the peer why, if it still listens, and break the channel."""
        try:
            self.send_frame(encode_frame(Frame.FAILED, [reason]))
            self.flush(Deadline(min(self.deadline.remaining(), _LAST_WORDS)))
        except TransferError:
            pass
        self.channel.abort()


# -------------------------------------------------------------------------------------------- source


class Gatherer:
    """Takes the bytes of messages from a state's memory.

    Args:
        layout: The messages.
        regions: The memory of each byte range.
        device: Where messages live.
    """

    def __init__(self, layout: Layout, regions: Regions, device: torch.device) -> None:
        self._layout = layout
        self._regions = regions
        self._device = device

    def staged(self, message: int) -> bool:
        """Whether a message must be gathered into a bucket."""
        pieces = self._layout.messages[message]
        if len(pieces) > 1:
            return True
        region = self._region(pieces[0].storage, pieces[0].begin)[0]
        flat = region.dtype == torch.uint8 and region.dim() == 1 and region.is_contiguous()
        return not flat or region.device.type != self._device.type

    def gather(self, message: int, bucket: Bucket) -> torch.Tensor:
        """The bytes of a message: the state's own memory, or a copy in the bucket."""
        pieces = self._layout.messages[message]
        if not self.staged(message):
            region, begin = self._region(pieces[0].storage, pieces[0].begin)
            return region[begin : begin + pieces[0].end - pieces[0].begin]
        staged = bucket.take(nbytes_of(self._layout, message))
        parts = staged.split([piece.end - piece.begin for piece in pieces])
        flat_sources, flat_parts = [], []
        for piece, part in zip(pieces, parts, strict=True):
            region, begin = self._region(piece.storage, piece.begin)
            if region.dtype == torch.uint8 and region.dim() == 1:
                flat_sources.append(region[begin : begin + part.numel()])
                flat_parts.append(part)
            else:
                copy_bytes(region, begin, part, to_flat=True)
        if flat_parts:
            torch._foreach_copy_(flat_parts, flat_sources)
        return staged

    def _region(self, storage: int, begin: int) -> tuple[torch.Tensor, int]:
        piece = self._layout.ranges[self._layout.range_of(storage, begin)]
        return self._regions[storage, piece.begin], begin - piece.begin


class Outbound:
    """A described state, ready to be served to any number of destinations at once.

    Args:
        state_dict: The state. Its memory is read until the last :func:`serve` has returned.
        step: Step of the state.
        options: The caller's choices.
        report: Filled with what the state is.

    Raises:
        LocalProtocolError: A leaf cannot travel; every such path is named.
    """

    def __init__(self, state_dict: object, step: int | None, options: Options, report: TransferReport) -> None:
        self.manifest, regions = describe(state_dict)
        self.layout = lay_out(self.manifest, options.limits)
        self.gatherer = Gatherer(self.layout, regions, options.device)
        self.options = options
        self.digest = _digest_algorithm(options) if options.verify else ""
        self.header = Header(step, options.limits, self.digest)
        self._digests: dict[int, int] = {}
        report.num_leaves = len(self.manifest.leaves)
        report.num_messages = len(self.layout.messages)
        report.nbytes_total = self.layout.nbytes
        report.nbytes_staged = sum(nbytes_of(self.layout, m) for m in range(report.num_messages) if self.gatherer.staged(m))

    def note_digest(self, message: int, data: torch.Tensor) -> None:
        """Fingerprint a message, once for all destinations."""
        if self.digest and message not in self._digests:
            self._digests[message] = digest_message(data, self.digest)

    def digests(self) -> list[int]:
        """Fingerprints of all messages, in order; empty where nothing is verified."""
        return [self._digests[message] for message in range(len(self.layout.messages))] if self.digest else []


def nbytes_of(layout: Layout, message: int) -> int:
    """Payload bytes of one message."""
    return sum(piece.end - piece.begin for piece in layout.messages[message])


def _digest_algorithm(options: Options) -> str:
    return "xxh3" if options.device.type == "cpu" else "sum"


def serve(
    channel: Channel, outbound: Outbound, frame: bytes, deadline: Deadline, peer: PeerReport
) -> None:
    """Send a described state to one destination.

    Args:
        channel: To the destination; used by nobody else meanwhile.
        outbound: The state.
        frame: Its MANIFEST frame.
        deadline: Of the whole call.
        peer: Filled with what happened.

    Raises:
        TransferError: As it happened; ``peer`` holds outcome and reason. Nothing reads the state for this
            destination any more. ``channel.broken`` says whether the group is usable.
    """
    control = _Control(channel, outbound.options.device, deadline)
    try:
        with peer.enter("agree", "source"):
            control.send_frame(frame)
            kind, body = control.recv_frame()
            if kind is not Frame.READY:
                control.fail(kind, body)
        with peer.enter("move", "source"):
            _send_flights(control, outbound, peer)
        with peer.enter("verify", "source"):
            control.send_frame(encode_frame(Frame.DIGESTS, outbound.digests()))
            kind, body = control.recv_frame()
            if kind is not Frame.DONE:
                control.fail(kind, body)
        peer.outcome = "complete"
    except BaseException as exc:
        _end_badly(control, peer, exc)
        raise
    finally:
        channel.drop()
        peer.nbytes_wire = channel.nbytes_wire


def _send_flights(control: _Control, outbound: Outbound, peer: PeerReport) -> None:
    flights = outbound.layout.flights
    buckets = [Bucket(outbound.options.device) for _ in range(WINDOW)]
    moving: dict[int, tuple[list[torch.Tensor], list[Pending]]] = {}

    def landed(flight: int) -> None:
        tensors, works = moving.pop(flight)
        first, last = flights[flight]
        for message, tensor in zip(range(first, last), tensors, strict=True):
            outbound.note_digest(message, tensor)
        control.recv_signal(flight)
        for work in works:
            control.channel.wait(work, control.deadline)
        peer.nbytes += sum(tensor.numel() for tensor in tensors)
        _tell_progress(outbound.options.progress, Progress(
            "source", outbound.header.step, peer.rank, peer.nbytes, outbound.layout.nbytes
        ))

    try:
        for flight, (first, last) in enumerate(flights):
            bucket = buckets[flight % WINDOW]
            bucket.reset(sum(
                aligned(nbytes_of(outbound.layout, m)) for m in range(first, last) if outbound.gatherer.staged(m)
            ))
            tensors = [outbound.gatherer.gather(message, bucket) for message in range(first, last)]
            works = [
                control.channel.send(tensor, FIRST_MESSAGE_TAG + message)
                for message, tensor in zip(range(first, last), tensors, strict=True)
            ]
            works.append(control.send_signal(flight))
            moving[flight] = (tensors, works)
            if len(moving) == WINDOW:
                landed(flight + 1 - WINDOW)
        for flight in sorted(moving):
            landed(flight)
    finally:
        moving.clear()


def _end_badly(control: _Control, peer: PeerReport, exc: BaseException) -> None:
    """Note how a transfer ended, and leave nothing posted that could touch memory."""
    peer.reason = exc.message if isinstance(exc, TransferError) else f"{type(exc).__name__}: {exc}"
    if isinstance(exc, TransferTimeout):
        peer.outcome = "timed out"
    elif control.peer_gave_up:
        peer.outcome = "failed"
        _await_closure(control)
    elif isinstance(exc, PeerFailure):
        peer.outcome = "dead"
    elif isinstance(exc, RemoteProtocolError) and peer.phase == "agree":
        peer.outcome = "refused"
    else:
        peer.outcome = "failed"
        control.last_words(peer.reason)


def _await_closure(control: _Control) -> None:
    """Wait for the pair to close: a peer that gives up closes it, and only then nothing posted moves any more."""
    try:
        control.recv_signal(-1)
    except TransferError:
        pass


def tell_failure(channel: Channel, device: torch.device, deadline: Deadline, reason: str) -> None:
    """Send a destination, instead of the manifest, the reason why there will be none. Never raises."""
    control = _Control(channel, device, deadline)
    try:
        control.send_frame(encode_frame(Frame.FAILED, [reason]))
        control.flush()
    except TransferError as exc:
        logger.warning("rank %d could not be told: %s", channel.peer_rank, exc)
    finally:
        channel.drop()


# --------------------------------------------------------------------------------------- destination


class Inbound:
    """One receive: what the source described, where it lands, and the state built from it."""

    def __init__(
        self, step: int | None, state_dict: Callable[[], object] | None, options: Options, report: TransferReport
    ) -> None:
        self._step = step
        self._state_dict = state_dict
        self._options = options
        self._report = report
        self.landing: Landing
        self.layout: Layout
        self.header: Header

    def accept(self, manifest: Manifest, header: Header) -> None:
        """Check what the source described, and decide where each byte lands.

        Raises:
            RemoteProtocolError: The step is another one, or the template disagrees; the text lists every path.
            MemoryError: There is no room for what must be allocated.
        """
        if header.step != self._step:
            raise RemoteProtocolError(f"expected step {self._step}, source has step {header.step}")
        if header.digest and header.digest not in ALGORITHMS:
            raise RemoteProtocolError(f"expected a digest of {', '.join(ALGORITHMS)}, source has {header.digest!r}")
        report = self._report
        self.header = header
        self.layout = lay_out(manifest, header.limits)
        template = match_template(manifest, self._state_dict(), report) if self._state_dict else {}
        self.landing = Landing(manifest, self.layout, template, self._options.device, report)
        reasons = list(self.landing.disagreements)
        if self._options.strict:
            reasons += [f"{path}: expected in the template, source has it" for path in report.missing]
            reasons += [f"{path}: expected from the source, template has it" for path in report.unused]
        if reasons:
            raise RemoteProtocolError("; ".join(reasons))
        self.landing.plan()
        report.num_leaves = len(manifest.leaves)
        report.num_messages = len(self.layout.messages)
        report.nbytes_total = self.layout.nbytes


def receive(
    channel: Channel,
    step: int | None,
    state_dict: Callable[[], object] | None,
    options: Options,
    deadline: Deadline,
    report: TransferReport,
) -> object:
    """Receive one state.

    Args:
        channel: To the source.
        step: Step that both sides must agree on.
        state_dict: Gives the template, None for a fresh state.
        options: The caller's choices.
        deadline: Of the whole call.
        report: Filled with what happened; its only peer is the source.

    Raises:
        TransferError: As it happened. Nothing writes to the template any more; ``torn`` says whether it holds
            a mix of two states.
    """
    (peer,) = report.peers
    control = _Control(channel, options.device, deadline)
    inbound = Inbound(step, state_dict, options, report)
    try:
        with peer.enter("agree", "destination"):
            _agree(control, inbound)
        with peer.enter("move", "destination"):
            digests, expected = _recv_flights(control, inbound, options, report)
        with peer.enter("verify", "destination"):
            _verify(control, inbound, digests, expected)
        with peer.enter("rebuild", "destination"):
            result = inbound.landing.rebuild()
        report.torn = False
        peer.outcome = "complete"
        return result
    except BaseException as exc:
        _end_badly(control, peer, exc)
        # This replica will not take part in the step: break the group, so that nobody waits for it there.
        channel.abort()
        raise
    finally:
        channel.drop()
        peer.nbytes_wire = channel.nbytes_wire


def _agree(control: _Control, inbound: Inbound) -> None:
    kind, body = control.recv_frame()
    if kind is not Frame.MANIFEST:
        control.fail(kind, body)
    try:
        manifest, header = decode_manifest(body)
        inbound.accept(manifest, header)
    except Exception as exc:
        error = exc if isinstance(exc, TransferError) else _as_refusal(exc)
        control.send_frame(encode_frame(Frame.REFUSE, [error.message]))
        control.flush()
        raise error from None
    control.send_frame(encode_frame(Frame.READY, []))


def _as_refusal(exc: Exception) -> TransferError:
    return LocalProtocolError(f"the destination cannot take the state: {type(exc).__name__}: {exc}")


def _recv_flights(
    control: _Control, inbound: Inbound, options: Options, report: TransferReport
) -> tuple[list[int], Any]:
    """Receive all flights; gives the digests of what arrived, and those that the source sent."""
    layout, landing = inbound.layout, inbound.landing
    (peer,) = report.peers
    buckets = [Bucket(options.device) for _ in range(WINDOW)]
    digests: list[int] = []
    moving: dict[int, list[tuple[int, torch.Tensor, bool, Pending]]] = {}
    signals: deque[Pending] = deque()

    def post(flight: int) -> None:
        first, last = layout.flights[flight]
        targets = [landing.direct(message) for message in range(first, last)]
        staged = [aligned(nbytes_of(layout, first + i)) for i, target in enumerate(targets) if target is None]
        buckets[flight % WINDOW].reset(sum(staged))
        report.torn = report.torn or landing.touches_template()
        moving[flight] = []
        for message, target in zip(range(first, last), targets, strict=True):
            data = buckets[flight % WINDOW].take(nbytes_of(layout, message)) if target is None else target
            work = control.channel.recv(data, FIRST_MESSAGE_TAG + message)
            moving[flight].append((message, data, target is None, work))

    def digest(data: torch.Tensor) -> int:
        return digest_message(data, inbound.header.digest) if inbound.header.digest else 0

    try:
        for flight in range(min(WINDOW, len(layout.flights))):
            post(flight)
        for flight in range(len(layout.flights)):
            control.recv_signal(flight)
            arrived = moving.pop(flight)
            for _, data, _, work in arrived:
                control.channel.wait(work, control.deadline)
            # A bucket is free only once it was read, memory of the template's own need not wait for that.
            early = {message: digest(data) for message, data, staged, _ in arrived if staged}
            for message, data, staged, _ in arrived:
                if staged:
                    landing.scatter(message, data)
                    report.nbytes_staged += data.numel()
            signals.append(control.send_signal(flight))
            if len(signals) > WINDOW:
                # The flight that just arrived was only sent after this signal.
                control.channel.wait(signals.popleft(), control.deadline)
            if flight + WINDOW < len(layout.flights):
                post(flight + WINDOW)
            digests += [early[message] if staged else digest(data) for message, data, staged, _ in arrived]
            peer.nbytes += sum(data.numel() for _, data, _, _ in arrived)
            _tell_progress(options.progress, Progress(
                "destination", inbound.header.step, peer.rank, peer.nbytes, layout.nbytes
            ))
        kind, body = control.recv_frame()
        while signals:
            control.channel.wait(signals.popleft(), control.deadline)
    finally:
        moving.clear()
    if kind is not Frame.DIGESTS:
        control.fail(kind, body)
    return digests, body


def _verify(control: _Control, inbound: Inbound, digests: list[int], expected: Any) -> None:
    if inbound.header.digest and expected != digests:
        damaged = [m for m, digest in enumerate(digests) if m >= len(expected) or expected[m] != digest]
        raise RemoteProtocolError(
            f"{len(damaged)} of {len(digests)} messages differ from what the source sent, first message {damaged[:1]}: "
            "damaged on the way, or changed at the source while it was sent"
        )
    try:
        control.send_frame(encode_frame(Frame.DONE, []))
        control.flush()
    except TransferError as exc:
        # Everything is here and agrees: that the source cannot be told any more is its loss alone.
        logger.warning("rank %d could not be told that its state arrived: %s", control.channel.peer_rank, exc)


def _tell_progress(callback: ProgressCallback | None, progress: Progress) -> None:
    if callback is None:
        return
    try:
        callback(progress)
    except Exception:
        logger.exception("the progress callback raised; the transfer goes on")


def encode_outbound(outbound: Outbound) -> bytes:
    """The MANIFEST frame of a described state.

    Raises:
        LocalProtocolError: A plain value cannot be encoded; every such path is named.
    """
    return encode_manifest(outbound.manifest, outbound.header)


def for_each(channels: Sequence[Channel], run: Callable[[int], None]) -> list[BaseException | None]:
    """Run ``run(index)`` for every channel at once, each in its own thread; gives what each raised.

    A single channel is served in the caller's thread. The threads work on the caller's device and stream.
    """
    errors: list[BaseException | None] = [None] * len(channels)

    def guarded(index: int) -> None:
        try:
            run(index)
        except BaseException as exc:
            # A traceback kept here would keep the frames of this thread, and with them the group.
            errors[index] = exc.with_traceback(None)

    if len(channels) == 1:
        guarded(0)
        return errors
    stream = torch.accelerator.current_stream() if torch.accelerator.is_available() else None

    def in_stream(index: int) -> None:
        with stream or contextlib.nullcontext():
            guarded(index)

    threads = [
        threading.Thread(target=in_stream, args=(index,), name=f"ft_transport-rank{channel.peer_rank}")
        for index, channel in enumerate(channels)
    ]
    started = []
    try:
        for thread in threads:
            thread.start()
            started.append(thread)
        for thread in threads:
            thread.join()
    except BaseException:
        # Ctrl-C, or no more threads to be had: nothing may move once this call is over.
        for channel in channels:
            channel.abort()
        raise
    finally:
        for thread in started:
            thread.join()
    return errors
