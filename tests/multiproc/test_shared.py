"""The test that torchft has for every transport, unmodified."""

from __future__ import annotations

import unittest
from datetime import timedelta

import pytest
import torch
from torch.distributed import TCPStore
from torchft.checkpointing.transport_test import make_state_dict, run_multi_recovery_test
from torchft.process_group import ProcessGroupGloo

from ft_transport import LaneTransport, PGTransport
from ft_transport.bench.groups import join

CPU = torch.device("cpu")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("in_place", [False, True], ids=["fresh", "in place"])
def test_torchft_recovery_test(in_place: bool) -> None:
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)

    def init_transport(rank: int, world_size: int) -> PGTransport[dict[str, object]]:
        pg = ProcessGroupGloo(timeout=timedelta(seconds=10))
        join(pg, f"localhost:{store.port}/test", rank, world_size)
        template = (lambda: make_state_dict(CPU)) if in_place else None
        return PGTransport(pg, timedelta(seconds=10), CPU, state_dict=template)

    run_multi_recovery_test(unittest.TestCase(), init_transport, device=CPU)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("topology", ["chain", "star"])
@pytest.mark.parametrize("in_place", [False, True], ids=["fresh", "in place"])
def test_torchft_recovery_test_over_lanes(in_place: bool, topology: str) -> None:
    def init_transport(rank: int, world_size: int) -> LaneTransport[dict[str, object]]:
        template = (lambda: make_state_dict(CPU)) if in_place else None
        return LaneTransport(timedelta(seconds=10), CPU, state_dict=template, topology=topology)  # type: ignore[arg-type]

    run_multi_recovery_test(unittest.TestCase(), init_transport, device=CPU)
