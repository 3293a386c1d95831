"""torchft's streaming DiLoCo under a real Lighthouse and Managers: the quorum is asked for within the inner optimizer's
step, which goes on to write parameters, and with a delay further steps come before the vote.

What a healed replica gets is compared, bit for bit, with what the source offered.
"""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore
from torchft.coordination import LighthouseServer
from torchft.local_sgd import DiLoCo
from torchft.process_group import ProcessGroupGloo

from ft_transport import LaneTransport, PGTransport

from .harness import digest, new_manager, tell, wait_for_heartbeat, workers

CPU = torch.device("cpu")
TIMEOUT = timedelta(seconds=20)
SYNC_EVERY = 4
JOINS_AT = 2  # committed steps of the first replica
AFTERWARDS = 3


class Told:
    """Mixed into a transport: says what it offers and what it gets."""

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: Any, timeout: timedelta) -> None:
        tell("offers", (step, digest(state_dict)))
        super().send_checkpoint(dst_ranks, step, state_dict, timeout)  # type: ignore[misc]

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> Any:
        state = super().recv_checkpoint(src_rank, metadata, step, timeout)  # type: ignore[misc]
        tell("gets", (step, digest(state)))
        return state


class OverLanes(Told, LaneTransport[Any]):
    pass


class OverGroup(Told, PGTransport[Any]):
    pass


def replicate(replica: int, lanes: bool, delay: int, lighthouse: str, signals_port: int) -> dict[str, Any]:
    """Train until the replica that comes later has healed, and some steps more."""
    signals = TCPStore("localhost", signals_port, is_master=False, wait_for_workers=False)
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    torch.manual_seed(replica)
    fragments = [torch.nn.Linear(400, 400), torch.nn.Linear(400, 400)]
    model = torch.nn.Sequential(*fragments)
    inner = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    outer = [torch.optim.SGD(each.parameters(), lr=0.7, momentum=0.9, nesterov=True) for each in fragments]
    group = ProcessGroupGloo(timeout=TIMEOUT)

    def template() -> object:
        return {key: state_dict() for key, state_dict in manager._user_state_dicts.items()}

    transport: Any = OverLanes(TIMEOUT, CPU, template) if lanes else OverGroup(group, TIMEOUT, CPU, template)
    manager = new_manager(
        lighthouse,
        store.port,
        f"diloco_{replica}",
        TIMEOUT,
        pg=group,
        load_state_dict=lambda state: (model.load_state_dict(state["model"]), inner.load_state_dict(state["inner"])),
        state_dict=lambda: {"model": model.state_dict(), "inner": inner.state_dict()},
        use_async_quorum=False,
        checkpoint_transport=transport,
    )
    wait_for_heartbeat(lighthouse, manager)
    last: float = math.inf
    healed = replica == 0
    with DiLoCo(manager, fragments, inner, outer, SYNC_EVERY, fragment_sync_delay=delay):
        while (step := manager.current_step()) < last:
            if replica == 0 and step == JOINS_AT:
                tell("waits")
                signals.wait(["go on"], timedelta(seconds=60))
            inner.zero_grad()
            model(torch.rand(8, 400)).square().mean().backward()
            inner.step()
            if not healed and manager.current_step() > 0:
                healed = True
                signals.set("last step", str(manager.current_step() + AFTERWARDS))
            if signals.check(["last step"]):
                last = int(signals.get("last step"))
    manager.shutdown()
    end = manager._manager_state_dict()["user"]
    report = transport.last_report
    return {
        "step": manager.current_step(),
        "original": digest([end[f"StreamingDiLoCoFragment_{i}"]["original_parameters"] for i in range(2)]),
        "complete": report.complete,
        "reason": report.summary(),
    }


@pytest.mark.parametrize("delay", [1, 0], ids=["delay", "no delay"])
@pytest.mark.parametrize("lanes", [True, False], ids=["lanes", "group"])
def test_a_replica_joins(lanes: bool, delay: int) -> None:
    lighthouse = LighthouseServer(
        bind="[::]:0", min_replicas=1, join_timeout_ms=10_000, quorum_tick_ms=50, heartbeat_timeout_ms=1500
    )
    signals = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    address = f"http://127.0.0.1:{lighthouse.address().rpartition(':')[2]}"
    try:
        with workers(2) as found:
            found[0].start(replicate, 0, lanes, delay, address, signals.port)
            found[0].event("waits")
            found[1].start(replicate, 1, lanes, delay, address, signals.port)
            signals.set("go on", "")
            ends = [worker.result() for worker in (found[0], found[1])]
            offered, received = found[0].event("offers").value, found[1].event("gets").value
    finally:
        lighthouse.shutdown()
    for end in ends:
        assert end["complete"], end["reason"]
    assert received == offered, "the first heal has succeeded, bit for bit"
    assert ends[0]["step"] == ends[1]["step"]
    assert ends[0]["original"] == ends[1]["original"]
