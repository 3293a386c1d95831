"""NIXL over shared memory and over TCP: heals, and sources that are killed or stopped while they are read."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from multiproc.harness import digest, quiet, residue, wait_until

from ft_transport import LaneTransport, PeerFailure
from ft_transport._net import one_sided
from ft_transport._net.one_sided import available, await_closed

pytest.importorskip("nixl")
if "nixl" not in available():
    pytest.skip("torch has no one-sided transports", allow_module_level=True)

CPU = torch.device("cpu")
TIMEOUT = timedelta(seconds=60)
STALL = timedelta(seconds=3)
MIB = 1 << 20
NUMEL, NUM_TENSORS = 4 << 20, 12  # 201 MB

# A source that offers its state as often as it is asked for; prints its metadata each time.
_SOURCE = """
import sys
from fabric.test_nixl import CPU, STALL, TIMEOUT, make_state
from ft_transport import LaneTransport
fabric = sys.argv[1]
transport = LaneTransport(TIMEOUT, CPU, host="127.0.0.1", stall_timeout=STALL, fabric=fabric)
state = make_state(1)
for step, _ in enumerate(sys.stdin):
    transport.disallow_checkpoint()
    transport.send_checkpoint([1], step, state, TIMEOUT)
    print("at", transport.metadata(), flush=True)
transport.shutdown()
"""


def make_state(seed: int) -> dict[str, Any]:
    one = torch.randn(NUMEL, generator=torch.Generator().manual_seed(seed))
    return {"weights": [one + i for i in range(NUM_TENSORS)], "small": one[:100].clone()}


class Source:
    """A source in a process of its own."""

    def __init__(self, fabric: str) -> None:
        command = [sys.executable, "-c", _SOURCE, fabric]
        tests = Path(__file__).parent.parent
        self.process = subprocess.Popen(command, cwd=tests, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def offer(self) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("at "):  # NIXL prints, too
                return line.split()[1]
        raise AssertionError("the source has ended")

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(params=["tcp,cma,self", "tcp"])
def source(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    """By each way that UCX has on a machine without RDMA."""
    monkeypatch.setenv("UCX_TLS", request.param)
    found = Source("nixl")
    yield found
    found.end()


def destination(template: dict[str, Any], fabric: str = "nixl", **options: Any) -> LaneTransport[Any]:
    return LaneTransport(
        TIMEOUT, CPU, lambda: template, host="127.0.0.1", stall_timeout=STALL, fabric=fabric, **options
    )


def heal(source: Source, transport: LaneTransport[Any], step: int) -> float:
    metadata, begin = source.offer(), time.monotonic()
    transport.recv_checkpoint(0, metadata, step, TIMEOUT)
    seconds = time.monotonic() - begin
    transport.disallow_checkpoint()
    return seconds


@pytest.mark.timeout(240)
@pytest.mark.parametrize("lanes", [1, 2])
def test_heals_are_read(source: Source, lanes: int) -> None:
    """And leave no thread and no descriptor behind; the figures are for whoever reads the output."""
    template, expected = make_state(2), digest(make_state(1))
    transport = destination(template, lanes=lanes)
    seconds, descriptors = [], []
    for step in range(5):
        seconds.append(heal(source, transport, step))
        report = transport.last_report
        assert report is not None
        assert digest(template) == expected
        assert report.peers[0].nbytes_direct == NUM_TENSORS * NUMEL * 4
        wait_until(lambda: not any("ft_transport-fabric" in name for name in residue().threads), 10)
        descriptors.append(residue().descriptors)
    transport.shutdown()
    print(f"\nnixl, UCX_TLS={os.environ['UCX_TLS']}, {lanes} lanes: {[round(s, 2) for s in seconds]} s for 201 MB")
    assert descriptors[-1] <= descriptors[1]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("fabric", ["cma", "tcp"])
def test_the_same_by_others_for_the_figures(fabric: str) -> None:
    found, template = Source(fabric), make_state(2)
    try:
        transport = destination(template, fabric, lanes=2)
        seconds = [heal(found, transport, step) for step in range(5)]
        transport.shutdown()
    finally:
        found.end()
    assert digest(template) == digest(make_state(1))
    print(f"\n{fabric}, 2 lanes: {[round(s, 2) for s in seconds]} s for 201 MB")


def under_a_read(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], object]) -> None:
    """Have something done in the moment in which that read of this process has begun."""
    new, numbers = one_sided._new_transport, itertools.count()

    def new_transport(backend: str) -> Any:
        transport = new(backend)
        begin = transport.read

        def read(*args: Any, **options: Any) -> Any:
            work = begin(*args, **options)
            if next(numbers) == number:
                act()
            return work

        transport.read = read
        return transport

    monkeypatch.setattr(one_sided, "_new_transport", new_transport)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=lambda fault: fault.name)
def test_a_source_that_is_struck_while_it_is_read(
    source: Source, fault: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is noticed, and the endpoints are closed; nothing is written any more, and no thread of NIXL's is left."""
    template = make_state(2)
    heal(source, transport := destination(template, lanes=2), 0)
    assert await_closed(TIMEOUT)
    transport.shutdown()
    descriptors = residue().descriptors
    struck: list[float] = []
    landings: list[torch.Tensor] = []

    def strike() -> None:
        struck.append(time.monotonic())
        source.process.send_signal(fault)
        landings.extend(end._landing for end in list(one_sided._endpoints) if end._landing is not None)

    under_a_read(monkeypatch, 12, strike)
    template = make_state(2)
    transport = destination(template, lanes=2)
    with pytest.raises(PeerFailure):
        heal(source, transport, 1)
    seconds, after = time.monotonic() - struck[0], digest(template)
    assert transport.torn
    print(f"\nnixl, UCX_TLS={os.environ['UCX_TLS']}, {fault.name}: error after {seconds:.2f} s")
    assert seconds < 4 * STALL.total_seconds()
    if fault is signal.SIGSTOP:
        source.process.send_signal(signal.SIGCONT)
    begin = time.monotonic()
    assert await_closed(timedelta(seconds=30))
    landed = digest(landings)
    print(f"its endpoints are closed after {time.monotonic() - begin:.2f} s")
    transport.shutdown()
    assert quiet(1.0) < 0.5, "a thread of NIXL's keeps a core busy"
    assert (digest(template), digest(landings)) == (after, landed)
    wait_until(lambda: residue().descriptors <= descriptors, 10)
