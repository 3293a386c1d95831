"""Over a long way a receive opens many lanes at once, and does not wait for those that it needs no more."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
from multiproc.harness import Workers, workers

from . import shaped_links
from .long_link import long_link
from .shaped_links import STEP, TIMEOUT, enter, heal, prepare, rights, serve

LITTLE = torch.arange(1000)


@contextmanager
def two_ranks(round_trip: float = 0.1, bytes_per_second: float = 125e6, window: int | None = None) -> Iterator[Workers]:
    if reason := rights() or ("" if os.path.exists("/dev/net/tun") else "needs /dev/net/tun"):
        pytest.skip(reason)
    with long_link(f"ftt{os.getpid()}", round_trip, bytes_per_second, window) as names, workers(2) as ranks:
        for rank in range(2):
            ranks[rank].call(enter, rank, names)
        yield ranks


def lanes_of_last() -> tuple[int, int]:
    """How many the last receive had, and how many threads of ours are left."""
    transport = shaped_links._transport
    assert transport is not None
    report = transport.last_report
    assert report is not None
    return report.peers[0].num_lanes, sum("-lane" in thread.name for thread in threading.enumerate())


def have_little(state: torch.Tensor) -> None:
    """One message in the place of what was prepared."""
    shaped_links._state = {"little": state}


def receive_little(metadata: str) -> bool:
    transport = shaped_links._transport
    assert transport is not None
    got = transport.recv_checkpoint(0, metadata, STEP, TIMEOUT)
    return bool(torch.equal(got["little"], LITTLE))


def metadata_of(ranks: Workers, megabytes: int) -> str:
    stall = timedelta(seconds=5)
    ranks[1].call(prepare, megabytes, "star", False, 0.0, stall)
    metadata: str = ranks[0].call(prepare, megabytes, "star", True, 0.0, stall)
    return metadata


@pytest.mark.timeout(120)
def test_many_lanes_from_the_beginning() -> None:
    with two_ranks() as ranks:
        metadata = metadata_of(ranks, 100)
        ranks[0].start(serve, 1)
        assert ranks[1].call(heal, metadata, 100, 0.0).sound
        ranks[0].result()
        assert ranks[1].call(lanes_of_last) == (16, 0)


@pytest.mark.timeout(120)
def test_more_lanes_while_that_pays() -> None:
    # One lane carries 64 KiB for each round trip, a tenth of what the link does.
    with two_ranks(0.003, 250e6, window=64 << 10) as ranks:
        metadata = metadata_of(ranks, 200)
        ranks[0].start(serve, 1)
        assert ranks[1].call(heal, metadata, 200, 0.0).sound
        ranks[0].result()
        num_lanes, num_left = ranks[1].call(lanes_of_last)
        # It began with two or three, as the round trip was that of a busy machine. How often it pays is for
        # ``lanes/test_growth.py``, where the machine has no say in it.
        assert num_lanes > 3
        assert num_left == 0


@pytest.mark.timeout(120)
def test_lanes_that_are_not_needed_any_more_are_not_waited_for() -> None:
    with two_ranks() as ranks:
        metadata = metadata_of(ranks, 1)
        ranks[0].call(have_little, LITTLE)
        ranks[1].call(have_little, torch.zeros_like(LITTLE))
        ranks[0].start(serve, 1)
        assert ranks[1].call(receive_little, metadata)
        ranks[0].result()
        # The state is here a round trip before the second lane is.
        assert ranks[1].call(lanes_of_last) == (1, 0)
