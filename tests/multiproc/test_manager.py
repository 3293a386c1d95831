"""Replicas under a real Lighthouse and Manager: one is killed, comes back, and heals.

Each replica is a group of one or two ranks, each a process; a rank heals from the rank of the same number in another
replica. Ranks of a group hold different states, and so does every replica before its first heal.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import pytest
import torch
import torchft.process_group
from torch.distributed import TCPStore
from torchft.coordination import LighthouseServer
from torchft.process_group import ProcessGroupGloo

from ft_transport import LaneTransport, PGTransport, TransferReport
from ft_transport._net.endpoint import Endpoint
from ft_transport.testing import FaultProxy, FaultyTransport

from .harness import Worker, digest, new_manager, tell, wait_for_heartbeat

KILL_AT = 3  # committed steps
GATE = 6  # up to which the others go on alone
AFTERWARDS = 4  # steps from the first commit of the healed replica to the end
TIMEOUT = timedelta(seconds=20)
TRANSFER_TIMEOUT = timedelta(seconds=10)  # below the Manager's
# By what lanes move bytes; ``make fabric`` names one of torch's, which takes no small tensor.
FABRIC = os.environ.get("FT_TRANSPORT_FABRIC", "auto")
WIDTH = 64 if FABRIC == "auto" else 2048


# ---------------------------------------------------------------------------------- inside a worker


@dataclass(frozen=True)
class Job:
    """What all ranks of a test share.

    Attributes:
        lighthouse: Its address.
        signals: Port of a store through which the test lets the ranks go on.
        group_size: Ranks of each replica.
        keys: Registered state-dict keys; one model and optimizer for each.
        lanes: Whether states move over lanes, and not over the group.
        slow_heals: Whether a heal says that it begins, and then waits.
        native: Whether the group is torch's own, and not one of torchft's.
    """

    lighthouse: str
    signals: int
    replicas: int
    group_size: int
    async_quorum: bool
    keys: tuple[str, ...]
    lanes: bool
    slow_heals: bool = False
    native: bool = False


def native_group(store: TCPStore) -> Any:
    """A group of torch's own, which the Manager connects for each quorum."""
    # Who comes back is another rank of it than before; there are places enough, and who has them is the Manager's.
    rank = store.add("native", 1) - 1
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=16, timeout=TIMEOUT, enable_reconfigure=True
    )
    return torch.distributed.group.WORLD


class Part:
    """A model and its optimizer, registered under one key."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(48, WIDTH), torch.nn.BatchNorm1d(WIDTH), torch.nn.Linear(WIDTH, 8)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, amsgrad=True)
        # A fresh optimizer has no state to land in.
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def addresses(self) -> list[int]:
        optimizer = [value for state in self.optimizer.state.values() for value in state.values()]
        return [tensor.data_ptr() for tensor in [*self.model.state_dict().values(), *optimizer]]


class Rank:
    """One rank of a replica."""

    def __init__(self, job: Job, replica: int, group_rank: int, store: int) -> None:
        self.job = job
        self.signals = TCPStore("localhost", job.signals, is_master=False, wait_for_workers=False)
        self.seed = 100 * group_rank + replica
        self.parts = {key: Part(self.seed + 10 * i) for i, key in enumerate(job.keys)}
        group = native_group(self.signals) if job.native else ProcessGroupGloo(timeout=TIMEOUT)
        template: Callable[[], object] = lambda: {key: part.state_dict() for key, part in self.parts.items()}  # noqa: E731
        if job.keys == ("default",):
            template = self.parts["default"].state_dict  # the very function that the Manager gets
        cpu = torch.device("cpu")
        self.transport: LaneTransport[Any] | PGTransport[Any] = (
            LaneTransport(TRANSFER_TIMEOUT, cpu, state_dict=template, fabric=FABRIC)
            if job.lanes
            else PGTransport(group, TRANSFER_TIMEOUT, cpu, state_dict=template)
        )
        if job.slow_heals:
            faulty = FaultyTransport(self.transport, role="destination", on_fault=lambda text: tell("heals"))
            self.transport = cast(Any, faulty.wait_in("agree", 1.5))
        first = self.parts["default"] if job.keys == ("default",) else None
        self.manager = new_manager(
            job.lighthouse,
            store,
            f"replica_{replica}",
            TIMEOUT,
            pg=group,
            load_state_dict=first.load_state_dict if first else None,
            state_dict=first.state_dict if first else None,
            use_async_quorum=job.async_quorum,
            rank=group_rank,
            world_size=job.group_size,
            checkpoint_transport=self.transport,
        )
        if first is None:
            for key, part in self.parts.items():
                self.manager.register_state_dict_fn(key, cast(Any, part.load_state_dict), part.state_dict)

    def last_step(self) -> float:
        """Where to end: the replica that comes back says so."""
        return int(self.signals.get("last step")) if self.signals.check(["last step"]) else math.inf

    def train(self, doomed: bool, returning: bool) -> dict[str, Any]:
        """Train to the last step, or die on the way."""
        before = [part.addresses() for part in self.parts.values()]
        heals: list[TransferReport] = []
        while (step := self.manager.current_step()) < self.last_step():
            if doomed and step >= KILL_AT:
                tell("dies", digest(self.state()))
                os.kill(os.getpid(), signal.SIGKILL)
            if step == GATE:
                tell("waits")
                self.signals.wait(["go on"], timedelta(seconds=60))
            self.step(step)
            report = self.transport.last_report
            if report is not None and report.role == "destination" and all(heal is not report for heal in heals):
                heals.append(report)
                if returning:
                    self.signals.set("last step", str(self.manager.current_step() + AFTERWARDS))
        return {
            "step": self.manager.current_step(),
            "batches": self.manager.batches_committed(),
            "digest": digest(self.state()),
            "heals": [heal.as_dict() for heal in heals],
            "same addresses": before == [part.addresses() for part in self.parts.values()],
        }

    def step(self, step: int) -> None:
        self.manager.start_quorum()
        generator = torch.Generator().manual_seed(1000 * step + self.seed)
        for part in self.parts.values():
            for parameter in part.model.parameters():
                parameter.grad = torch.rand(parameter.shape, generator=generator)
                self.manager.allreduce(parameter.grad).wait()
        if self.manager.should_commit():
            for part in self.parts.values():
                part.optimizer.step()
                for buffer in part.model.buffers():
                    buffer.add_(1)

    def state(self) -> dict[str, Any]:
        return {key: part.state_dict() for key, part in self.parts.items()}


_rank: Rank | None = None


def join(job: Job, replica: int, group_rank: int, store: int) -> None:
    """Make a Manager; after that the others' quorum waits for this replica."""
    global _rank
    _rank = Rank(job, replica, group_rank, store)
    wait_for_heartbeat(job.lighthouse, _rank.manager)


def train(doomed: bool, returning: bool) -> dict[str, Any]:
    assert _rank is not None
    return _rank.train(doomed, returning)


def leave() -> None:
    assert _rank is not None
    _rank.manager.shutdown()
    if _rank.job.native:
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------------------------- inside the test


def new_lighthouse() -> LighthouseServer:
    return LighthouseServer(
        bind="[::]:0", min_replicas=1, join_timeout_ms=10_000, quorum_tick_ms=50, heartbeat_timeout_ms=1500
    )


def port_of(lighthouse: LighthouseServer) -> int:
    return int(lighthouse.address().rpartition(":")[2])


class Cluster:
    """The processes of one job."""

    lighthouse: LighthouseServer
    gate: FaultProxy

    def restart_lighthouse(self) -> None:
        """End it, and start another one at the same address."""
        self.lighthouse.shutdown()
        self.lighthouse = new_lighthouse()
        self.gate._target = self.gate._target._replace(port=port_of(self.lighthouse))

    def __init__(self, job: Job) -> None:
        self.job = job
        self._stores: list[TCPStore] = []
        self.replicas: list[list[Worker]] = [[] for _ in range(job.replicas)]

    def start(self, replica: int) -> None:
        """Start all ranks of a replica, with a store of their own."""
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self._stores.append(store)
        for worker in self.replicas[replica]:
            worker.end()
        self.replicas[replica] = [Worker(f"replica {replica} rank {rank}") for rank in range(self.job.group_size)]
        for rank, worker in enumerate(self.replicas[replica]):
            worker.start(join, self.job, replica, rank, store.port)

    def joined(self, replica: int) -> None:
        for worker in self.replicas[replica]:
            worker.result()

    def train(self, replica: int, *, doomed: bool = False, returning: bool = False) -> None:
        for worker in self.replicas[replica]:
            worker.start(train, doomed, returning)

    def end(self) -> None:
        for worker in (worker for replica in self.replicas for worker in replica):
            worker.end()


@contextmanager
def cluster(
    replicas: int,
    group_size: int,
    async_quorum: bool,
    keys: tuple[str, ...],
    lanes: bool,
    slow_heals: bool = False,
    native: bool = False,
) -> Iterator[Cluster]:
    """A Lighthouse and replicas, all of which have joined."""
    lighthouse = new_lighthouse()
    # Its port stays taken for a while after it has ended.
    gate = FaultProxy(Endpoint(("127.0.0.1",), port_of(lighthouse), bytes(32), False).encode())
    signals = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    way = Endpoint.decode(gate.metadata)
    address = f"http://{way.addresses[0]}:{way.port}"
    found = Cluster(Job(address, signals.port, replicas, group_size, async_quorum, keys, lanes, slow_heals, native))
    found.lighthouse, found.gate = lighthouse, gate
    try:
        for replica in range(replicas):
            found.start(replica)
        for replica in range(replicas):
            found.joined(replica)
        yield found
        for worker in (worker for replica in found.replicas for worker in replica):
            worker.call(leave)
    finally:
        found.end()
        found.lighthouse.shutdown()
        gate.close()
    # Both are held until here.
    del signals


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("replicas", "group_size", "async_quorum"),
    [
        pytest.param(
            replicas,
            group_size,
            async_quorum,
            id=f"{replicas} replicas of {group_size}-{'async' if async_quorum else 'sync'}",
            # Each two of the three choices meet in a test that is always run.
            marks=[pytest.mark.thorough] * ((replicas == 4) ^ (group_size == 2) ^ (not async_quorum)),
        )
        for replicas in (2, 4)
        for group_size in (1, 2)
        for async_quorum in (False, True)
    ],
)
def test_killed_replica_heals(replicas: int, group_size: int, async_quorum: bool) -> None:
    killed_replica_heals(replicas, group_size, async_quorum, lanes=False)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("replicas", "group_size", "async_quorum"),
    [
        pytest.param(2, 1, False, id="2 replicas of 1-sync"),
        pytest.param(2, 1, True, id="2 replicas of 1-async", marks=pytest.mark.thorough),
        pytest.param(4, 2, False, id="4 replicas of 2-sync", marks=pytest.mark.thorough),
        pytest.param(4, 2, True, id="4 replicas of 2-async"),
    ],
)
def test_killed_replica_heals_over_lanes(replicas: int, group_size: int, async_quorum: bool) -> None:
    killed_replica_heals(replicas, group_size, async_quorum, lanes=True)


@pytest.mark.timeout(120)
@pytest.mark.skipif(not hasattr(torchft.process_group, "reconfigure_with_store"), reason="torchft takes its own alone")
@pytest.mark.skipif(not hasattr(torch.distributed.ProcessGroup, "reconfigure"), reason="torch is older than 2.14")
@pytest.mark.parametrize("async_quorum", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("replicas", [2, 4], ids=["2 replicas", "4 replicas"])
def test_killed_replica_heals_over_a_native_group(replicas: int, async_quorum: bool) -> None:
    killed_replica_heals(replicas, 1, async_quorum, lanes=False, native=True)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("lanes", [True, pytest.param(False, marks=pytest.mark.thorough)])
def test_a_lighthouse_that_restarts_in_the_middle_of_a_heal(lanes: bool) -> None:
    """The heal does not need it, and the next quorum is had from the new one."""
    killed_replica_heals(2, 1, False, lanes, restart=True)


def killed_replica_heals(
    replicas: int, group_size: int, async_quorum: bool, lanes: bool, *, restart: bool = False, native: bool = False
) -> None:
    keys = ("default",) if group_size == 1 else ("left", "right")
    victim = replicas - 1
    with cluster(replicas, group_size, async_quorum, keys, lanes, restart, native) as job:
        for replica in range(replicas):
            job.train(replica, doomed=replica == victim)
        for worker in job.replicas[victim]:
            worker.event("dies")
            worker.wait_dead()
        for worker in (worker for replica in job.replicas[:victim] for worker in replica):
            worker.event("waits")
        job.start(victim)
        job.joined(victim)
        job.train(victim, returning=True)
        TCPStore("localhost", job.job.signals, is_master=False, wait_for_workers=False).set("go on", "")
        if restart:
            job.replicas[victim][0].event("heals")
            job.restart_lighthouse()
        results = [[worker.result() for worker in replica] for replica in job.replicas]

    for rank in range(group_size):
        ends = [replica[rank] for replica in results]
        assert len({end["step"] for end in ends}) == 1
        assert len({end["digest"] for end in ends}) == 1, f"states of group rank {rank} differ"
        assert len({end["batches"] for end in ends}) == 1
        assert all(end["same addresses"] for end in ends)
        (heal,) = ends[victim]["heals"]
        assert heal["step"] >= GATE
        assert heal["complete"]
        assert heal["in_place_share"] == 1.0
        assert heal["nbytes_fresh"] == 0
        assert (heal["not_in_place"], heal["unexpected_keys"]) == ({}, [])
        if lanes and FABRIC != "auto":
            assert heal["peers"][0]["nbytes_direct"] > 0
    assert len({replica[rank]["digest"] for replica in results for rank in range(group_size)}) == group_size
