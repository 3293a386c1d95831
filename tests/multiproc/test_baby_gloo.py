"""A heal over ``ProcessGroupBabyGloo``, which keeps its group in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore
from torchft.process_group import ProcessGroupBabyGloo

from ft_transport import PGTransport
from ft_transport.bench.groups import join

from .harness import Workers, digest, store_address, workers

CPU = torch.device("cpu")
TIMEOUT = timedelta(seconds=30)
SIZE = 3

_group: ProcessGroupBabyGloo | None = None


def make_state(seed: int) -> dict[str, Any]:
    """A state with a message of its own, packed ones, a view of another tensor, and plain values."""
    generator = torch.Generator().manual_seed(seed)
    large = torch.rand(1 << 20, generator=generator)
    return {
        "large": large,
        "tail": large[-5:],
        "columns": torch.rand(64, 64, generator=generator).t(),
        "small": [torch.rand(3, 5, generator=generator).to(torch.bfloat16) for _ in range(40)],
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(seed),
        "text": f"seed {seed}",
        "pair": (seed, 0.5),
    }


def configure(rank: int, address: str) -> None:
    global _group
    _group = ProcessGroupBabyGloo(timeout=timedelta(seconds=60))
    join(_group, address, rank, SIZE)


def shut_down(rank: int) -> None:
    assert _group is not None
    _group.shutdown()


def heal(rank: int, step: int, in_place: bool) -> dict[str, Any]:
    """Rank 0 heals the others."""
    assert _group is not None
    state = make_state(step if rank == 0 else 0)
    transport = PGTransport[Any](_group, TIMEOUT, CPU, state_dict=(lambda: state) if in_place else None)
    received: Any = state
    if rank == 0:
        transport.send_checkpoint(list(range(1, SIZE)), step, state, TIMEOUT)
    else:
        received = transport.recv_checkpoint(0, transport.metadata(), step, TIMEOUT)
    report = transport.last_report
    assert report is not None
    return {
        "digest": digest(received),
        "same tensors": received["large"] is state["large"] and received["columns"] is state["columns"],
        "tied": received["tail"].data_ptr() == received["large"][-5:].data_ptr(),
        **report.as_dict(),
    }


@pytest.fixture(scope="module")
def ranks() -> Iterator[Workers]:
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    with workers(SIZE) as found:
        found.each(configure, store_address(store, "baby"))
        yield found
        found.each(shut_down)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("in_place", [False, True], ids=["fresh", "in place"])
def test_heal(ranks: Workers, in_place: bool) -> None:
    step = 5 + in_place
    source, *destinations = ranks.each(heal, step, in_place)
    assert [peer["outcome"] for peer in source["peers"]] == ["complete"] * (SIZE - 1)
    for destination in destinations:
        assert destination["digest"] == digest(make_state(step))
        assert destination["same tensors"] is in_place
        assert destination["tied"]
        assert destination["complete"]
        assert destination["in_place_share"] == float(in_place)
