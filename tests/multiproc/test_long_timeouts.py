"""Time-outs that are longer than the system can count are long ones."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest
import torch

from ft_transport import LaneTransport, distributed

CPU = torch.device("cpu")
LONG = [timedelta.max, timedelta(days=300 * 365)]
STEP = 7


@pytest.mark.parametrize("timeout", LONG, ids=["max", "300 years"])
def test_disallow_waits_for_a_destination_under_way(timeout: timedelta) -> None:
    state, template = {"w": torch.ones(1 << 20)}, {"w": torch.zeros(1 << 20)}
    begun, goes_on = threading.Event(), threading.Event()

    def give() -> dict[str, torch.Tensor]:
        begun.set()
        goes_on.wait(10)
        return template

    source: LaneTransport[Any] = LaneTransport(timeout, CPU, host="127.0.0.1", stall_timeout=timeout)
    one: LaneTransport[Any] = LaneTransport(timeout, CPU, give, host="127.0.0.1", stall_timeout=timeout)
    receiving = threading.Thread(target=one.recv_checkpoint, args=(0, source.metadata(), STEP, timeout))
    ending = threading.Thread(target=source.disallow_checkpoint)
    receiving.start()
    source.send_checkpoint([1], STEP, state, timeout)
    assert begun.wait(10)
    ending.start()
    ending.join(0.3)
    assert ending.is_alive()
    goes_on.set()
    for thread in (receiving, ending):
        thread.join(10)
        assert not thread.is_alive()
    assert torch.equal(template["w"], state["w"])
    for transport in (source, one):
        transport.shutdown()


@pytest.mark.parametrize("timeout", LONG, ids=["max", "300 years"])
def test_over_a_group(timeout: timedelta) -> None:
    store = torch.distributed.HashStore()
    results: list[Any] = [None, None]

    def run(rank: int) -> None:
        pg = torch.distributed.ProcessGroupGloo(store, rank, 2, timedelta(seconds=20))
        transport = distributed.PGTransport(pg, timeout, CPU)
        try:
            if rank:
                results[1] = transport.recv_checkpoint(0)
            else:
                transport.send_checkpoint([1], {"w": torch.ones(1 << 20)})
        except Exception as exc:
            results[rank] = exc

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results[0] is None
    assert torch.equal(results[1]["w"], torch.ones(1 << 20))
