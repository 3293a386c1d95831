"""Moves a state over a group that answers nothing, as upstream's API for a plain group has it.

Strategy: all is posted to all destinations at once, and waited for; without answers nobody can say more than that the
bytes have left. What is staged waits until the bucket before has left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ft_transport._deadline import Deadline
from ft_transport._device import NO_STREAMS, Streams
from ft_transport._group.channel import GroupChannel, Pending
from ft_transport._group.control import CONTROL_TAG, FIRST_MESSAGE_TAG, FRAME_TAG
from ft_transport._options import NUM_BUCKETS
from ft_transport._plan.buffers import Bucket, aligned
from ft_transport._plan.destination import DestinationPlan
from ft_transport._plan.placement import Placement
from ft_transport._telemetry.report import TransferReport, outcome_of
from ft_transport._wire.layout import Layout
from ft_transport.errors import TransferError

__all__ = ["description", "land_all", "post_and_wait"]


def description(data: bytes, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The first two messages: the length of a description, and its bytes."""
    length = torch.tensor([len(data)], dtype=torch.int64, device=device)
    return length, torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)


def post_and_wait(
    channels: Sequence[GroupChannel],
    data: bytes,
    layout: Layout,
    placement: Placement,
    device: torch.device,
    deadline: Deadline,
    report: TransferReport,
    streams: Streams = NO_STREAMS,
) -> list[TransferError]:
    """Post everything to every destination, then wait; gives what went wrong, one error a destination."""
    # Not the engine of ``source.py``: upstream's API has a destination that says nothing, so there are no answers to
    # wait for, no digests to compare, and no flights.
    buckets = [Bucket(device, pinned=streams.cross) for _ in range(NUM_BUCKETS)]
    sends: list[list[Pending]] = [[] for _ in channels]
    failed: dict[int, TransferError] = {}

    def post(tensor: torch.Tensor, tag: int) -> None:
        for index, channel in enumerate(channels):
            if index not in failed:
                try:
                    # The same tensor to all: they only read it.
                    sends[index].append(channel.send(tensor, tag))
                except TransferError as exc:
                    failed[index] = exc

    def settle() -> None:
        for index, channel in enumerate(channels):
            while sends[index] and index not in failed:
                try:
                    channel.wait(sends[index].pop(0), deadline)
                except TransferError as exc:
                    failed[index] = exc

    # Two messages, as upstream's code has them: its receiver has to know how much to receive.
    length, body = description(data, device)
    post(length, CONTROL_TAG)
    post(body, FRAME_TAG)
    num_staged = 0
    for message in range(len(layout.sizes)):
        bucket = buckets[num_staged % NUM_BUCKETS]
        if placement.is_staged(message):
            if num_staged and num_staged % NUM_BUCKETS == 0:
                settle()  # both buckets are full of bytes that have not left
            bucket.reset(aligned(layout.sizes[message]))
            num_staged += 1
            report.nbytes_staged += layout.sizes[message]
        tensor = placement.bytes_of(message, bucket)
        if streams.cross:
            streams.begun().finish()
        post(tensor, FIRST_MESSAGE_TAG + message)
    settle()
    # After the last wait: until then somebody may have exchanged the memory that was sent (``.data =``).
    placement.check()
    for index, peer in enumerate(report.peers):
        # What has left is all that is known here. A destination that refuses breaks the group, which shows as a failing
        # send, or, if everything had left by then, not at all.
        exc = failed.get(index)
        peer.outcome = "complete" if exc is None else outcome_of(exc)
        peer.reason = "" if exc is None else exc.message
        peer.nbytes = layout.nbytes if exc is None else 0
    return list(failed.values())


def land_all(
    channel: GroupChannel,
    layout: Layout,
    landing: DestinationPlan,
    device: torch.device,
    deadline: Deadline,
    streams: Streams = NO_STREAMS,
) -> None:
    """Receive all messages; what is staged waits for its bucket."""
    buckets = [Bucket(device, pinned=streams.cross) for _ in range(NUM_BUCKETS)]
    # Receives in the source's order, since without answers nothing else says which message comes next.
    posted: list[tuple[int, torch.Tensor, bool, Pending]] = []

    def settle() -> None:
        while posted:
            message, data, staged, pending = posted.pop(0)
            channel.wait(pending, deadline)
            if staged:
                landing.placement.scatter(message, data)
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
