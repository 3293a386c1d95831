"""What a destination passes on, and from which memory."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
from helpers import CPU, noise, until

from ft_transport._deadline import Deadline
from ft_transport._device import NO_STREAMS, Streams
from ft_transport._lanes import relay as relay_module
from ft_transport._lanes.dispatcher import Dispatcher
from ft_transport._lanes.pending import PendingMessages
from ft_transport._lanes.protocol import HEADER_BYTES, TRAILER, FirstFrame, LaneFrame, LaneHeader, encode
from ft_transport._lanes.relay import Relay
from ft_transport._lanes.session import fingerprint
from ft_transport._net.connection import Connection
from ft_transport._net.stall import StallTimer
from ft_transport._net.zero_copy import SPLICE_FROM
from ft_transport._plan.buffers import Bucket
from ft_transport._plan.compare import compare
from ft_transport._plan.destination import DestinationPlan
from ft_transport._plan.template import match_template
from ft_transport._state.describe import describe
from ft_transport._telemetry.report import TransferReport
from ft_transport._wire.layout import Limits, lay_out
from ft_transport.testing import StandInAccelerator

LARGE = SPLICE_FROM // 4  # elements of four bytes


@contextlib.contextmanager
def passing_on(
    template: dict[str, Any], *, verified: bool, streams: Streams = NO_STREAMS
) -> Iterator[tuple[Relay, Dispatcher, PendingMessages]]:
    """A relay of a state that lands in the template, all of which is here."""
    report = TransferReport("destination", "test", 7)
    manifest, _ = describe(template)
    layout = lay_out(manifest, Limits())
    matched = match_template(manifest, template, report)
    landing = DestinationPlan(manifest, layout, matched, compare(manifest, matched, report)[0], CPU, report)
    pending, dispatcher = PendingMessages(len(layout.messages)), Dispatcher()
    for message in range(len(layout.messages)):
        pending.landed(message, 5)
    timer = StallTimer(Deadline(timedelta(seconds=20)), timedelta(seconds=5))
    relay = Relay(dispatcher, layout, landing, pending, timer, verified=verified, streams=streams)
    yield relay, dispatcher, pending
    relay.close()


@pytest.mark.parametrize("verified", [True, False], ids=["verified", "not verified"])
def test_what_nobody_could_check_is_copied_before_this_side_goes_on(verified: bool) -> None:
    """What was written and not yet read changes with memory that is spliced, and then there must be a digest."""
    weight = noise(LARGE, 1)
    before = weight.clone()
    with passing_on({"weight": weight}, verified=verified) as (relay, dispatcher, _), contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        theirs = stack.enter_context(socket.create_connection(server.getsockname()))
        ours = Connection(server.accept()[0], "peer")
        dispatcher.dispatch(ours, FirstFrame(LaneHeader(LaneFrame.ATTACH, 1, 7), (relay.ident,)))
        theirs.sendall(encode(LaneFrame.WANT, 1, 7, 0, [1]))
        nbytes = HEADER_BYTES + SPLICE_FROM + TRAILER.size
        until(lambda: ours.nbytes_wire >= nbytes + HEADER_BYTES)  # what was asked counts as well
        weight.zero_()
        got = Connection(theirs.dup(), "relay")
        stack.callback(got.close)
        got.read(HEADER_BYTES, StallTimer(Deadline(timedelta(seconds=10))))
        data = got.read(SPLICE_FROM, StallTimer(Deadline(timedelta(seconds=10))))
    assert data == bytes((weight if verified else before).view(torch.uint8).numpy())


def test_small_messages_are_passed_on_as_they_came() -> None:
    """Training goes on with the memory, and lanes with the bucket that they came in."""
    template = {f"mean {i}": noise(10, i) for i in range(3)}
    with passing_on(template, verified=True) as (relay, _, _):
        came = torch.arange(relay.sizes[0], dtype=torch.uint8)
        expected = bytes(came.numpy())
        relay.keep(0, came)
        came.zero_()
        for tensor in template.values():
            tensor.zero_()
        bucket = Bucket(CPU)
        bucket.reset(4096)
        assert bytes(relay.view(0, bucket)) == expected


def test_large_messages_do_not_take_the_room_of_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator all messages are staged, the large ones first: one of them would take all there is."""
    monkeypatch.setattr(relay_module, "SMALL_BYTES", 1 << 20)
    template = {"weight": noise(1 << 20, 1).t(), **{f"mean {i}": noise(10, i) for i in range(3)}}
    with passing_on(template, verified=True) as (relay, _, _):
        small = next(message for message, nbytes in enumerate(relay.sizes) if nbytes < 1 << 12)
        for message, nbytes in enumerate(relay.sizes):
            if message != small:
                relay.keep(message, torch.zeros(min(nbytes, 1 << 20), dtype=torch.uint8))
        relay.keep(small, torch.full((relay.sizes[small],), 7, dtype=torch.uint8))
        bucket = Bucket(CPU)
        bucket.reset(4096)
        assert set(bytes(relay.view(small, bucket))) == {7}


def test_what_is_taken_back_before_its_answer_goes_is_not_vouched_for() -> None:
    """Forward has written to it, and it is fetched again. Its bytes were copied from the device by then, as they were:
    a digest that is taken of those would have the next one take them for the source's."""
    good = {"a": noise(1 << 20, 1), "b": noise(1 << 20, 2)}
    template = {name: tensor.clone() for name, tensor in good.items()}
    with StandInAccelerator(1) as devices, contextlib.ExitStack() as stack:
        for tensor in template.values():
            devices.put(tensor, 0)
        report = TransferReport("destination", "test", 7)
        manifest, _ = describe(template)
        layout = lay_out(manifest, Limits())
        matched = match_template(manifest, template, report)
        landing = DestinationPlan(manifest, layout, matched, compare(manifest, matched, report)[0], CPU, report)
        pending, dispatcher = PendingMessages(2), Dispatcher()
        for message, tensor in enumerate(good.values()):
            pending.landed(message, fingerprint(memoryview(tensor.view(torch.uint8).numpy())))
        devices.reach(template["b"]).mul_(2)  # forward
        timer = StallTimer(Deadline(timedelta(seconds=20)), timedelta(seconds=5))
        streams = Streams([torch.device("cuda", 0)], timer.deadline)
        relay = Relay(dispatcher, layout, landing, pending, timer, verified=True, streams=streams)
        stack.callback(relay.close)
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        # So small that the first message fills them, and the answer to the second is begun while it waits.
        server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        theirs = stack.enter_context(socket.socket())
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        theirs.connect(server.getsockname())
        ours = Connection(server.accept()[0], "peer")
        dispatcher.dispatch(ours, FirstFrame(LaneHeader(LaneFrame.ATTACH, 1, 7), (relay.ident,)))
        theirs.sendall(encode(LaneFrame.WANT, 1, 7, 0, [1]) + encode(LaneFrame.WANT, 1, 7, 1, [1]))
        until(lambda: devices.num_copies == 2)
        pending.again([1])
        got = Connection(theirs.dup(), "relay")
        stack.callback(got.close)
        limit = StallTimer(Deadline(timedelta(seconds=10)))
        for tensor in good.values():
            data = got.read(HEADER_BYTES + tensor.nbytes, limit)[HEADER_BYTES:]
            (digest,) = TRAILER.unpack(got.read(TRAILER.size, limit))
            assert digest == fingerprint(memoryview(tensor.view(torch.uint8).numpy())), "the source's"
        assert bytes(data) != bytes(good["b"].view(torch.uint8).numpy()), "which the one who gets it finds"


class OnADevice:
    """A relay of two large messages that are on a device, and one lane that fetches from it."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.devices = stack.enter_context(StandInAccelerator(1))
        self.good = [noise(1 << 20, 1), noise(1 << 20, 2)]
        template = {str(index): self.devices.put(tensor.clone(), 0) for index, tensor in enumerate(self.good)}
        timer = StallTimer(Deadline(timedelta(seconds=20)), timedelta(seconds=5))
        self.streams = Streams([torch.device("cuda", 0)], timer.deadline)
        relay = stack.enter_context(passing_on(template, verified=True, streams=self.streams))
        self.relay, dispatcher, _ = relay
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.theirs = stack.enter_context(socket.create_connection(server.getsockname()))
        attach = FirstFrame(LaneHeader(LaneFrame.ATTACH, 1, 7), (self.relay.ident,))
        self.attach = lambda: dispatcher.dispatch(Connection(server.accept()[0], "peer"), attach)
        self.got = Connection(self.theirs.dup(), "relay")
        stack.callback(self.got.close)

    def arrive(self, message: int) -> Bucket:
        """As a lane does once a message is on the device."""
        bucket = Bucket(CPU, pinned=True)
        nbytes = self.good[message].nbytes
        bucket.reset(nbytes)
        bucket.take(nbytes).copy_(self.good[message].view(torch.uint8))
        self.relay.keep_on_its_way(message, bucket)
        return bucket

    def fetch(self, message: int) -> bytes:
        limit = StallTimer(Deadline(timedelta(seconds=10)))
        self.theirs.sendall(encode(LaneFrame.WANT, 1, 7, message, [1]))
        data = self.got.read(HEADER_BYTES + self.good[message].nbytes, limit)[HEADER_BYTES:]
        self.got.read(TRAILER.size, limit)
        return data


def test_what_is_on_the_host_already_is_not_read_back_from_the_device() -> None:
    with contextlib.ExitStack() as stack:
        it = OnADevice(stack)
        it.attach()
        it.arrive(0)
        # As the next message does. What was lent to the one behind is not touched by it.
        bucket = it.arrive(1)
        bucket.reset(1 << 22)
        bucket.take(1 << 22).zero_()
        for message, tensor in enumerate(it.good):
            assert it.fetch(message) == bytes(tensor.view(torch.uint8).numpy())
        assert it.devices.num_copies == 0
        # It was for the first who asks. Who asks again has the device's.
        assert it.fetch(0) == bytes(it.good[0].view(torch.uint8).numpy())
        assert it.devices.num_copies == 1


def test_memory_of_what_is_on_its_way_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "_ON_THEIR_WAY_BYTES", 6 << 20)
    with contextlib.ExitStack() as stack:
        it = OnADevice(stack)
        it.attach()
        it.arrive(0)
        it.arrive(1)
        assert [it.fetch(message) for message in (1, 0)] == [
            bytes(it.good[message].view(torch.uint8).numpy()) for message in (1, 0)
        ]
        assert it.devices.num_copies == 1, "the older one made room"


def test_nothing_is_kept_for_nobody() -> None:
    with contextlib.ExitStack() as stack:
        it = OnADevice(stack)
        bucket = it.arrive(0)
        before = it.devices.nbytes_pinned
        bucket.reset(1 << 22)
        assert it.devices.nbytes_pinned == before, "the lane has its memory still"
