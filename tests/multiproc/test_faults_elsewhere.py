"""Faults that need more than the ranks of ``test_faults.py``: sockets, a network, a Lighthouse of their own."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch

from ft_transport import LaneTransport, PeerFailure, TransferError
from ft_transport._net.endpoint import Endpoint
from ft_transport.testing import FaultyTransport

from .harness import Worker, digest, quiet

CPU = torch.device("cpu")
TIMEOUT = timedelta(seconds=20)
STALL = timedelta(seconds=1)
STEP = 7
MIB = 1 << 20


def make_state(seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"{i}": torch.rand(MIB, generator=generator) for i in range(4)}


@pytest.fixture
def template() -> dict[str, torch.Tensor]:
    return make_state(2)


@pytest.fixture
def destination(template: dict[str, torch.Tensor]) -> Iterator[LaneTransport[Any]]:
    before = threading.active_count()
    made: LaneTransport[Any] = LaneTransport(TIMEOUT, CPU, lambda: template, stall_timeout=STALL, lanes=1)
    yield made
    made.shutdown()
    assert threading.active_count() <= before


# ---------------------------------------------------------------------------------- inside a worker

_source: LaneTransport[Any] | None = None


def offer(port: int) -> str:
    """Offer the state to one destination."""
    global _source
    _source = LaneTransport(TIMEOUT, CPU, port=port, host="127.0.0.1", stall_timeout=STALL)
    _source.send_checkpoint([1], STEP, make_state(), TIMEOUT)
    return _source.metadata()


_fillers: list[int] = []


def starve(on: bool) -> None:
    """Let this process have no more file descriptors, or let it again."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if on:
        last = max(map(int, os.listdir("/proc/self/fd")))
        while not _fillers or _fillers[-1] <= last:
            _fillers.append(os.open("/dev/null", os.O_RDONLY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_fillers[-1] + 1 if on else hard, hard))
    while _fillers and not on:
        os.close(_fillers.pop())


def num_warnings(seconds: float) -> int:
    """How often this process complains meanwhile: as often as it tries."""
    seen: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = seen.append  # type: ignore[method-assign]
    logging.getLogger("ft_transport").addHandler(handler)
    quiet(seconds)
    logging.getLogger("ft_transport").removeHandler(handler)
    return len(seen)


def end() -> None:
    assert _source is not None
    _source.disallow_checkpoint()
    _source.shutdown()


@pytest.fixture
def source() -> Iterator[Worker]:
    worker = Worker("source")
    yield worker
    worker.end()


# ------------------------------------------------------------------------------------------ sockets


def test_a_full_listen_queue(destination: LaneTransport[Any], template: dict[str, torch.Tensor]) -> None:
    """Whoever listens takes nobody: that is silence, and not waited for until the deadline."""
    before = digest(template)
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        metadata = Endpoint(("127.0.0.1",), full.getsockname()[1], bytes(32), False).encode()
        begin = time.monotonic()
        with pytest.raises(PeerFailure, match="silent") as info:
            destination.recv_checkpoint(0, metadata, STEP, TIMEOUT)
        assert time.monotonic() - begin < STALL.total_seconds() + 1.0
    assert not info.value.torn
    assert digest(template) == before


def test_a_source_without_descriptors(
    source: Worker, destination: LaneTransport[Any], template: dict[str, torch.Tensor]
) -> None:
    """It cannot let anybody in, waits for better times without burning a core, and serves then."""
    metadata = source.call(offer, 0)
    source.call(starve, True)
    begin = time.monotonic()
    with pytest.raises(PeerFailure, match="silent") as info:
        destination.recv_checkpoint(0, metadata, STEP, TIMEOUT)
    assert time.monotonic() - begin < STALL.total_seconds() + 1.0
    assert not info.value.torn
    with socket.create_connection(("127.0.0.1", Endpoint.decode(metadata).port)):
        assert source.call(num_warnings, 1.0) < 20
    source.call(starve, False)
    destination.recv_checkpoint(0, metadata, STEP, TIMEOUT)
    assert digest(template) == digest(make_state())
    source.call(end)


@pytest.mark.parametrize("same_port", [True, False])
def test_a_source_that_dies_and_comes_back_within_the_same_heal(
    source: Worker, destination: LaneTransport[Any], template: dict[str, torch.Tensor], same_port: bool
) -> None:
    """The new process is not the one that was asked; asked itself, it sends what is missing."""
    metadata = source.call(offer, 0)
    port = Endpoint.decode(metadata).port
    back = Worker("source, again")

    def die(text: str) -> None:
        source.end()
        offered.append(back.call(offer, port if same_port else 0))

    offered: list[str] = []
    faulty = FaultyTransport(destination, at=1, on_fault=die).throttle(20e6).wait_in("move", 0.0)
    try:
        begin = time.monotonic()
        with pytest.raises(TransferError) as info:
            faulty.recv_checkpoint(0, metadata, STEP, TIMEOUT)
        assert time.monotonic() - begin < 10
        assert info.value.torn
        with pytest.raises(TransferError):
            faulty.recv_checkpoint(0, metadata, STEP, TIMEOUT)
        assert destination.last_report is not None
        faulty.recv_checkpoint(0, offered[0], STEP, TIMEOUT)
        assert 0 < destination.last_report.nbytes_kept < destination.last_report.nbytes_total
        assert digest(template) == digest(make_state())
        back.call(end)
    finally:
        back.end()
