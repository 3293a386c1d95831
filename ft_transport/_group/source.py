"""The source's side of a transfer: describe once, then serve each destination.

Strategy: the state goes out in flights, several under way at once. Each flight ends with a signal, and the
destination answers it with one once the flight has landed; waiting is for these answers alone, so a death is
noticed at once, and a flight's memory is free again when its answer is there.
"""

from __future__ import annotations

import logging
from collections import deque
from datetime import timedelta
from typing import NamedTuple

import torch

from ft_transport._deadline import Deadline
from ft_transport._group.channel import Channel, Pending
from ft_transport._group.control import FIRST_MESSAGE_TAG, Control, Posted
from ft_transport._group.fan_out import close_failed
from ft_transport._options import NUM_BUCKETS
from ft_transport._plan.buffers import Bucket
from ft_transport._plan.source import SourcePlan
from ft_transport._telemetry.progress import report_progress
from ft_transport._telemetry.report import PeerReport, Progress
from ft_transport._wire.digest import digest_bytes
from ft_transport._wire.frames import Frame, encode_frame
from ft_transport.errors import LocalProtocolError, PeerFailure, RemoteProtocolError, TransferError

__all__ = ["LAST_WORDS", "serve", "send_failure"]

logger = logging.getLogger("ft_transport")

# How long a source whose process is about to end tries to tell the destinations why.
LAST_WORDS = timedelta(seconds=1)


def serve(channel: Channel, outbound: SourcePlan, deadline: Deadline, peer: PeerReport) -> None:
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
        with peer.enter("agree", "source", outbound.options.on_phase):
            control.send_frame(outbound.frame)
            # What came back is of what has arrived. If the description was damaged on the way both would lay out other
            # messages, and gloo ends the process whose receive is too short.
            if control.recv_frame(Frame.READY) != (digest_bytes(outbound.frame),):
                raise RemoteProtocolError("the description of the state came damaged to the destination")
        with peer.enter("move", "source", outbound.options.on_phase), outbound.versions.here():
            _send(control, outbound, peer)
        with peer.enter("verify", "source", outbound.options.on_phase):
            # Before the digests go: a destination that has them and finds them right takes the state for whole.
            _check_unchanged(control, outbound)
            control.send_frame(encode_frame(Frame.DIGESTS, outbound.digests()))
            # A send that is finished is not one that has arrived: up to 2 MiB sit in socket buffers of a frozen
            # destination. Only its word is.
            control.recv_frame(Frame.DONE)
        peer.outcome = "complete"
    except BaseException as exc:
        # In order, the next that a destination receives once it has agreed is a message of the state: a word in its
        # place would land there.
        close_failed(control, peer, exc, can_speak=not (channel.in_order and peer.phase in ("agree", "move")))
        raise
    finally:
        channel.drop()
        peer.nbytes_wire = channel.nbytes_wire


def _send(control: Control, outbound: SourcePlan, peer: PeerReport) -> None:
    lost: PeerFailure | None = None
    try:
        _SourceFlights(control, outbound, peer).send()
    except PeerFailure as exc:
        # Not raised in here: as the context of what follows it would keep frames, and they Works, and these the group.
        lost = exc
    try:
        if lost is not None:
            # A group whose memory was taken away breaks, and calls that a failing connection.
            outbound.placement.check()
            raise lost
    finally:
        lost = None


def _check_unchanged(control: Control, outbound: SourcePlan) -> None:
    """Void the transfer if the state has changed or moved meanwhile."""
    try:
        outbound.placement.check()
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


class _SourceFlights:
    """The flights to one destination."""

    def __init__(self, control: Control, outbound: SourcePlan, peer: PeerReport) -> None:
        self._control = control
        self._outbound = outbound
        self._peer = peer
        self._moving: deque[_Flight] = deque()
        device, pinned = outbound.options.device, outbound.streams.cross
        self._buckets = [Bucket(device, pinned=pinned) for _ in range(NUM_BUCKETS)]

    def send(self) -> None:
        """Send all flights, and wait until the last one has landed."""
        landed = 0
        for flight, messages in enumerate(self._outbound.layout.flights):
            staged_bytes = self._outbound.placement.staged_bytes(messages)
            # Both limits are waits for an answer. A destination that is slow so holds up this thread, and nobody else.
            while len(self._moving) == self._outbound.header.limits.window or (staged_bytes and not self._buckets):
                self._land(landed)
                landed += 1
            self._post(flight, messages, staged_bytes)
        while self._moving:
            self._land(landed)
            landed += 1

    def _post(self, flight: int, messages: range, staged_bytes: int) -> None:
        channel, outbound = self._control.channel, self._outbound
        # Only what is staged needs one; a flight of large tensors goes out of the state's own memory.
        bucket = self._buckets.pop() if staged_bytes else None
        if bucket is not None:
            bucket.reset(staged_bytes)
        tensors = [outbound.placement.bytes_of(message, bucket) for message in messages]
        # What the one before has posted moves meanwhile. On an accelerator the group sends when its stream has come
        # there.
        if outbound.streams.cross:
            outbound.streams.begun().finish()
        # Gloo announces a receive behind the bytes that are queued already, so the answer's is posted first. Where
        # operations run one after the other it would never end: there it is posted when it is waited for.
        answer = None if channel.in_order else self._control.expect()
        works = [
            channel.send(tensor, FIRST_MESSAGE_TAG + message) for message, tensor in zip(messages, tensors, strict=True)
        ]
        # Behind the flight's messages, and small: it is what the destination waits for, and what raises if this side
        # dies.
        works.append(self._control.send_signal(flight))
        self._moving.append(_Flight(messages, tensors, works, answer, bucket))

    def _land(self, number: int) -> None:
        """Wait for the answer to the oldest flight, and take its memory back."""
        flight, outbound, peer = self._moving.popleft(), self._outbound, self._peer
        # While the answer is on its way: the digests cost nothing where there is a core to spare.
        for message, tensor in zip(flight.messages, flight.tensors, strict=True):
            outbound.note_digest(message, tensor)
        self._control.recv_signal(number, flight.answer)
        # They are over, as the answer says; but a Work must be waited for before it may be dropped.
        for work in flight.works:
            self._control.channel.wait(work, self._control.deadline)
        if flight.bucket is not None:
            self._buckets.append(flight.bucket)
        peer.nbytes += sum(tensor.numel() for tensor in flight.tensors)
        progress = Progress("source", outbound.header.step, peer.rank, peer.nbytes, outbound.layout.nbytes)
        report_progress(outbound.options.on_progress, progress)


def send_failure(channel: Channel, device: torch.device, deadline: Deadline, reason: str) -> None:
    """Send a destination, instead of the manifest, the reason why there will be none. Never raises."""
    control = Control(channel, device, deadline)
    try:
        # In the place of the manifest, so that the destination learns it at once and not at its deadline.
        control.send_frame(encode_frame(Frame.FAILED, [reason]))
        control.flush()
    except TransferError as exc:
        # Whoever cannot be told finds out at its deadline; the state's owner has a reason of its own to raise.
        logger.warning("rank %d could not be told: %s", channel.peer_rank, exc)
    finally:
        channel.drop()
