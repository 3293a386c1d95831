"""Moves a state over a group that answers nothing, as upstream's API for a plain group has it.

Strategy: all is posted at once and waited for, to each destination from a thread of its own; without answers nobody can
say more than that the bytes have left. What is staged waits until the bucket before has left, and each destination has
its own: else one that stands still would keep the bytes of all others back.
"""

from __future__ import annotations

from collections import deque

import torch

from ft_transport._deadline import Deadline
from ft_transport._device import NO_STREAMS, Streams
from ft_transport._group.channel import GroupChannel, Pending
from ft_transport._group.control import CONTROL_TAG, FIRST_MESSAGE_TAG, FRAME_TAG
from ft_transport._options import NUM_BUCKETS
from ft_transport._plan.buffers import Bucket, aligned
from ft_transport._plan.destination import DestinationPlan
from ft_transport._plan.placement import Placement
from ft_transport._telemetry.report import PeerReport, TransferReport, outcome_of
from ft_transport._wire.layout import Layout
from ft_transport.errors import PeerFailure, reason_of

__all__ = ["description", "land_all", "send_all"]


def description(data: bytes, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The first two messages: the length of a description, and its bytes."""
    length = torch.tensor([len(data)], dtype=torch.int64, device=device)
    return length, torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)


def send_all(
    channel: GroupChannel,
    frames: tuple[torch.Tensor, torch.Tensor],
    layout: Layout,
    placement: Placement,
    device: torch.device,
    deadline: Deadline,
    peer: PeerReport,
    streams: Streams = NO_STREAMS,
) -> None:
    """Send a description and all messages to one destination, and wait until they have left.

    Args:
        channel: To the destination.
        frames: As :func:`description`; the same tensors for all destinations, which only read them.
        layout: The messages.
        placement: Where they lie.
        device: Where messages live.
        deadline: Of the whole call.
        peer: Filled with what happened.
        streams: That copies run in.

    Raises:
        TransferError: As it happened; ``peer`` holds outcome and reason. Nothing reads the state for this destination
            any more.
    """
    try:
        with peer.enter("move", "source"):
            _post_and_wait(channel, frames, layout, placement, device, deadline, peer, streams)
            # After the last wait: until then somebody may have exchanged the memory that was sent (``.data =``).
            placement.check()
        # What has left is all that is known here. A destination that refuses breaks the group, which shows as a failing
        # send, or, if everything had left by then, not at all.
        peer.outcome = "complete"
    except BaseException as exc:
        peer.reason, peer.outcome = reason_of(exc), outcome_of(exc, cancelled=channel.broken)
        # A peer that is gone has closed the pair, and a wait on the group that has expired all of them. One for this
        # side's own device has not.
        if not (isinstance(exc, PeerFailure) or channel.broken):
            channel.abort()
        raise
    finally:
        channel.drop()
        peer.nbytes_wire = channel.nbytes_wire


def _post_and_wait(
    channel: GroupChannel,
    frames: tuple[torch.Tensor, torch.Tensor],
    layout: Layout,
    placement: Placement,
    device: torch.device,
    deadline: Deadline,
    peer: PeerReport,
    streams: Streams,
) -> None:
    # Not the engine of ``source.py``: upstream's API has a destination that says nothing, so there are no answers to
    # wait for, no digests to compare, and no flights.
    buckets = [Bucket(device, pinned=streams.cross) for _ in range(NUM_BUCKETS)]
    # Two messages first, as upstream's code has them: its receiver has to know how much to receive.
    posted = deque((0, channel.send(frame, tag)) for frame, tag in zip(frames, (CONTROL_TAG, FRAME_TAG), strict=True))

    def settle() -> None:
        while posted:
            nbytes, pending = posted.popleft()
            channel.wait(pending, deadline)
            peer.nbytes += nbytes

    num_staged = 0
    for message, nbytes in enumerate(layout.sizes):
        bucket = buckets[num_staged % NUM_BUCKETS]
        if placement.is_staged(message):
            if num_staged and num_staged % NUM_BUCKETS == 0:
                settle()  # both buckets are full of bytes that have not left
            bucket.reset(aligned(nbytes))
            num_staged += 1
        tensor = placement.bytes_of(message, bucket)
        if streams.cross:
            streams.begun().finish()
        posted.append((nbytes, channel.send(tensor, FIRST_MESSAGE_TAG + message)))
    settle()


def land_all(
    channel: GroupChannel,
    layout: Layout,
    landing: DestinationPlan,
    device: torch.device,
    deadline: Deadline,
    report: TransferReport,
    streams: Streams = NO_STREAMS,
) -> None:
    """Receive all messages; what is staged waits for its bucket. The report says how far it is."""
    (peer,) = report.peers
    buckets = [Bucket(device, pinned=streams.cross) for _ in range(NUM_BUCKETS)]
    # Receives in the source's order, since without answers nothing else says which message comes next.
    posted: deque[tuple[int, torch.Tensor, bool, Pending]] = deque()

    def settle() -> None:
        while posted:
            message, data, staged, pending = posted.popleft()
            channel.wait(pending, deadline)
            peer.nbytes += data.numel()
            if staged:
                landing.placement.scatter(message, data)
                report.nbytes_staged += data.numel()
        streams.begun().finish()  # the buckets are filled anew

    num_staged = 0
    for message in range(len(layout.sizes)):
        # While what was posted already moves.
        landing.provide(message, ahead=True)
        # None for what must go through a bucket: packed small ranges, strided ones, another device.
        data = landing.placement.direct(message)
        staged = data is None
        if data is None:
            if num_staged and num_staged % NUM_BUCKETS == 0:
                settle()
            bucket = buckets[num_staged % NUM_BUCKETS]
            bucket.reset(aligned(layout.sizes[message]))
            data = bucket.take(layout.sizes[message])
            num_staged += 1
        posted.append((message, data, staged, channel.recv(data, FIRST_MESSAGE_TAG + message)))
    settle()
