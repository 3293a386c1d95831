"""The source's side of a transfer: describe once, then serve each destination.

Strategy: the state goes out in flights, several under way at once. Each flight ends with a signal, and the
destination answers it with one once the flight has landed; waiting is for these answers alone, so a death is
noticed at once, and a flight's memory is free again when its answer is there.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import torch

from ft_transport._deadline import Deadline
from ft_transport._group.channel import Channel, Pending
from ft_transport._group.control import FIRST_MESSAGE_TAG, Control, Posted
from ft_transport._group.fan_out import NUM_BUCKETS, Options, end_badly, tell_progress
from ft_transport._plan.blocks import Block, Bucket, Held, aligned, copy_blocks, memory_at, no_collection, share
from ft_transport._plan.unchanged import Reading, Versions
from ft_transport._state.manifest import Blocks, describe
from ft_transport._telemetry.report import PeerReport, Progress, TransferReport
from ft_transport._wire.digest import digest_bytes, digest_message
from ft_transport._wire.frames import Frame, Header, encode_frame, encode_manifest
from ft_transport._wire.layout import Layout, Piece, lay_out
from ft_transport.errors import LocalProtocolError, PeerFailure, RemoteProtocolError, TransferError

__all__ = ["LAST_WORDS", "Gatherer", "Outbound", "serve", "tell_failure"]

logger = logging.getLogger("ft_transport")

# How long a source whose process is about to end tries to tell the destinations why.
LAST_WORDS = timedelta(seconds=1)


class Gatherer:
    """Takes the bytes of messages from a state's memory.

    Args:
        layout: The messages.
        blocks: The memory of each byte range.
        device: Where messages live.
    """

    def __init__(self, layout: Layout, blocks: Blocks, device: torch.device) -> None:
        self._layout = layout
        self._blocks = blocks
        self._device = device

    def staged(self, message: int) -> bool:
        """Whether a message must be gathered into a bucket.

        Small ones always are: under async quorum forward goes on meanwhile, and changes small buffers (BatchNorm).
        """
        pieces = self._layout.messages[message]
        if self._layout.is_small(message):
            return True
        block, _, _ = self._part(pieces[0])
        return not block.dense or block.memory.device.type != self._device.type

    def staged_bytes(self, messages: range) -> int:
        """What a bucket must hold for these messages."""
        return sum(aligned(self._layout.sizes[message]) for message in messages if self.staged(message))

    def check(self) -> None:
        """Raises LocalProtocolError if a tensor of the state has lost its memory; see ``_state.manifest.Blocks``."""
        self._blocks.check()

    def gather(self, message: int, bucket: Bucket | None) -> torch.Tensor:
        """The bytes of a message: the state's own memory, or a copy in the bucket; raises as :meth:`check`."""
        parts = [self._part(piece) for piece in self._layout.messages[message]]
        if not self.staged(message):
            block, begin, nbytes = parts[0]
            if not block.here:
                self.check()
            return block.bytes(begin, begin + nbytes)
        assert bucket is not None
        staged = bucket.take(self._layout.sizes[message])
        try:
            copy_blocks(parts, staged, gather=True)
        except LocalProtocolError:
            self.check()  # which names it
            raise
        return staged

    def held(self, message: int) -> Held | None:
        """The state's own memory, where that is on the CPU and is what :meth:`gather` gives."""
        if self.staged(message) or self._device.type != "cpu":
            return None
        block, begin, nbytes = self._part(self._layout.messages[message][0])
        return Held(block, begin, begin + nbytes)

    def view(self, message: int, bucket: Bucket) -> memoryview:
        """As :meth:`gather`, for messages on the CPU: valid as long as this gatherer and the bucket are."""
        held = self.held(message)
        if held is not None:
            return held.view
        staged = self.gather(message, bucket)
        return memory_at(staged.data_ptr(), staged.numel())

    def _part(self, piece: Piece) -> tuple[Block, int, int]:
        storage, begin, end = piece
        block = self._blocks.get((storage, begin))
        if block is not None:
            return block, 0, end - begin
        first = self._layout.ranges[self._layout.range_of(storage, begin)].begin
        return self._blocks[storage, first], begin - first, end - begin


class Outbound:
    """A described state, ready to be served to any number of destinations at once.

    Args:
        state_dict: The state. Its memory is read until the last :func:`serve` has returned.
        step: Step of the state.
        options: The caller's choices.
        report: Filled with what the state is.
        await_end: Waits until nothing is read any more; see ``_plan.unchanged.Reading``.

    Attributes:
        versions: Tells whether the state has changed since. Release it once nothing is read any more.

    Raises:
        LocalProtocolError: A leaf cannot travel; every such path is named.
    """

    def __init__(
        self,
        state_dict: object,
        step: int | None,
        options: Options,
        report: TransferReport,
        await_end: Callable[[Reading], object] | None = None,
    ) -> None:
        self.options = options
        with no_collection():
            manifest, blocks = describe(state_dict)
            if options.shared:
                share(block.memory for block in blocks.values())
                manifest, blocks = describe(state_dict)
            limits = options.limits(sum(nbytes for nbytes, _ in manifest.storages))
            self.header = Header(step, limits, options.digest, options.sample)
            self.layout = lay_out(manifest, limits)
            self.frame = encode_manifest(manifest, self.header)
        self.versions = Versions(manifest, self.layout, blocks, await_end)
        self.gatherer = Gatherer(self.layout, blocks, options.device)
        self._digests: dict[int, int] = {}
        report.num_leaves = len(manifest.leaves)
        report.num_messages = len(self.layout.messages)
        report.nbytes_total = self.layout.nbytes
        report.nbytes_staged = self.gatherer.staged_bytes(range(report.num_messages))

    def note_digest(self, message: int, data: torch.Tensor) -> None:
        """Fingerprint a message, once for all destinations."""
        if self.header.digest and message not in self._digests:
            held = self.gatherer.held(message)
            try:
                self._digests[message] = digest_message(data, self.header.digest, self.header.sample, held)
            except LocalProtocolError:
                self.gatherer.check()  # which names it
                raise

    def digests(self) -> list[int]:
        """Fingerprints of all messages, in order; empty where nothing is verified."""
        return [self._digests[message] for message in range(len(self.layout.messages))] if self.header.digest else []


def serve(channel: Channel, outbound: Outbound, deadline: Deadline, peer: PeerReport) -> None:
    """Send a described state to one destination.

    Args:
        channel: To the destination; used by nobody else meanwhile.
        outbound: The state.
        deadline: Of the whole call.
        peer: Filled with what happened.

    Raises:
        TransferError: As it happened; ``peer`` holds outcome and reason. Nothing reads the state for this
            destination any more. ``channel.broken`` says whether the group is unusable now.
    """
    control = Control(channel, outbound.options.device, deadline)
    try:
        with peer.enter("agree", "source"):
            control.send_frame(outbound.frame)
            if control.recv_frame(Frame.READY) != (digest_bytes(outbound.frame),):
                raise RemoteProtocolError("the description of the state came damaged to the destination")
        with peer.enter("move", "source"), outbound.versions.here():
            _send(control, outbound, peer)
        with peer.enter("verify", "source"):
            _check_unchanged(control, outbound)
            control.send_frame(encode_frame(Frame.DIGESTS, outbound.digests()))
            control.recv_frame(Frame.DONE)
        peer.outcome = "complete"
    except BaseException as exc:
        end_badly(control, peer, exc)
        raise
    finally:
        channel.drop()
        peer.nbytes_wire = channel.nbytes_wire


def _send(control: Control, outbound: Outbound, peer: PeerReport) -> None:
    lost: PeerFailure | None = None
    try:
        _Flights(control, outbound, peer).send()
    except PeerFailure as exc:
        lost = exc
    try:
        if lost is not None:
            outbound.gatherer.check()  # a group whose memory was taken away breaks, and calls that a failing connection
            raise lost
    finally:
        lost = None


def _check_unchanged(control: Control, outbound: Outbound) -> None:
    """Void the transfer if the state has changed or moved meanwhile."""
    try:
        outbound.gatherer.check()
        outbound.versions.check()
    except LocalProtocolError as exc:
        control.give_up(exc.message)
        raise


class _Flight(NamedTuple):
    """One flight under way."""

    messages: range
    tensors: list[torch.Tensor]
    works: list[Pending]
    answer: Posted | None
    bucket: Bucket | None


class _Flights:
    """The flights to one destination."""

    def __init__(self, control: Control, outbound: Outbound, peer: PeerReport) -> None:
        self._control = control
        self._outbound = outbound
        self._peer = peer
        self._moving: deque[_Flight] = deque()
        self._buckets = [Bucket(outbound.options.device) for _ in range(NUM_BUCKETS)]

    def send(self) -> None:
        """Send all flights, and wait until the last one has landed."""
        landed = 0
        for flight, messages in enumerate(self._outbound.layout.flights):
            staged_bytes = self._outbound.gatherer.staged_bytes(messages)
            while len(self._moving) == self._outbound.header.limits.window or (staged_bytes and not self._buckets):
                self._land(landed)
                landed += 1
            self._post(flight, messages, staged_bytes)
        while self._moving:
            self._land(landed)
            landed += 1

    def _post(self, flight: int, messages: range, staged_bytes: int) -> None:
        channel, outbound = self._control.channel, self._outbound
        bucket = self._buckets.pop() if staged_bytes else None
        if bucket is not None:
            bucket.reset(staged_bytes)
        tensors = [outbound.gatherer.gather(message, bucket) for message in messages]
        # Gloo announces a receive behind the bytes that are queued already, so the answer's is posted first. On an
        # accelerator's group the operations of a pair run one after the other: there it would never end.
        answer = self._control.expect() if outbound.options.device.type == "cpu" else None
        works = [
            channel.send(tensor, FIRST_MESSAGE_TAG + message) for message, tensor in zip(messages, tensors, strict=True)
        ]
        works.append(self._control.send_signal(flight))
        self._moving.append(_Flight(messages, tensors, works, answer, bucket))

    def _land(self, number: int) -> None:
        """Wait for the answer to the oldest flight, and take its memory back."""
        flight, outbound, peer = self._moving.popleft(), self._outbound, self._peer
        for message, tensor in zip(flight.messages, flight.tensors, strict=True):
            outbound.note_digest(message, tensor)
        self._control.recv_signal(number, flight.answer)
        for work in flight.works:
            self._control.channel.wait(work, self._control.deadline)
        if flight.bucket is not None:
            self._buckets.append(flight.bucket)
        peer.nbytes += sum(tensor.numel() for tensor in flight.tensors)
        progress = Progress("source", outbound.header.step, peer.rank, peer.nbytes, outbound.layout.nbytes)
        tell_progress(outbound.options.progress, progress)


def tell_failure(channel: Channel, device: torch.device, deadline: Deadline, reason: str) -> None:
    """Send a destination, instead of the manifest, the reason why there will be none. Never raises."""
    control = Control(channel, device, deadline)
    try:
        control.send_frame(encode_frame(Frame.FAILED, [reason]))
        control.flush()
    except TransferError as exc:
        logger.warning("rank %d could not be told: %s", channel.peer_rank, exc)
    finally:
        channel.drop()
