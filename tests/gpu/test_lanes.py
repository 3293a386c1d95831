"""State on an accelerator over lanes; runs wherever there is one."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest
import torch

from ft_transport import LaneTransport

TIMEOUT = timedelta(seconds=60)

pytestmark = pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")


def make_state(fill: float, device: torch.device) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(int(fill))
    return {
        "large": (torch.rand(3_000_000, generator=generator) * fill).to(device),
        "strided": (torch.rand(512, 1024, generator=generator) * fill).to(device).t(),
        "small": [(torch.rand(10 + i, generator=generator) * fill).to(device) for i in range(30)],
        "host": torch.rand(1_000_000, generator=generator) * fill,
    }


def leaves(state: dict[str, Any]) -> list[torch.Tensor]:
    return [state["large"], state["strided"], *state["small"], state["host"]]


@pytest.mark.parametrize("num_destinations", [1, 2])
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "fresh"])
def test_device_state(in_place: bool, num_destinations: int) -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    state = make_state(1.0, device)
    templates = [make_state(2.0, device) for _ in range(num_destinations)]
    source: LaneTransport[Any] = LaneTransport(TIMEOUT, device)
    destinations: list[LaneTransport[Any]] = [
        LaneTransport(TIMEOUT, device, (lambda template=template: template) if in_place else None)
        for template in templates
    ]
    results: list[Any] = [None] * num_destinations

    def receive(index: int) -> None:
        results[index] = destinations[index].recv_checkpoint(0, source.metadata(), 1, TIMEOUT)

    threads = [threading.Thread(target=receive, args=(i,)) for i in range(num_destinations)]
    for thread in threads:
        thread.start()
    source.send_checkpoint(list(range(1, num_destinations + 1)), 1, state, TIMEOUT)
    for thread in threads:
        thread.join()
    for transport in (*destinations, source):
        transport.disallow_checkpoint()
        transport.shutdown()
    for template, result in zip(templates, results, strict=True):
        for got, expected, mine in zip(leaves(result), leaves(state), leaves(template), strict=True):
            assert got.device.type == expected.device.type
            assert torch.equal(got, expected)
            assert not in_place or got.data_ptr() == mine.data_ptr()
