"""How much memory a heal over lanes takes beyond the state's own, on both sides, whatever messages move by.

``FT_TRANSPORT_TEST_GIGABYTES`` makes the state larger than the 1 GB that fits a small machine.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from ft_transport import LaneTransport
from ft_transport.testing import FaultyFabric

from .harness import Workers, workers

GIGABYTES = float(os.environ.get("FT_TRANSPORT_TEST_GIGABYTES", "1"))
BUCKET = 64 << 20
TIMEOUT = timedelta(seconds=60)
CPU = torch.device("cpu")


def make_state(fill: int) -> dict[str, Any]:
    """Large tensors, some that must be staged, and many small ones."""
    large = int(GIGABYTES * 0.9e9 / 8)
    return {
        "large": [torch.full((large,), fill, dtype=torch.uint8) for _ in range(8)],
        "strided": torch.full((1000, int(GIGABYTES * 0.05e9 / 1000)), fill, dtype=torch.uint8).t(),
        "small": [torch.full((int(GIGABYTES * 10_000),), fill, dtype=torch.uint8) for _ in range(5000)],
    }


_transport: LaneTransport[Any] | None = None
_state: Any = None


def peak() -> int:
    """Most resident memory so far, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("VmHWM:")]
    return int(line.split()[1]) << 10


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def prepare(rank: int, fabric: str) -> str:
    global _transport, _state
    _state = make_state(rank + 1)
    if fabric == "one_sided":
        FaultyFabric(fabric)
    _transport = LaneTransport(TIMEOUT, CPU, lambda: _state, fabric=fabric)
    # Code and threads that the first transfer of a process brings in are not what is measured.
    _heal_self(fabric)
    return _transport.metadata()


def _heal_self(fabric: str) -> None:
    tiny = {"a": torch.zeros(100_000)}
    assert _transport is not None
    source: LaneTransport[Any] = LaneTransport(TIMEOUT, CPU, fabric=fabric)
    fresh: LaneTransport[Any] = LaneTransport(TIMEOUT, CPU, fabric=fabric)
    source.send_checkpoint([1], 1, tiny, TIMEOUT)
    fresh.recv_checkpoint(0, source.metadata(), 1, TIMEOUT)
    for transport in (source, fresh):
        transport.disallow_checkpoint()
        transport.shutdown()


def transfer(rank: int, metadata: str) -> tuple[int, int]:
    """Gives the extra memory at the peak, and how many bytes were read where they lay."""
    assert _transport is not None
    forget_peak()
    before = peak()
    if rank == 0:
        _transport.send_checkpoint([1], 1, _state, TIMEOUT)
        _transport.disallow_checkpoint()
    else:
        _transport.recv_checkpoint(0, metadata, 1, TIMEOUT)
    extra = peak() - before
    assert all(bool((tensor == 1).all()) for tensor in [*_state["large"], *_state["small"]])
    report = _transport.last_report
    assert report is not None
    assert report.complete
    _transport.shutdown()
    return extra, report.peers[0].nbytes_direct


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("fabric", ["auto", "one_sided", pytest.param("tcp", marks=pytest.mark.thorough)])
def test_two_buckets_are_enough(fabric: str) -> None:
    with workers(2) as ranks:
        metadata = _prepared(ranks, fabric)
        (source, _), (destination, read) = ranks.each(transfer, metadata)
    megabytes = [f"{extra / 1e6:.1f} MB" for extra in (source, destination)]
    print(f"{GIGABYTES:g} GB by {fabric}: {megabytes[0]} at the source, {megabytes[1]} at the destination")
    assert max(source, destination) <= 2 * BUCKET
    if fabric != "tcp" and not read:
        pytest.skip("this system lets nobody read another process's memory: TCP has served")


def _prepared(ranks: Workers, fabric: str) -> str:
    metadata: str = ranks.each(prepare, fabric)[0]
    return metadata
