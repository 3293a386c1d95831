"""LaneTransport over loopback, all ends in this process: what it promises when all is well, and when it is not."""

from __future__ import annotations

import gc
import logging
import os
import random
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from ft_transport import (
    LaneTransport,
    LocalProtocolError,
    PeerFailure,
    RemoteProtocolError,
    TornStateError,
    TransferError,
)
from ft_transport._lanes.protocol import HEADER_BYTES
from ft_transport._net import listener as _listener
from ft_transport._net.endpoint import Endpoint
from ft_transport._net.handshake import client_handshake
from ft_transport._options import LaneOptions
from ft_transport._telemetry.report import TransferReport
from ft_transport.errors import TransferTimeout
from ft_transport.testing import FaultProxy, Tamper

from .harness import DEVICE, digest, residue, wait_until

CPU = torch.device("cpu")
# What lands on an accelerator is whole, and sound, before a byte of it is written there.
IN_PIECES = DEVICE.type == "cpu"
TIMEOUT = timedelta(seconds=20)
STALL = timedelta(seconds=1)
STEP = 7
MIB = 1 << 20
# Where the first message's bytes begin in what comes down a lane: behind the handshake's answer and the header.
PAYLOAD = 64 + HEADER_BYTES


def make_state(seed: int = 1, *, large: int = 3, nbytes: int = 6 * MIB) -> dict[str, Any]:
    """Large tensors of two messages each, small ones that travel together, strided ones that are staged."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(size: int) -> torch.Tensor:
        # Random is slow. The period is a prime, so that no two messages are alike.
        period = torch.randint(0, 256, (99_991,), dtype=torch.uint8, generator=generator)
        return period.repeat(size // period.numel() + 1)[:size].clone().to(DEVICE)

    return {
        "large": [tensor(nbytes) for _ in range(large)],
        "strided": tensor(2 * MIB).view(1024, 2048).t(),
        "small": {f"bias {i}": tensor(100 + i) for i in range(30)},
        "lr": 0.1 * seed,
    }


def tensors(state: dict[str, Any]) -> list[torch.Tensor]:
    return [*state["large"], state["strided"], *state["small"].values()]


def envelope(state: dict[str, Any]) -> dict[str, Any]:
    return {"user": {"default": state}, "torchft": {"step": STEP, "batches_committed": 3}}


def flip(data: bytes, position: int, at: int) -> bytes:
    """Flip the lowest bit of the byte at place ``at`` of the stream, if it is among these."""
    if not position <= at < position + len(data):
        return data
    damaged = bytearray(data)
    damaged[at - position] ^= 1
    return bytes(damaged)


def once(damage: Callable[[bytes], bytes | None], at: int, direction: str, connection: int) -> Tamper:
    """Damage the bytes of one connection from place ``at`` on, as far as they come in one piece."""

    def tamper(number: int, way: str, position: int, data: bytes) -> bytes | None:
        if (number, way) != (connection, direction) or not position <= at < position + len(data):
            return data
        damaged = damage(data[at - position :])
        return None if damaged is None else data[: at - position] + damaged

    return tamper


@dataclass
class Destination:
    """One that receives, in a thread of its own."""

    transport: LaneTransport[Any]
    template: dict[str, Any] | None
    result: Any = None
    error: BaseException | None = None
    seconds: float = 0.0
    thread: threading.Thread | None = None

    def start(self, metadata: str, step: int = STEP, timeout: timedelta = TIMEOUT) -> Destination:
        self.thread = threading.Thread(target=self._receive, args=(metadata, step, timeout))
        self.thread.start()
        return self

    def _receive(self, metadata: str, step: int, timeout: timedelta) -> None:
        begin = time.monotonic()
        self.result = self.error = None
        try:
            self.result = self.transport.recv_checkpoint(0, metadata, step, timeout)
        except BaseException as exc:
            self.error = exc
        self.seconds = time.monotonic() - begin

    def join(self) -> Destination:
        assert self.thread is not None
        self.thread.join(30)
        assert not self.thread.is_alive()
        return self

    def sound(self, state: dict[str, Any]) -> bool:
        return self.error is None and digest(self.result["user"]["default"]) == digest(state)

    @property
    def report(self) -> TransferReport:
        report = self.transport.last_report
        assert report is not None
        return report


@dataclass
class Lanes:
    """Makes what a test needs, and takes it down."""

    transports: list[LaneTransport[Any]] = field(default_factory=list)
    proxies: list[FaultProxy] = field(default_factory=list)

    def transport(self, template: Callable[[], object] | None = None, **options: Any) -> LaneTransport[Any]:
        # Over TCP, as between machines; what is read within one is in test_fabric.py.
        options = {"stall_timeout": STALL, "host": "127.0.0.1", "fabric": "tcp", **options}
        made: LaneTransport[Any] = LaneTransport(TIMEOUT, DEVICE, template, **options)
        self.transports.append(made)
        return made

    def destination(self, template: dict[str, Any] | None = None, **options: Any) -> Destination:
        return Destination(self.transport((lambda: template) if template is not None else None, **options), template)

    def proxy(self, metadata: str, tamper: Tamper = lambda number, way, position, data: data) -> FaultProxy:
        made = FaultProxy(metadata, tamper)
        self.proxies.append(made)
        return made


@pytest.fixture
def lanes() -> Iterator[Lanes]:
    gc.collect()
    before = residue()
    found = Lanes()
    yield found
    for proxy in found.proxies:
        proxy.close()
    for transport in found.transports:
        transport.shutdown()
    found.transports.clear()
    try:
        wait_until(lambda: set(residue().threads) <= set(before.threads), 5)
    except TimeoutError:
        assert set(residue().threads) <= set(before.threads)
    assert residue().descriptors <= before.descriptors


def heal(lanes: Lanes, state: dict[str, Any], tamper: Tamper | None = None, **options: Any) -> Destination:
    """One source, one destination in place, and what is between them."""
    source = lanes.transport()
    metadata = source.metadata() if tamper is None else lanes.proxy(source.metadata(), tamper).metadata
    destination = lanes.destination(make_state(2), lanes=1, **options).start(metadata)
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    destination.join()
    source.disallow_checkpoint()
    return destination


# -------------------------------------------------------------------------------------- all is well


@pytest.mark.parametrize("num_lanes", [1, 4])
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "fresh"])
@pytest.mark.parametrize("verify", [True, False], ids=["verified", "not verified"])
def test_a_state_arrives(lanes: Lanes, verify: bool, in_place: bool, num_lanes: int) -> None:
    state = make_state()
    source = lanes.transport(verify=verify)
    destination = lanes.destination(make_state(2) if in_place else None, lanes=num_lanes).start(source.metadata())
    source.send_checkpoint([3], STEP, envelope(state), TIMEOUT)
    destination.join()
    source.disallow_checkpoint()
    assert destination.sound(state)
    assert destination.result["torchft"] == {"step": STEP, "batches_committed": 3}
    if in_place:
        assert destination.template is not None
        assert [t.data_ptr() for t in tensors(destination.result["user"]["default"])] == [
            t.data_ptr() for t in tensors(destination.template)
        ]
    sent, got = source.last_report, destination.report
    assert sent is not None
    assert sent.complete
    assert (sent.peers[0].rank, sent.peers[0].nbytes) == (3, got.nbytes_total)
    assert got.complete
    assert got.peers[0].address == "127.0.0.1"
    assert got.in_place_share == (1.0 if in_place else 0.0)
    assert 1.0 <= got.nbytes_wire / got.nbytes_total < 1.01
    assert f"rank 0 at {got.peers[0].address} complete" in got.summary()


def test_the_destination_may_come_first_or_last(lanes: Lanes) -> None:
    source, state = lanes.transport(), make_state()
    for early in (True, False):
        destination = lanes.destination(make_state(2))
        if early:
            destination.start(source.metadata())
            wait_until(lambda: bool(source._local.dispatcher._waiting))
        source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
        if not early:
            destination.start(source.metadata())
        assert destination.join().sound(state)
        source.disallow_checkpoint()


@pytest.mark.parametrize("early", [True, False])
def test_a_callback_may_take_longer_than_a_peer_may_be_silent(lanes: Lanes, early: bool) -> None:
    source, state, template = lanes.transport(), make_state(), make_state(2)
    asked, offered = threading.Event(), threading.Event()

    def slowly() -> object:
        asked.set()
        if not offered.is_set():
            offered.wait(10)
            time.sleep(1.5 * STALL.total_seconds())
        return template

    destination = Destination(lanes.transport(slowly), template)
    if early:
        destination.start(source.metadata())
        assert asked.wait(10)
        time.sleep(1.5 * STALL.total_seconds())
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    if not early:
        destination.start(source.metadata())
        assert asked.wait(10)
    offered.set()
    assert destination.join().sound(state), destination.error
    assert destination.seconds > STALL.total_seconds()
    source.disallow_checkpoint()


def test_the_source_does_not_wait_and_small_tensors_may_change(lanes: Lanes) -> None:
    source, state = lanes.transport(), make_state()
    expected = digest(state)
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    for tensor in state["small"].values():
        tensor.zero_()
    destination = lanes.destination(make_state(2)).start(source.metadata()).join()
    assert digest(destination.result["user"]["default"]) == expected
    source.disallow_checkpoint()


def test_blocking_waits(lanes: Lanes) -> None:
    source, state = lanes.transport(blocking=True), make_state()
    destination = lanes.destination(make_state(2)).start(source.metadata())
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    report = source.last_report
    assert report is not None
    assert report.complete
    for tensor in tensors(state):
        tensor.zero_()
    assert destination.join().sound(make_state())


def test_disallow_waits_for_those_who_are_being_served(lanes: Lanes) -> None:
    source, state = lanes.transport(), make_state()
    slow = slowly(200)
    proxy = lanes.proxy(source.metadata(), slow)
    destination = lanes.destination(make_state(2)).start(proxy.metadata)
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    wait_until(lambda: proxy.nbytes > MIB)
    source.disallow_checkpoint()
    for tensor in tensors(state):
        tensor.zero_()
    assert destination.join().sound(make_state())


def slowly(megabytes_per_second: float) -> Tamper:
    """Bytes come down late."""

    def tamper(number: int, way: str, position: int, data: bytes) -> bytes:
        if way == "down":
            time.sleep(len(data) / megabytes_per_second / 1e6)
        return data

    return tamper


def test_autograd_is_told_in_disallow(lanes: Lanes) -> None:
    state, template = make_state(), make_state(2)
    weight = torch.ones(3, requires_grad=True)
    state["weight"], template["weight"] = torch.full((3,), 2.0), weight.detach()
    product = (weight * weight).sum()
    source = lanes.transport()
    destination = lanes.destination(template).start(source.metadata())
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    destination.join()
    assert weight.tolist() == [2.0] * 3
    product.backward(retain_graph=True)  # torchft discards it
    destination.transport.disallow_checkpoint()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    source.disallow_checkpoint()


def test_ipv6(lanes: Lanes) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    source, state = lanes.transport(host="::1"), make_state()
    assert source.metadata().startswith("ft-lanes://[::1],")
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    destination = lanes.destination(make_state(2)).start(source.metadata()).join()
    assert destination.sound(state)
    assert destination.report.peers[0].address == "::1"
    source.disallow_checkpoint()


def test_an_address_that_does_not_answer_costs_a_moment(lanes: Lanes) -> None:
    source, state = lanes.transport(), make_state()
    endpoint = Endpoint.decode(lanes.proxy(source.metadata()).metadata)
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    # At the first address somebody listens who is no peer, at the second there is nobody.
    with socket.create_server(("127.0.0.3", endpoint.port)):
        wrong = endpoint._replace(addresses=("127.0.0.3", "127.0.0.4", *endpoint.addresses)).encode()
        destination = lanes.destination(make_state(2)).start(wrong).join()
    assert destination.sound(state)
    assert (destination.report.peers[0].address,) == endpoint.addresses
    assert destination.report.seconds["agree"] < 1.0
    source.disallow_checkpoint()


# ----------------------------------------------------------------------------------- it goes wrong


def test_refusals_are_learned_by_both(lanes: Lanes) -> None:
    source, template = lanes.transport(), make_state(2)
    template["large"][0] = torch.zeros(3)
    template["small"]["bias 3"] = torch.zeros(1)
    before = digest(template)
    destination = lanes.destination(template, on_mismatch="refuse").start(source.metadata())
    source.send_checkpoint([1], STEP, envelope(make_state()), TIMEOUT)
    destination.join()
    source.disallow_checkpoint()
    assert isinstance(destination.error, RemoteProtocolError)
    assert not destination.error.torn
    assert digest(template) == before
    report = source.last_report
    assert report is not None
    assert report.peers[0].outcome == destination.report.peers[0].outcome == "refused"
    for text in (str(destination.error), report.peers[0].reason):
        assert "large.0" in text
        assert "small.bias 3" in text


def test_a_step_that_is_over_is_refused(lanes: Lanes) -> None:
    source = lanes.transport()
    destination = lanes.destination(make_state(2)).start(source.metadata(), step=STEP - 1)
    source.send_checkpoint([1], STEP, envelope(make_state()), TIMEOUT)
    destination.join()
    source.disallow_checkpoint()
    assert isinstance(destination.error, PeerFailure)
    assert "expected step 6, source has step 7" in str(destination.error)


def test_a_state_that_cannot_travel(lanes: Lanes) -> None:
    source = lanes.transport()
    early = lanes.destination(make_state(2)).start(source.metadata())
    wait_until(lambda: bool(source._local.dispatcher._waiting))
    with pytest.raises(LocalProtocolError, match=r"user\.default\.hook"):
        source.send_checkpoint([1, 2], STEP, envelope({"hook": lambda: None}), TIMEOUT)
    late = lanes.destination(make_state(2)).start(source.metadata())
    for destination in (early, late):
        destination.join()
        assert isinstance(destination.error, PeerFailure)
        assert "user.default.hook" in str(destination.error)
    source.disallow_checkpoint()


def test_wrong_ranks(lanes: Lanes) -> None:
    with pytest.raises(LocalProtocolError, match="each once"):
        lanes.transport().send_checkpoint([1, 1], STEP, {}, TIMEOUT)


def test_whoever_comes_is_served(lanes: Lanes) -> None:
    """As torchft's own transport does, where no rank is named."""
    source, state = lanes.transport(), make_state()
    source.send_checkpoint([], STEP, envelope(state), TIMEOUT)
    for num_served in (1, 2):
        assert lanes.destination(make_state(2)).start(source.metadata()).join().sound(state)
        report = source.last_report
        assert report is not None
        wait_until(lambda report=report, num=num_served: [p.outcome for p in report.peers] == ["complete"] * num)
    source.disallow_checkpoint()
    assert report.complete
    assert report.nbytes_wire > 2 * report.nbytes_total
    late = lanes.destination(make_state(2)).start(source.metadata(), timeout=timedelta(seconds=0.3)).join()
    assert isinstance(late.error, TransferTimeout)


def test_nobody_is_waited_for_where_none_is_named(lanes: Lanes) -> None:
    source, slow = lanes.transport(), slowly(200)
    for blocking in (False, True):
        source._blocking = blocking
        source.send_checkpoint([], STEP, envelope(make_state()), TIMEOUT)
        source.disallow_checkpoint()
        report = source.last_report
        assert report is not None
        assert (report.complete, report.peers) == (True, [])
    # But whoever has come has its time.
    state = make_state()
    source._blocking = False
    source.send_checkpoint([], STEP, envelope(state), TIMEOUT)
    proxy = lanes.proxy(source.metadata(), slow)
    destination = lanes.destination(make_state(2)).start(proxy.metadata)
    wait_until(lambda: proxy.nbytes > MIB)
    source.disallow_checkpoint()
    assert destination.join().sound(state)


def test_where_none_is_named_the_deadline_ends_the_offer(lanes: Lanes) -> None:
    source = lanes.transport()
    source.send_checkpoint([], STEP, envelope(make_state()), timedelta(seconds=0.1))
    offer = source._serving.transfer
    assert offer is not None
    wait_until(lambda: offer.is_over)


def test_a_transport_receives_from_itself(lanes: Lanes) -> None:
    state = make_state()
    source = lanes.transport(lambda: state)
    source.send_checkpoint([], STEP, envelope(state), TIMEOUT)
    destination = Destination(source, state)
    for _ in range(2):
        assert destination.start(source.metadata()).join().sound(state), destination.error
        received = destination.result["user"]["default"]
        assert not {t.data_ptr() for t in tensors(received)} & {t.data_ptr() for t in tensors(state)}
    assert not source.torn
    source.disallow_checkpoint()
    source.send_checkpoint([0], STEP, envelope(state), TIMEOUT)
    assert destination.start(source.metadata()).join().sound(state)
    source.disallow_checkpoint()


def test_a_destination_that_never_comes(lanes: Lanes, caplog: pytest.LogCaptureFixture) -> None:
    source = lanes.transport()
    source.send_checkpoint([1], STEP, envelope(make_state()), TIMEOUT)
    begin = time.monotonic()
    with caplog.at_level(logging.WARNING, "ft_transport"):
        source.disallow_checkpoint()
    assert time.monotonic() - begin < 1.5
    report = source.last_report
    assert report is not None
    assert report.peers[0].outcome == "timed out"
    assert "has not come" in caplog.text


def test_the_deadline_is_kept_on_both_sides(lanes: Lanes) -> None:
    source, state = lanes.transport(), make_state()
    proxy = lanes.proxy(source.metadata(), slowly(2))
    template = make_state(2)
    destination = lanes.destination(template).start(proxy.metadata, timeout=timedelta(seconds=1))
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    destination.join()
    assert isinstance(destination.error, TransferTimeout)
    assert destination.seconds >= 1.0
    # Nobody has waited for the rest, which takes ten seconds in all.
    assert proxy.nbytes < sum(tensor.nbytes for tensor in tensors(state)) / 2
    # A message may have landed whole by then.
    moved = destination.error.phase == "move"
    assert destination.error.torn == (moved if IN_PIECES else destination.report.peers[0].nbytes > 0)
    source.disallow_checkpoint()
    assert proxy.nbytes < sum(tensor.nbytes for tensor in tensors(state)) / 2
    # Nothing lands any more.
    before = digest(template)
    for tensor in tensors(state):
        tensor.zero_()
    time.sleep(0.3)
    assert digest(template) == before


def test_the_sources_deadline_ends_the_transfer(lanes: Lanes) -> None:
    source, state = lanes.transport(), make_state()
    proxy = lanes.proxy(source.metadata(), slowly(2))
    destination = lanes.destination(make_state(2)).start(proxy.metadata)
    begin = time.monotonic()
    source.send_checkpoint([1], STEP, envelope(state), timedelta(seconds=1))
    source.disallow_checkpoint()
    assert time.monotonic() - begin < 2.5
    destination.join()
    assert isinstance(destination.error, PeerFailure)
    report = source.last_report
    assert report is not None
    assert report.peers[0].outcome == "timed out"


def test_shutdown_ends_everything(lanes: Lanes) -> None:
    source, state = lanes.transport(), make_state()
    proxy = lanes.proxy(source.metadata(), slowly(2))
    destination = lanes.destination(make_state(2)).start(proxy.metadata)
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    wait_until(lambda: proxy.nbytes > 100_000)
    begin = time.monotonic()
    source.shutdown()
    source.shutdown()
    assert time.monotonic() - begin < 2.0
    destination.join()
    assert isinstance(destination.error, PeerFailure)
    assert "the source has ended the transfer" in str(destination.error)


@pytest.mark.parametrize("moving", [True, False], ids=["bytes move", "nobody offers"])
def test_shutdown_ends_a_receive(lanes: Lanes, moving: bool) -> None:
    source, state, template = lanes.transport(), make_state(), make_state(2)
    proxy = lanes.proxy(source.metadata(), slowly(2))
    destination = lanes.destination(template).start(proxy.metadata)
    if moving:
        source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
        wait_until(lambda: proxy.nbytes > 1_000_000)
    else:
        wait_until(lambda: proxy.nbytes > 0)
    begin = time.monotonic()
    destination.transport.shutdown()
    landed = digest(template)  # and nothing lands any more
    assert time.monotonic() - begin < 4.0
    destination.join()
    assert isinstance(destination.error, LocalProtocolError)
    assert "has been shut down" in str(destination.error)
    assert destination.error.torn == destination.transport.torn == (moving and IN_PIECES)
    source.disallow_checkpoint()
    assert digest(template) == landed
    if moving:
        assert "has been shut down" in source.last_report.peers[0].reason


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_process_keeps_nothing_open(lanes: Lanes) -> None:
    """As a DataLoader's worker, forked while a state is sent."""
    source, state = lanes.transport(), make_state()
    proxy = lanes.proxy(source.metadata(), slowly(10))
    destination = lanes.destination().start(proxy.metadata)
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    wait_until(lambda: proxy.nbytes > 1_000_000)
    waits, go_on = os.pipe()
    child = os.fork()
    if not child:
        os.close(go_on)
        os.read(waits, 1)  # until the other end is closed
        os._exit(0)
    try:
        assert destination.join().sound(state)
        source.disallow_checkpoint()
        source.shutdown()
        lanes.transport(port=Endpoint.decode(source.metadata()).port)
    finally:
        os.close(go_on)
        os.close(waits)
        os.waitpid(child, 0)


def test_nothing_moves_after_shutdown(lanes: Lanes) -> None:
    source, ended = lanes.transport(), lanes.transport()
    source.send_checkpoint([1], STEP, envelope(make_state()), TIMEOUT)
    ended.shutdown()
    begin = time.monotonic()
    with pytest.raises(LocalProtocolError, match="has been shut down"):
        ended.send_checkpoint([1], STEP, envelope(make_state()), TIMEOUT)
    ended.disallow_checkpoint()
    with pytest.raises(LocalProtocolError, match="has been shut down"):
        ended.recv_checkpoint(0, source.metadata(), STEP, TIMEOUT)
    assert time.monotonic() - begin < 3.0


def test_a_transport_that_nobody_holds_stops_listening() -> None:
    before = residue()
    transport: LaneTransport[Any] = LaneTransport(TIMEOUT, CPU)
    assert residue().threads != before.threads
    del transport
    gc.collect()
    wait_until(lambda: residue().threads == before.threads, 5)
    assert residue().descriptors <= before.descriptors


def test_one_at_a_time(lanes: Lanes) -> None:
    source = lanes.transport()
    destination = lanes.destination(make_state(2)).start(source.metadata())
    wait_until(lambda: bool(source._local.dispatcher._waiting))
    with pytest.raises(LocalProtocolError, match="one at a time"):
        destination.transport.recv_checkpoint(0, source.metadata(), STEP, TIMEOUT)
    source.send_checkpoint([1], STEP, envelope(make_state()), TIMEOUT)
    assert destination.join().error is None
    source.disallow_checkpoint()


def test_the_metadata_of_another_transport(lanes: Lanes) -> None:
    destination = lanes.destination(make_state(2)).start("http://host:1/checkpoint/").join()
    assert isinstance(destination.error, RemoteProtocolError)


def test_nobody_there(lanes: Lanes) -> None:
    source = lanes.transport()
    metadata = Endpoint.decode(source.metadata())._replace(addresses=("127.0.0.1", "::1")).encode()
    source.shutdown()
    destination = lanes.destination(make_state(2)).start(metadata).join()
    assert isinstance(destination.error, PeerFailure)
    assert "127.0.0.1: " in str(destination.error)
    assert "::1: " in str(destination.error)
    assert destination.seconds < 1.0


@pytest.mark.parametrize(
    "arguments",
    [
        {"lanes": 0},
        {"lanes": 17},
        {"lanes": 2.5},
        {"port": -1},
        {"port": 1 << 16},
        {"ssl_context": 5},
        {"ssl_context": (1, 2)},
        {"strict": True},
        {"topology": "ring"},
        {"stall_timeout": timedelta(0)},
        {"interface": "no such"},
        {"host": "no.such.host.invalid"},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_wrong_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        LaneTransport(TIMEOUT, CPU, **arguments)


def test_a_port_that_is_taken(lanes: Lanes) -> None:
    port = Endpoint.decode(lanes.transport().metadata()).port
    with pytest.raises(LocalProtocolError, match=f"cannot listen on port {port}"):
        LaneTransport(TIMEOUT, CPU, port=port)


# --------------------------------------------------------------------------------------- corruption


def test_a_flipped_bit_in_a_message_is_repaired(lanes: Lanes) -> None:
    state = make_state()

    def tamper(number: int, way: str, position: int, data: bytes) -> bytes:
        return flip(data, position, PAYLOAD + 3 * MIB + 17) if (number, way) == (1, "down") else data

    destination = heal(lanes, state, tamper)
    assert destination.sound(state)
    assert destination.report.num_repaired == 1


@pytest.mark.parametrize(
    ("damage", "at"),
    [
        (lambda data: None, PAYLOAD + 5 * MIB),
        (lambda data: data[1:], PAYLOAD + 5 * MIB),
        (lambda data: data + data, PAYLOAD + 5 * MIB),
        (lambda data: data[len(data) // 2 :] + data[: len(data) // 2], PAYLOAD - HEADER_BYTES),
        (lambda data: bytes([data[0] ^ 1]) + data[1:], PAYLOAD - 20),
        (lambda data: bytes([data[0] ^ 1]) + data[1:], 5),
    ],
    ids=["cut", "byte lost", "doubled", "reordered", "flip in a header", "flip in the handshake"],
)
def test_a_lane_that_breaks_is_opened_again(lanes: Lanes, damage: Callable[[bytes], bytes | None], at: int) -> None:
    state = make_state()
    destination = heal(lanes, state, once(damage, at, "down", connection=1))
    assert destination.sound(state)


def test_damage_without_end_is_an_error(lanes: Lanes) -> None:
    message_bytes = LaneOptions(CPU, chain=False).limits(1).message_bytes
    state, template = ({"a": torch.full((4 * message_bytes,), fill, dtype=torch.uint8)} for fill in (1, 2))

    def tamper(number: int, way: str, position: int, data: bytes) -> bytes:
        """Flip one bit in each message, all of which are of the same size."""
        if number == 0 or way == "up":
            return data
        whole = HEADER_BYTES + message_bytes + 8
        first = PAYLOAD + 1000
        at = first + -(-(position - first) // whole) * whole if position > first else first
        return flip(data, position, at)

    source = lanes.transport()
    metadata = lanes.proxy(source.metadata(), tamper).metadata
    destination = lanes.destination(template, lanes=1).start(metadata)
    source.send_checkpoint([1], STEP, state, TIMEOUT)
    destination.join()
    source.disallow_checkpoint()
    assert isinstance(destination.error, RemoteProtocolError)
    assert "differs from what the source sent, 3 times" in str(destination.error)
    assert destination.error.torn
    report = source.last_report
    assert report is not None
    assert report.peers[0].outcome == "failed"
    assert "differs from what the source sent" in report.peers[0].reason


def test_the_outcome_of_a_state_that_cannot_travel(lanes: Lanes, caplog: pytest.LogCaptureFixture) -> None:
    """Both destinations are told why, whenever they come; nothing that is logged is pending."""
    caplog.set_level("INFO", "ft_transport")
    source = lanes.transport()
    with pytest.raises(LocalProtocolError):
        source.send_checkpoint([1, 2], STEP, envelope({"a": lambda: 0}), TIMEOUT)
    report = source.last_report
    assert report is not None
    assert [(peer.outcome, peer.phase) for peer in report.peers] == [("failed", "describe")] * 2
    assert all("a: a value of class function" in peer.reason for peer in report.peers)
    for _ in range(2):
        destination = lanes.destination(make_state(2)).start(source.metadata())
        destination.join()
        assert isinstance(destination.error, PeerFailure)
        assert "a: a value of class function" in str(destination.error)
    source.disallow_checkpoint()
    assert [peer.outcome for peer in report.peers] == ["failed"] * 2
    assert "pending" not in caplog.text


@pytest.mark.parametrize("seed", range(20))
def test_random_damage_is_never_returned(lanes: Lanes, seed: int) -> None:
    """Of whatever kind and wherever: the state is right, or the receive raises."""
    chosen = random.Random(seed)
    state = make_state(large=1)
    way = chosen.choice(["up", "down"])
    connection = chosen.choice([0, 1, 1])
    at = int(2 ** chosen.uniform(0, 22 if (way, connection) == ("down", 1) else 9))
    kind = chosen.choice(["flip", "cut", "lose", "double", "swap"])
    damage: dict[str, Callable[[bytes], bytes | None]] = {
        "flip": lambda data: bytes([data[0] ^ 1 << chosen.randrange(8)]) + data[1:],
        "cut": lambda data: None,
        "lose": lambda data: data[chosen.randrange(1, 100) :],
        "double": lambda data: data[:100] + data,
        "swap": lambda data: data[50:100] + data[:50] + data[100:],
    }
    destination = heal(lanes, state, once(damage[kind], at, way, connection), stall_timeout=timedelta(seconds=0.5))
    print(kind, connection, way, at, repr(destination.error))
    assert destination.sound(state) or isinstance(destination.error, TransferError)
    if way == "down" and connection == 1:
        assert destination.sound(state)


def spoiled_heal(lanes: Lanes, state: dict[str, Any], template: dict[str, Any]) -> Destination:
    """A receive of which everything lands but one message, which always comes damaged."""
    source = lanes.transport()
    proxy = lanes.proxy(source.metadata()).corrupt(2, times=-1)
    destination = lanes.destination(template, lanes=1).start(proxy.metadata)
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    assert isinstance(destination.join().error, RemoteProtocolError)
    source.shutdown()
    return destination


@pytest.mark.parametrize("kind", ["small", "strided"])
def test_what_goes_through_a_bucket_tears_the_replica_too(lanes: Lanes, kind: str) -> None:
    """Several messages of tensors none of which takes its bytes from the wire itself."""

    def staged(seed: int) -> dict[str, Any]:
        flat = make_state(seed, large=1, nbytes=12 * MIB)["large"][0]
        return {"all": list(flat.split(4096)) if kind == "small" else flat.view(3, 1024, 4096).transpose(1, 2)}

    template = staged(2)
    before = digest(template)
    destination = spoiled_heal(lanes, staged(1), template)
    assert digest(template) != before
    assert destination.report.torn
    assert destination.error.torn  # type: ignore[union-attr]
    assert destination.transport.torn


# -------------------------------------------------------------------------------------------- resume


def test_the_next_attempt_moves_only_the_rest(lanes: Lanes) -> None:
    state, template = make_state(large=10), make_state(2, large=10)
    total = sum(tensor.numel() for tensor in tensors(state))
    dying, healthy = lanes.transport(), lanes.transport()
    proxy = lanes.proxy(dying.metadata())
    destination = lanes.destination(template, lanes=1, on_progress=cut_at(proxy, 0.9)).start(proxy.metadata)
    dying.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    destination.join()
    assert isinstance(destination.error, PeerFailure)
    assert destination.error.torn
    dying.shutdown()

    healthy.send_checkpoint([1], STEP, envelope(make_state(large=10)), TIMEOUT)
    destination.start(healthy.metadata()).join()
    healthy.disallow_checkpoint()
    assert destination.sound(state)
    moved, report = destination.report.peers[0].nbytes, destination.report
    assert report.nbytes_kept + moved == report.nbytes_total == total
    assert moved <= 0.12 * total
    assert report.peers[0].nbytes_wire <= 0.13 * total


def cut_at(proxy: FaultProxy, share: float) -> Callable[[Any], None]:
    def progress(now: Any) -> None:
        if now.nbytes_done >= share * now.nbytes_total:
            proxy.cut()

    return progress


def broken_heal(lanes: Lanes, state: dict[str, Any], template: dict[str, Any], share: float = 0.5) -> Destination:
    """A receive that breaks on the way; the next one has no progress callback and so does not."""
    source = lanes.transport()
    proxy = lanes.proxy(source.metadata())
    destination = lanes.destination(template, lanes=1, on_progress=cut_at(proxy, share)).start(proxy.metadata)
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    destination.join()
    assert isinstance(destination.error, PeerFailure)
    source.shutdown()
    return destination


def test_what_has_changed_since_is_moved_again(lanes: Lanes) -> None:
    state, template = make_state(large=6), make_state(2, large=6)
    destination = broken_heal(lanes, state, template)
    template["large"][1][5] += 1  # had landed
    other = make_state(large=6)
    other["large"][0][MIB] += 1  # had landed, and the other source differs there
    source = lanes.transport()
    source.send_checkpoint([1], STEP, envelope(other), TIMEOUT)
    destination.start(source.metadata()).join()
    source.disallow_checkpoint()
    assert destination.sound(other)
    assert 0 < destination.report.nbytes_kept < destination.report.nbytes_total


@pytest.mark.parametrize("now", [8, [8], {"epoch": 1}], ids=repr)
def test_what_is_left_counts_also_where_plain_values_have_changed_since(lanes: Lanes, now: object) -> None:
    state, template = make_state(large=6), {**make_state(2, large=6), "position": 0}
    destination = broken_heal(lanes, {**state, "position": 7}, template)
    source, other = lanes.transport(), {**state, "position": now}
    source.send_checkpoint([1], STEP, envelope(other), TIMEOUT)
    destination.start(source.metadata()).join()
    source.disallow_checkpoint()
    assert destination.sound(other)
    assert 0 < destination.report.nbytes_kept < destination.report.nbytes_total


def test_another_step_begins_anew(lanes: Lanes) -> None:
    state = make_state()
    destination = broken_heal(lanes, state, make_state(2))
    source = lanes.transport()
    source.send_checkpoint([1], STEP + 1, envelope(state), TIMEOUT)
    destination.start(source.metadata(), step=STEP + 1).join()
    source.disallow_checkpoint()
    assert destination.sound(state)
    assert destination.report.nbytes_kept == 0


def test_what_is_left_of_an_earlier_receive_is_a_mix_from_the_beginning(lanes: Lanes) -> None:
    """The next receive keeps some of it, and is torn too if it breaks before a byte of its own has landed."""
    state = make_state()
    destination = spoiled_heal(lanes, state, make_state(2))
    source = lanes.transport()
    proxy = lanes.proxy(source.metadata()).corrupt("ROUTE")
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    destination.start(proxy.metadata).join()
    source.disallow_checkpoint()
    assert isinstance(destination.error, TransferError)
    assert (destination.report.peers[0].nbytes, destination.report.nbytes_kept) == (0, 0)
    assert destination.report.torn
    assert destination.error.torn
    assert destination.transport.torn


def test_unchanged_bytes_stay(lanes: Lanes) -> None:
    state, template = make_state(large=6), make_state(large=6)
    template["large"][2].zero_()
    template["small"]["bias 3"].zero_()
    source = lanes.transport()
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    destination = lanes.destination(template, skip_unchanged=True).start(source.metadata()).join()
    source.disallow_checkpoint()
    assert destination.sound(state)
    small = sum(tensor.numel() for tensor in state["small"].values())
    assert destination.report.peers[0].nbytes == 6 * MIB + small
    assert destination.report.complete


# --------------------------------------------------------------------------------------------- chain


@pytest.mark.parametrize("topology", ["chain", "star"])
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "fresh"])
def test_several_destinations(lanes: Lanes, topology: str, in_place: bool) -> None:
    state = make_state()
    source = lanes.transport(topology=topology)
    destinations = [lanes.destination(make_state(2) if in_place else None) for _ in range(4)]
    for destination in destinations:
        destination.start(source.metadata())
    source.send_checkpoint([1, 2, 3, 4], STEP, envelope(state), TIMEOUT)
    for destination in destinations:
        assert destination.join().sound(state), destination.error
    threads = [threading.Thread(target=d.transport.disallow_checkpoint) for d in destinations]
    for thread in threads:
        thread.start()
    source.disallow_checkpoint()
    for thread in threads:
        thread.join()
    report = source.last_report
    assert report is not None
    assert report.complete
    assert {peer.rank for peer in report.peers} == {-1}
    copies = 1 if topology == "chain" else 4
    assert copies <= report.nbytes_wire / report.nbytes_total < copies + 0.1


def test_a_chain_whose_middle_is_cut_off(lanes: Lanes) -> None:
    """Those behind it turn to others, and the source sends little more than one copy."""
    state = make_state(large=8)
    calm = {"stall_timeout": timedelta(seconds=10)}  # so that nobody tries whether the source would be quicker
    source = lanes.transport(**calm)
    source.send_checkpoint([1, 2, 3], STEP, envelope(state), TIMEOUT)
    destinations = []
    for position in range(3):
        # One after the other, so that their order is known; all of them fetch slowly.
        destination = lanes.destination(make_state(2, large=8), lanes=2, **calm)
        metadata = lanes.proxy(source.metadata(), slowly(20)).metadata
        if position < 2:
            mine = lanes.proxy(destination.transport.metadata(), slowly(20))
            destination.transport._local = destination.transport._local._replace(metadata=mine.metadata)
            if position == 1:
                middle = mine
        destinations.append(destination.start(metadata))
        offer = source._serving.transfer
        assert offer is not None
        wait_until(lambda position=position, offer=offer: len(offer._line._ready) == position + 1)
    wait_until(lambda: middle.nbytes > 4 * MIB)
    middle.cut()
    for destination in destinations:
        assert destination.join().sound(state), destination.error
    for destination in destinations:
        destination.transport.disallow_checkpoint()
    source.disallow_checkpoint()
    report = source.last_report
    assert report is not None
    assert report.complete
    assert report.nbytes_wire < 1.1 * report.nbytes_total


def test_a_relay_that_changes_its_memory_is_found(lanes: Lanes) -> None:
    state = make_state()
    source = lanes.transport()
    source.send_checkpoint([1, 2], STEP, envelope(state), TIMEOUT)
    first = lanes.destination(make_state(2)).start(source.metadata()).join()
    assert first.sound(state)
    for tensor in first.template["large"]:  # type: ignore[index]
        tensor.zero_()
    second = lanes.destination(make_state(2)).start(source.metadata()).join()
    assert second.sound(state)
    assert second.report.num_repaired > 0
    with pytest.raises(TornStateError):  # its own state is not what was sent either
        first.transport.disallow_checkpoint()
    source.disallow_checkpoint()


def test_the_source_has_no_part_in_what_a_relay_has_damaged(lanes: Lanes) -> None:
    """A message came damaged from the relay as often as it may, and then once more from the source: it is repaired."""
    state = make_state()
    calm = {"stall_timeout": timedelta(seconds=10)}
    source = lanes.transport(**calm)
    source.send_checkpoint([1, 2], STEP, envelope(state), TIMEOUT)
    first = lanes.destination(make_state(2), **calm).start(source.metadata()).join()
    for tensor in first.template["large"]:  # type: ignore[index]
        tensor.zero_()
    proxy = lanes.proxy(source.metadata()).corrupt(0)
    second = lanes.destination(make_state(2), lanes=1, **calm).start(proxy.metadata).join()
    assert second.sound(state), second.error
    assert second.report.num_repaired > 3
    with pytest.raises(TornStateError):  # its own state is not what was sent either
        first.transport.disallow_checkpoint()
    source.disallow_checkpoint()


def test_a_relay_waits_for_who_fetches_from_it(lanes: Lanes) -> None:
    """In disallow_checkpoint(), as a source does: else the source would send a second copy."""
    state = make_state()
    calm = {"stall_timeout": timedelta(seconds=10)}
    source = lanes.transport(**calm)
    source.send_checkpoint([1, 2], STEP, envelope(state), TIMEOUT)
    first = lanes.destination(make_state(2), **calm)
    mine = lanes.proxy(first.transport.metadata(), slowly(30))
    first.transport._local = first.transport._local._replace(metadata=mine.metadata)
    assert first.start(source.metadata()).join().sound(state)
    second = lanes.destination(make_state(2), **calm).start(source.metadata())
    wait_until(lambda: mine.nbytes > MIB)
    first.transport.disallow_checkpoint()
    for tensor in tensors(first.template):  # type: ignore[arg-type]
        tensor.zero_()
    assert second.join().sound(state), second.error
    assert second.report.num_repaired == 0
    source.disallow_checkpoint()
    report = source.last_report
    assert report is not None
    assert report.nbytes_wire < 1.1 * report.nbytes_total


def test_a_relay_serves_until_disallow(lanes: Lanes) -> None:
    state = make_state()
    source = lanes.transport()
    source.send_checkpoint([1, 2], STEP, envelope(state), TIMEOUT)
    first = lanes.destination(make_state(2)).start(source.metadata()).join()
    before = source.last_report
    assert before is not None
    first.transport.disallow_checkpoint()
    # It passes nothing on any more, so the second one is served by the source.
    second = lanes.destination(make_state(2)).start(source.metadata()).join()
    assert second.sound(state)
    source.disallow_checkpoint()
    assert before.nbytes_wire > 1.9 * before.nbytes_total


# ----------------------------------------------------------------------------------------- strangers


@pytest.mark.timeout(120)
def test_a_thousand_strangers(lanes: Lanes) -> None:
    """Whoever says something wrong is put out at once, whoever says nothing after some seconds, or by the next ones."""
    source, state = lanes.transport(), make_state()
    destination = lanes.destination(make_state(2))
    received: list[bytes] = []
    talking = [threading.Thread(target=session, args=(source.metadata(), received)) for _ in range(4)]
    silent = [threading.Thread(target=be_silent, args=(source.metadata(), received, part)) for part in (b"", PART)]

    def heal_once(step: int) -> None:
        destination.start(source.metadata(), step=step)
        source.send_checkpoint([1], step, envelope(state), TIMEOUT)
        assert destination.join().error is None
        source.disallow_checkpoint()
        destination.transport.disallow_checkpoint()

    heal_once(1)
    memory = resident()
    for thread in (*talking, *silent):
        thread.start()
    step = 2
    while any(thread.is_alive() for thread in (*talking, *silent)):
        heal_once(step)
        step += 1
        assert len(source._listener._handshakes._pending) <= _listener._MAX_HANDSHAKES
    for thread in (*talking, *silent):
        thread.join()
    assert step > 4
    assert destination.result["user"]["default"]["lr"] == state["lr"]
    assert (len(received), set(received)) == (1000, {b""})
    assert resident() - memory < 30 * MIB


PART = b"FTLN-knock\x01" + bytes(20)


def session(metadata: str, received: list[bytes]) -> None:
    """100 strangers who say something wrong."""
    for i in range(100):
        said = [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 10, os.urandom(75), next(client_handshake(os.urandom(32)))][
            i % 3
        ]
        with socket.create_connection(("127.0.0.1", Endpoint.decode(metadata).port), timeout=10) as connection:
            connection.sendall(said)  # type: ignore[arg-type]
            received.append(heard(connection))


def be_silent(metadata: str, received: list[bytes], part: bytes) -> None:
    """300 strangers who say nothing, or begin and do not go on."""
    port = Endpoint.decode(metadata).port
    connections = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(300)]
    for connection in connections:
        try:
            connection.sendall(part)
        except OSError:
            pass
    for connection in connections:
        received.append(heard(connection))
        connection.close()


def heard(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1 << 20)
    except ConnectionError:
        return b""


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_a_wrong_secret(lanes: Lanes) -> None:
    source = lanes.transport()
    source.send_checkpoint([1], STEP, envelope(make_state()), TIMEOUT)
    endpoint = Endpoint.decode(source.metadata())
    wrong = endpoint._replace(secret=bytes(32), addresses=("127.0.0.1",)).encode()
    destination = lanes.destination(make_state(2)).start(wrong).join()
    assert isinstance(destination.error, PeerFailure)
    assert destination.seconds < 1.0
    report = source.last_report
    assert report is not None
    assert report.nbytes_wire == 0
    lanes.transports[0].shutdown()


def test_lanes_for_what_nobody_supplies_are_closed(lanes: Lanes) -> None:
    from ft_transport._deadline import Deadline
    from ft_transport._lanes.protocol import LaneFrame, encode
    from ft_transport._net.dial import dial
    from ft_transport._net.stall import StallTimer

    source = lanes.transport()
    first = encode(LaneFrame.ATTACH, 1, STEP, body=[bytes(16)])
    timer = StallTimer(Deadline(TIMEOUT), STALL)
    connection = dial(Endpoint.decode(source.metadata()), first, timer, None)
    try:
        with pytest.raises(PeerFailure, match="closed by the peer"):
            connection.read(1, timer)
    finally:
        connection.close()


# -------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize("name", ["ft_transport-lane", "ft_transport-supplier"])
def test_a_lane_for_which_there_is_no_thread(lanes: Lanes, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    state, template = make_state(), make_state(2)
    refused = refuse_a_thread(monkeypatch, name)
    source = lanes.transport()
    destination = lanes.destination(template).start(source.metadata())
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    assert destination.join().sound(state), destination.error
    source.disallow_checkpoint()
    assert refused == [name]
    assert source.last_report is not None
    assert source.last_report.peers[0].outcome == "complete"


@pytest.mark.parametrize("early", [False, True], ids=["comes later", "waits already"])
def test_a_destination_for_which_there_is_no_thread(lanes: Lanes, monkeypatch: pytest.MonkeyPatch, early: bool) -> None:
    """It fails, the other one is served, and the source has no trouble with it."""
    state = make_state()
    source = lanes.transport()
    first = lanes.destination(make_state(2))
    if early:
        first.start(source.metadata())
        wait_until(lambda: bool(source._local.dispatcher._waiting), 5)
    refused = refuse_a_thread(monkeypatch, "ft_transport-destination")
    source.send_checkpoint([1, 2], STEP, envelope(state), TIMEOUT)
    if not early:
        first.start(source.metadata())
    assert isinstance(first.join().error, PeerFailure)
    second = lanes.destination(make_state(3)).start(source.metadata())
    assert second.join().sound(state), second.error
    source.disallow_checkpoint()
    report = source.last_report
    assert report is not None
    assert refused == ["ft_transport-destination"]
    assert [peer.outcome for peer in report.peers] == ["failed", "complete"]
    assert "no more threads" in report.peers[0].reason


def test_the_last_destination_for_which_there_is_no_thread(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is waited for any more then."""
    source = lanes.transport(stall_timeout=timedelta(seconds=10))
    refuse_a_thread(monkeypatch, "ft_transport-destination")
    source.send_checkpoint([1], STEP, envelope(make_state()), TIMEOUT)
    begin = time.monotonic()
    waiting = threading.Thread(target=source.disallow_checkpoint)
    waiting.start()
    destination = lanes.destination().start(source.metadata()).join()
    waiting.join()
    assert isinstance(destination.error, PeerFailure)
    assert time.monotonic() - begin < 5.0


def test_a_pause_after_the_last_byte_is_no_silence(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without digests the source has the last word, and as long to say it as for any other."""
    from ft_transport._lanes.messages import StateMessages

    check = StateMessages.check_unchanged

    def late(store: StateMessages) -> None:
        report = source.last_report
        if report is not None and all(peer.nbytes == report.nbytes_total for peer in report.peers):
            time.sleep(1.3)
        check(store)

    monkeypatch.setattr(StateMessages, "check_unchanged", late)
    state = make_state()
    source = lanes.transport(verify=False, stall_timeout=timedelta(seconds=8))
    destination = lanes.destination(make_state(2), stall_timeout=timedelta(seconds=8)).start(source.metadata())
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    assert destination.join().sound(state), destination.error


def test_a_frozen_source_costs_no_more_than_the_deadline(lanes: Lanes) -> None:
    source = lanes.transport()
    proxy = lanes.proxy(source.metadata(), slowly(10))
    patient = {"stall_timeout": timedelta(seconds=30)}
    destination = lanes.destination(**patient).start(proxy.metadata, timeout=timedelta(seconds=1))
    source.send_checkpoint([1], STEP, envelope(make_state()), TIMEOUT)
    wait_until(lambda: proxy.nbytes > 1_000_000)
    proxy.freeze()
    assert isinstance(destination.join().error, TransferTimeout)
    assert destination.seconds < 2.0


def refuse_a_thread(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Let the next thread of this name not start; gives those that did not."""
    refused: list[str] = []
    start = threading.Thread.start

    def unwilling(thread: threading.Thread) -> None:
        if thread.name == name and not refused:
            refused.append(name)
            raise RuntimeError("no more threads")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", unwilling)
    return refused


def test_dialling_for_long_is_no_silence(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever a destination dials may take its time to answer: the source hears meanwhile that it is alive."""
    from ft_transport._lanes.fetch import Fetcher

    opened = Fetcher.open

    def slowly(fetcher: Fetcher, *arguments: Any) -> None:
        time.sleep(2 * STALL.total_seconds())
        opened(fetcher, *arguments)

    monkeypatch.setattr(Fetcher, "open", slowly)
    state, template = make_state(), make_state(2)
    source = lanes.transport()
    destination = lanes.destination(template).start(source.metadata())
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    assert destination.join().sound(state), destination.error
    source.disallow_checkpoint()
    assert source.last_report is not None
    assert source.last_report.peers[0].outcome == "complete"


# ----------------------------------------------------------------------------------------------- TLS


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two contexts for mutual TLS, as ``docs/security.md`` makes them."""
    import ssl

    folder = tmp_path_factory.mktemp("tls")
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=replicas "
        f"-keyout {folder}/key.pem -out {folder}/cert.pem"
    )
    try:
        subprocess.run(command.split(), check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl here")
    listening = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    dialling = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    dialling.check_hostname = False
    for context in (listening, dialling):
        context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
        context.load_verify_locations(folder / "cert.pem")
        context.verify_mode = ssl.CERT_REQUIRED
    return listening, dialling


@pytest.mark.parametrize("topology", ["chain", "star"])
def test_tls(lanes: Lanes, contexts: Any, topology: str) -> None:
    state = make_state()
    source = lanes.transport(ssl_context=contexts, topology=topology)
    destinations = [lanes.destination(make_state(2), ssl_context=contexts) for _ in range(2)]
    seen = bytearray()

    def listen(number: int, way: str, position: int, data: bytes) -> bytes:
        seen.extend(data)
        return data

    proxy = lanes.proxy(source.metadata(), listen)
    for destination in destinations:
        destination.start(proxy.metadata)
    source.send_checkpoint([1, 2], STEP, envelope(state), TIMEOUT)
    for destination in destinations:
        assert destination.join().sound(state), destination.error
    for transport in (source, *(destination.transport for destination in destinations)):
        transport.disallow_checkpoint()
    for tensor in state["large"]:
        assert bytes(tensor[:64].tolist()) not in seen
    assert not re.search(rb"FTLN\x01.\x00\x00|FTLN-knock", seen, re.DOTALL)


@pytest.mark.parametrize("tls", [True, False], ids=["TLS", "plain"])
def test_who_waits_for_a_source_keeps_its_connection(lanes: Lanes, contexts: Any, tls: bool) -> None:
    """It has said nothing since, and so is not gone."""
    own, state, numbers = contexts if tls else None, make_state(), set()

    def listen(number: int, way: str, position: int, data: bytes) -> bytes:
        numbers.add(number)
        return data

    source = lanes.transport(ssl_context=own)
    proxy = lanes.proxy(source.metadata(), listen)
    destination = lanes.destination(make_state(2), ssl_context=own).start(proxy.metadata)
    time.sleep(1.2 * STALL.total_seconds())
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    assert destination.join().sound(state), destination.error
    assert len(numbers) == 3, "that, and two lanes"


@pytest.mark.parametrize("tls", [True, False], ids=["TLS", "plain"])
def test_a_connection_that_is_not_there_at_once(lanes: Lanes, contexts: Any, tls: bool) -> None:
    """As over any real network. On this machine: one that waits for room in the listener's queue, one second or so."""
    own = contexts if tls else None
    source = lanes.transport(ssl_context=own)
    endpoint = Endpoint.decode(source.metadata())
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, ExitStack() as stack:
        port = server.getsockname()[1]
        for _ in range(2):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", port))
        far = endpoint._replace(addresses=("127.0.0.1",), port=port).encode()
        destination = (
            lanes.destination(make_state(2), ssl_context=own).start(far, timeout=timedelta(seconds=0.5)).join()
        )
        assert isinstance(destination.error, TransferTimeout), destination.error


def test_tls_on_one_side_only(lanes: Lanes, contexts: Any) -> None:
    for mine, theirs in ((contexts, None), (None, contexts)):
        source = lanes.transport(ssl_context=mine)
        destination = lanes.destination(make_state(2), ssl_context=theirs).start(source.metadata()).join()
        assert isinstance(destination.error, RemoteProtocolError)
        assert "give both an ssl_context, or neither" in str(destination.error)


def test_tls_without_the_certificate(lanes: Lanes, contexts: Any) -> None:
    import ssl

    source, state = lanes.transport(ssl_context=contexts), make_state()
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname = False
    bare.verify_mode = ssl.CERT_NONE
    endpoint = Endpoint.decode(source.metadata())._replace(addresses=("127.0.0.1",))
    destination = lanes.destination(make_state(2), ssl_context=(contexts[0], bare)).start(endpoint.encode()).join()
    assert isinstance(destination.error, PeerFailure)
    source.shutdown()


# --------------------------------------------------------------------------------------------- again


@pytest.mark.timeout(120)
@pytest.mark.parametrize("heals", [200, pytest.param(1000, marks=pytest.mark.thorough)])
def test_many_heals_leave_nothing(lanes: Lanes, heals: int) -> None:
    state, template = ({"a": torch.rand(100_000), "b": {str(i): torch.rand(10) for i in range(20)}} for _ in range(2))
    source = lanes.transport()
    destination = lanes.destination(template, lanes=2)

    def heal_once(step: int) -> None:
        destination.start(source.metadata(), step=step)
        source.send_checkpoint([1], step, envelope(state), TIMEOUT)
        assert destination.join().error is None
        source.disallow_checkpoint()
        destination.transport.disallow_checkpoint()

    for step in range(100):
        heal_once(step)
    before, memory = residue(), resident()
    for step in range(100, heals):
        heal_once(step)
    after = residue()
    assert after.threads == before.threads
    assert after.native_threads <= before.native_threads
    assert after.descriptors <= before.descriptors
    assert resident() - memory < 30 * MIB


# ------------------------------------------------------------------------------------- suspected faults


def test_a_bucket_of_which_the_template_has_a_part_tears_it(lanes: Lanes) -> None:
    """The joiner's optimizer has no state yet: its small weights come in one message with small moments it lacks."""

    def small(number: int, value: float) -> dict[str, torch.Tensor]:
        return {str(i): torch.full((4000,), value) for i in range(number)}

    template = {"model": small(20, 2.0), "ema": small(20, 2.0)}
    state = {"model": small(20, 1.0), "optim": small(400, 1.0), "ema": small(20, 1.0)}
    source = lanes.transport()
    proxy = lanes.proxy(source.metadata()).corrupt(1, times=-1)
    destination = lanes.destination(template, lanes=1).start(proxy.metadata)
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    destination.join()
    source.disallow_checkpoint()
    assert isinstance(destination.error, RemoteProtocolError)
    values = {float(tensor[0]) for part in template.values() for tensor in part.values()}
    assert values == {1.0, 2.0}, "a mix"
    assert destination.error.torn
    assert destination.transport.torn
    destination.transport.metadata()
    with pytest.raises(TransferError):
        destination.transport.disallow_checkpoint()


def test_a_relay_without_digests_does_not_pass_on_what_this_side_has_written(lanes: Lanes) -> None:
    """Forward at the first one changes a large buffer meanwhile. Nobody watches its memory, and nobody compares."""
    state = make_state()
    source = lanes.transport(verify=False)
    source.send_checkpoint([1, 2], STEP, envelope(state), TIMEOUT)
    first = lanes.destination(make_state(2)).start(source.metadata()).join()
    assert first.sound(state)
    first.template["large"][1].add_(1)  # type: ignore[index]
    second = lanes.destination(make_state(3)).start(source.metadata()).join()
    assert second.sound(state)
    first.transport.disallow_checkpoint()
    source.disallow_checkpoint()
