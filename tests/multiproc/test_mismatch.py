"""A joiner whose template disagrees in one leaf, or that cannot be healed at all: what it costs the others.

Under a real Lighthouse and Manager.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any, NamedTuple

import pytest
import torch
from torch.distributed import TCPStore
from torchft.checkpointing.http_transport import HTTPTransport
from torchft.checkpointing.pg_transport import PGTransport as TorchftPGTransport
from torchft.checkpointing.transport import CheckpointTransport
from torchft.process_group import ProcessGroupGloo

from ft_transport import LaneTransport, PGTransport, RemoteProtocolError

from .harness import Worker, digest, new_manager, tell, wait_for_heartbeat
from .test_manager import new_lighthouse

TIMEOUT = timedelta(seconds=10)
TRANSFER_TIMEOUT = timedelta(seconds=5)
STEPS_ALONE = 3
STEPS_TOGETHER = 3


class Job(NamedTuple):
    lighthouse: str
    store: int
    transport: str  # see new_transport
    async_quorum: bool


class Metric:
    """A state that grows as it is used, and no parameter."""

    def __init__(self, *sizes: int) -> None:
        self.seen = [torch.full((size,), float(size)) for size in sizes]
        self.blob = torch.full((170 if len(sizes) > 1 else 0,), 7, dtype=torch.uint8)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "blob": self.blob}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen, self.blob = list(state["seen"]), state["blob"]


def new_transport(replica: Replica, kind: str, **options: Any) -> CheckpointTransport[Any]:
    cpu = torch.device("cpu")
    if kind == "lanes":
        return LaneTransport(TRANSFER_TIMEOUT, cpu, replica.state_dict, **options)
    if kind == "group":
        return PGTransport(replica.group, TRANSFER_TIMEOUT, cpu, replica.state_dict, **options)
    if kind == "torchft group":
        return TorchftPGTransport(replica.group, TRANSFER_TIMEOUT, cpu)
    return HTTPTransport(TRANSFER_TIMEOUT, num_chunks=0)


class Replica:
    def __init__(self, job: Job, number: int, *sizes: int, hook: object = None, **options: Any) -> None:
        torch.manual_seed(number)
        self.model = torch.nn.Linear(16, 4)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.metric = Metric(*sizes)
        self.hook = hook
        self.group = ProcessGroupGloo(timeout=TIMEOUT)
        self.transport = new_transport(self, job.transport, **options)
        self.manager = new_manager(
            job.lighthouse,
            job.store,
            f"replica_{number}",
            TIMEOUT,
            pg=self.group,
            load_state_dict=self.load_state_dict,
            state_dict=self.state_dict,
            use_async_quorum=job.async_quorum,
            quorum_timeout=timedelta(seconds=30),
            checkpoint_transport=self.transport,
        )
        wait_for_heartbeat(job.lighthouse, self.manager)

    def state_dict(self) -> dict[str, Any]:
        hook = {"hook": self.hook} if self.hook else {}
        return {"model": self.model.state_dict(), "metric": self.metric.state_dict(), **hook}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.metric.load_state_dict(state["metric"])

    def step(self) -> bool:
        self.manager.start_quorum()
        self.optimizer.zero_grad()
        self.model(torch.ones(2, 16)).sum().backward()
        for parameter in self.model.parameters():
            self.manager.allreduce(parameter.grad).wait()
        committed = self.manager.should_commit()
        if committed:
            self.optimizer.step()
        return committed


def healthy(job: Job, signals: int, hooked: bool = False) -> dict[str, Any]:
    """Trains until it is told to end. Tells of steps that fail, and of those that are committed next."""
    told = TCPStore("localhost", signals, is_master=False, wait_for_workers=False)
    replica = Replica(job, 0, 32, 7, hook=(lambda: None) if hooked else None)
    failed = in_a_row = 0
    while not told.check(["last"]) or replica.manager.current_step() < int(told.get("last")):
        if replica.step():
            in_a_row += 1
            if in_a_row == STEPS_ALONE:
                tell("goes on", failed)
        else:
            failed, in_a_row = failed + 1, 0
        time.sleep(0.01)
    return end_of(replica, failed)


def joins(job: Job, signals: int, options: dict[str, Any]) -> dict[str, Any]:
    """Comes later, and trains a few steps."""
    told = TCPStore("localhost", signals, is_master=False, wait_for_workers=False)
    replica = Replica(job, 1, 7, **options)
    if options:
        with pytest.raises(RemoteProtocolError) as info:
            replica.step()
        assert replica.manager.current_step() == 0
        return {"error": str(info.value)}
    failed = 0
    while not replica.step():
        failed += 1
    last = replica.manager.current_step() + STEPS_TOGETHER
    told.set("last", str(last))
    while replica.manager.current_step() < last:
        failed += not replica.step()
    return end_of(replica, failed)


def cannot_join(job: Job) -> tuple[str, int]:
    """Comes later, and has to stop; gives why, and the steps that it has failed before."""
    replica = Replica(job, 1, 7)
    for failed in range(20):
        try:
            assert not replica.step()
        except RemoteProtocolError as exc:
            return str(exc), failed
    raise AssertionError("it goes on and on")


def end_of(replica: Replica, failed: int) -> dict[str, Any]:
    report = getattr(replica.transport, "last_report", None)
    replica.manager.shutdown(wait=False)
    return {
        "step": replica.manager.current_step(),
        "failed": failed,
        "digest": digest(replica.state_dict()),
        "mismatched": report.mismatched if report else {},
    }


# The second one to come heals, however its template differs. The first one refuses: it is told to end, in that step,
# because each further attempt would fail a step of the healthy replica too.
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("transport", "async_quorum"),
    [
        pytest.param("group", False, id="group-sync", marks=pytest.mark.thorough),
        pytest.param("group", True, id="group-async"),
        pytest.param("lanes", False, id="lanes-sync"),
        pytest.param("lanes", True, id="lanes-async", marks=pytest.mark.thorough),
    ],
)
def test_a_leaf_that_disagrees_heals_and_a_refusal_costs_the_others_a_step(transport: str, async_quorum: bool) -> None:
    lighthouse = new_lighthouse()
    stores = [TCPStore("localhost", 0, is_master=True, wait_for_workers=False) for _ in range(4)]
    jobs = [Job(lighthouse.address(), store.port, transport, async_quorum) for store in stores]
    signals = stores[3].port
    workers = [Worker(name) for name in ("healthy", "refuses", "heals")]
    try:
        workers[0].start(healthy, jobs[0], signals)
        assert workers[0].event("goes on").value == 0
        workers[1].start(joins, jobs[1], signals, {"on_mismatch": "refuse"})
        refused = workers[1].result()
        workers[1].end()  # what the exception does to a training process
        assert "metric.seen.0: expected float32 (7,), source has float32 (32,)" in refused["error"]
        assert "metric.blob: expected uint8 (0,), source has uint8 (170,)" in refused["error"]
        assert workers[0].event("goes on").value <= 2, "a refusal costs a step, perhaps that which learns of its end"
        workers[2].start(joins, jobs[2], signals, {})
        ends = [workers[0].result(), workers[2].result()]
    finally:
        for worker in workers:
            worker.end()
        lighthouse.shutdown()
    assert ends[0]["step"] == ends[1]["step"]
    assert ends[0]["digest"] == ends[1]["digest"]
    assert ends[1]["failed"] == 0
    assert {path.removeprefix("user.default.") for path in ends[1]["mismatched"]} == {"metric.seen.0", "metric.blob"}


ANOTHER = "all replicas need the same transport"
CANNOT_TRAVEL = "hook: a value of class function cannot be encoded"


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("source", "joiner", "hooked", "why", "num_failed"),
    [
        pytest.param("lanes", "group", False, ANOTHER, 0, id="lanes-group", marks=pytest.mark.thorough),
        pytest.param("group", "lanes", False, ANOTHER, 0, id="group-lanes"),
        pytest.param("torchft http", "group", False, ANOTHER, 0, id="http-group", marks=pytest.mark.thorough),
        pytest.param("torchft http", "lanes", False, ANOTHER, 0, id="http-lanes", marks=pytest.mark.thorough),
        pytest.param("torchft group", "lanes", False, ANOTHER, 0, id="torchft-lanes", marks=pytest.mark.thorough),
        pytest.param("torchft group", "group", False, ANOTHER, 0, id="torchft-group", marks=pytest.mark.thorough),
        pytest.param("group", "group", True, CANNOT_TRAVEL, 2, id="cannot-travel-group", marks=pytest.mark.thorough),
        pytest.param("lanes", "lanes", True, CANNOT_TRAVEL, 2, id="cannot-travel-lanes"),
    ],
)
def test_a_joiner_that_will_never_be_healed_stops_and_the_others_go_on(
    source: str, joiner: str, hooked: bool, why: str, num_failed: int
) -> None:
    lighthouse = new_lighthouse()
    stores = [TCPStore("localhost", 0, is_master=True, wait_for_workers=False) for _ in range(3)]
    workers = [Worker(name) for name in ("healthy", "joiner")]
    try:
        workers[0].start(healthy, Job(lighthouse.address(), stores[0].port, source, True), stores[2].port, hooked)
        assert workers[0].event("goes on").value == 0
        workers[1].start(cannot_join, Job(lighthouse.address(), stores[1].port, joiner, True))
        error, failed = workers[1].result()
        print(error)
        workers[1].end()  # what the exception does to a training process
        assert "cannot be healed from the others" in error
        assert why in error
        assert failed == num_failed
        assert workers[0].event("goes on").value <= num_failed + 2
        stores[2].set("last", "0")
        workers[0].result()
    finally:
        for worker in workers:
            worker.end()
        lighthouse.shutdown()
