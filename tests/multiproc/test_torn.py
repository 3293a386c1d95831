"""A replica that is torn, under a real Lighthouse and Manager: it heals or stops, and never steps its optimizer.

The scenario: replicas at step 10, and one at step 5 that heals in place. Its source is killed in mid-transfer. All
tensors of a replica begin with the number of its step, so what is in them tells where it came from.

Forward of the one that heals goes on while its state lands, and writes to BatchNorm's statistics; a metric has another
shape in each step, so that it never fits the template.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore
from torchft.checkpointing.pg_transport import PGTransport as TorchftPGTransport
from torchft.checkpointing.transport import CheckpointTransport
from torchft.coordination import LighthouseServer
from torchft.manager import Manager
from torchft.process_group import ProcessGroupGloo

from ft_transport import LaneTransport, PGTransport, TornStateError
from ft_transport._lanes import lane
from ft_transport._lanes.messages import StateMessages
from ft_transport._options import Options
from ft_transport._wire.layout import Limits

from .harness import Worker, digest, new_manager, tell, wait_for_heartbeat

AHEAD, BEHIND = 10, 5
TIMEOUT = timedelta(seconds=20)
TRANSFER_TIMEOUT = timedelta(seconds=10)
# After the source has died, the survivor's allreduce waits so long for the one that was healing, which is not coming.
ALLREDUCE = timedelta(seconds=8)
CPU = torch.device("cpu")
# Large enough to travel alone, so that there is a message in the middle.
NUM_PARAMETERS, PARAMETER_NUMEL = 8, 128 << 10
DIE_AT = 14  # of 24 large tensors, eight of each kind
FAR = 10_000  # steps


# ---------------------------------------------------------------------------------- inside a worker


@dataclass(frozen=True)
class Job:
    """What all replicas of a test share.

    Attributes:
        transport: "group", "lanes", or "torchft" for torchft's own in place.
        break_only: The source does not die; its transfer breaks.
    """

    lighthouse: str
    signals: int
    async_quorum: bool
    transport: str
    break_only: bool = False


class Doom:
    """Strikes where a source has sent some messages: the first source to get there, and it alone."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._sent = 0
        self._signals = TCPStore("localhost", job.signals, is_master=False, wait_for_workers=False)

    def strike(self) -> None:
        self._sent += 1
        if self._job.break_only and self._sent >= DIE_AT:
            raise RuntimeError("broken by the test")
        if self._sent == DIE_AT and self._signals.add("deaths", 1) == 1:
            tell("dies")
            os.kill(os.getpid(), signal.SIGKILL)


class DoomedGroup(ProcessGroupGloo):
    """A group in which a message of a state may be the last."""

    doom: Doom

    def send(self, tensors: list[torch.Tensor], dst_rank: int, tag: int) -> Any:
        if tag >= 3:
            self.doom.strike()
        return super().send(tensors, dst_rank, tag)


def few_under_way(self: Options, nbytes: int) -> Limits:
    """So that most of what was sent has landed when the source dies."""
    return Limits(message_bytes=1 << 20, flight_bytes=1 << 20, window=2)


def arm(doom: Doom) -> None:
    """For lanes, whose messages do not pass through the group."""
    # Else all that are left may be asked for before the first one has landed.
    lane._RUN_BYTES = 0
    view = StateMessages.view

    def doomed_view(self: StateMessages, message: int, bucket: Any) -> memoryview:
        doom.strike()
        return view(self, message, bucket)

    StateMessages.view = doomed_view  # type: ignore[method-assign]


class Replica:
    """A model of equal numbers, its optimizer, and a Manager at a step."""

    def __init__(self, job: Job, number: int, step: int, store: int) -> None:
        self.parameters = [torch.nn.Parameter(torch.zeros(PARAMETER_NUMEL)) for _ in range(NUM_PARAMETERS)]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.01)
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.norm = torch.nn.BatchNorm1d(64, affine=False)
        for tensor in [*self.tensors(), *self.norm.buffers()]:
            tensor.detach().fill_(step)
        self.metric = torch.zeros(step)
        self.forward_runs = step == BEHIND
        self.buffers: list[set[float]] = []  # when the optimizer may step, of each step that was committed
        self.job = job
        self.num_steps = 0
        self.optimizer.register_step_post_hook(self._count)
        group = DoomedGroup(timeout=ALLREDUCE)
        group.doom = Doom(job)
        self.transport = self._transport(job, group)
        self.manager = new_manager(
            job.lighthouse,
            store,
            f"replica_{number}",
            TIMEOUT,
            pg=group,
            load_state_dict=self.load_state_dict,
            state_dict=self.state_dict,
            use_async_quorum=job.async_quorum,
            checkpoint_transport=self.transport,
        )
        self.manager.load_state_dict({"step": step, "batches_committed": step})

    def _count(self, *_: object) -> None:
        self.num_steps += 1

    def _transport(self, job: Job, group: DoomedGroup) -> CheckpointTransport[Any]:
        if job.transport == "lanes":
            arm(group.doom)
            return LaneTransport(TRANSFER_TIMEOUT, CPU, state_dict=self.state_dict)
        if job.transport == "group":
            Options.limits = few_under_way  # type: ignore[method-assign]
            return PGTransport(group, TRANSFER_TIMEOUT, CPU, state_dict=self.state_dict)
        envelope = {"torchft": {"step": 0, "batches_committed": 0}}
        return TorchftPGTransport(
            group, TRANSFER_TIMEOUT, CPU, state_dict=lambda: {"user": {"default": self.state_dict()}, **envelope}
        )

    def state_dict(self) -> dict[str, Any]:
        state = {"model": [parameter.detach() for parameter in self.parameters], "optim": self.optimizer.state_dict()}
        if self.job.transport == "torchft":  # which breaks on what does not fit
            return state
        return {**state, "norm": self.norm.state_dict(), "metric": self.metric}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for mine, received in zip(self.parameters, state["model"], strict=True):
            if mine.data_ptr() != received.data_ptr():
                mine.detach().copy_(received)
        self.optimizer.load_state_dict(state["optim"])
        if "norm" in state:
            self.norm.load_state_dict(state["norm"])
            self.metric = state["metric"]

    def forward(self) -> None:
        """Forward, again and again until the quorum is there, and with it the state that has landed meanwhile."""
        quorum = self.manager._quorum_future
        assert quorum is not None
        while True:
            self.norm(torch.rand(8, 64))
            if quorum.done():
                break
            time.sleep(0.002)
        self.norm(torch.rand(8, 64))

    def tensors(self) -> list[torch.Tensor]:
        moments = [self.optimizer.state[p][name] for name in ("exp_avg", "exp_avg_sq") for p in self.parameters]
        return [*self.parameters, *moments]

    def step(self, allow_heal: bool = True) -> bool:
        """One training step; whether it was committed."""
        self.manager.start_quorum(allow_heal=allow_heal)
        if self.forward_runs:
            self.forward()
        for parameter in self.parameters:
            parameter.grad = torch.full_like(parameter, 0.5)
        if not self.job.break_only:  # else the source would wait for the one that has skipped it
            self.manager.allreduce(torch.ones(4)).wait()
        if not self.manager.should_commit():
            return False
        self.buffers.append({float(value) for buffer in self.norm.buffers() for value in buffer.unique()})
        self.optimizer.step()
        self.metric = torch.cat([self.metric, torch.ones(1)])
        tell("committed", self.manager.current_step())
        return True

    def kinds(self) -> set[float]:
        """The numbers in the state."""
        return {float(value) for tensor in self.tensors() for value in tensor.detach().unique()}


_replica: Replica | None = None


def this() -> Replica:
    assert _replica is not None
    return _replica


def join(job: Job, number: int, step: int, store: int) -> None:
    """Make a Manager; after that the others' quorum waits for this replica."""
    global _replica
    _replica = Replica(job, number, step, store)
    wait_for_heartbeat(job.lighthouse, _replica.manager)


def train(last_step: int, heal_once: bool) -> dict[str, Any]:
    """Train up to a step, or until torn.

    Args:
        last_step: Where to end.
        heal_once: Allow healing in the first step alone.
    """
    replica = this()
    before = [tensor.data_ptr() for tensor in replica.tensors()]
    votes: list[bool] = []
    torn: list[bool] = []
    error = None
    while replica.manager.current_step() < last_step and error is None:
        try:
            votes.append(replica.step(allow_heal=not (heal_once and votes)))
        except TornStateError as exc:
            error = exc
        torn.append(bool(getattr(replica.transport, "torn", False)))
    return {
        "step": replica.manager.current_step(),
        "votes": votes,
        "torn": torn,
        "error": error,
        "optimizer steps": replica.num_steps,
        "kinds": replica.kinds(),
        "digest": digest({name: value for name, value in replica.state_dict().items() if name != "norm"}),
        "buffers": replica.buffers,
        "same addresses": before == [tensor.data_ptr() for tensor in replica.tensors()],
    }


def insist() -> list[str]:
    """What a torn replica says that is not ended; and whether it ends quietly."""
    said = []
    dst_ranks = [1] if isinstance(this().transport, LaneTransport) else []  # there is nobody else in the group
    for call in (
        this().transport.disallow_checkpoint,
        lambda: this().transport.send_checkpoint(dst_ranks, 5, {}, TIMEOUT),
        this().manager.should_commit,
    ):
        with pytest.raises(TornStateError) as info:
            call()
        said.append(info.value.message)
    this().manager.shutdown()
    this().transport.shutdown()
    return said


def leave() -> None:
    this().manager.shutdown()


# ---------------------------------------------------------------------------------- inside the test


@contextmanager
def lighthouse() -> Iterator[tuple[str, TCPStore]]:
    """A Lighthouse's address, and a store through which replicas agree who dies."""
    server = LighthouseServer(
        bind="[::]:0", min_replicas=1, join_timeout_ms=5_000, quorum_tick_ms=50, heartbeat_timeout_ms=1500
    )
    signals = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    try:
        yield f"http://localhost:{server.address().rpartition(':')[2]}", signals
    finally:
        server.shutdown()


@contextmanager
def replicas(steps: list[int], enter: Callable[..., None], *job: Any) -> Iterator[list[Worker]]:
    """Workers, each of which has run ``enter(*job, its number, its step, the port of its store)``."""
    found = [Worker(f"replica {number}") for number in range(len(steps))]
    stores = [TCPStore("localhost", 0, is_master=True, wait_for_workers=False) for _ in steps]
    try:
        for number, (worker, step, store) in enumerate(zip(found, steps, stores, strict=True)):
            worker.start(enter, *job, number, step, store.port)
        for worker in found:
            worker.result()
        yield found
    finally:
        for worker in found:
            worker.end()


BOTH = pytest.mark.parametrize("async_quorum", [False, True], ids=["sync", "async"])


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("transport", "async_quorum"),
    [
        pytest.param("group", False, id="group-sync"),
        pytest.param("group", True, id="group-async", marks=pytest.mark.thorough),
        pytest.param("lanes", False, id="lanes-sync", marks=pytest.mark.thorough),
        pytest.param("lanes", True, id="lanes-async"),
        pytest.param("torchft", False, id="torchft-sync"),
        pytest.param("torchft", True, id="torchft-async", marks=pytest.mark.thorough),
    ],
)
def test_the_last_source_dies(transport: str, async_quorum: bool) -> None:
    with lighthouse() as (address, signals):
        job = Job(address, signals.port, async_quorum, transport)
        with replicas([AHEAD, BEHIND], join, job) as (source, survivor):
            source.start(train, FAR, False)
            survivor.start(train, BEHIND + 1, False)
            source.event("dies")
            source.wait_dead()
            end = survivor.result()
            print(end)
            if transport == "torchft":
                # What all this is about, and proof that the test would notice.
                assert end["error"] is None
                assert end["votes"] == [False, True]
                assert end["optimizer steps"] == 1
                assert survivor.event("committed").value == BEHIND + 1
                # AdamW has stepped: numbers that began as 5 and as 10 are still told apart.
                assert {value > (AHEAD + BEHIND) / 2 for value in end["kinds"] if value > 4} == {True, False}
                survivor.call(leave)
                return
            assert isinstance(end["error"], TornStateError)
            assert end["error"].torn
            for text in ("mark_restored()", "durable checkpoint", f"a receive of step {AHEAD} broke off"):
                assert text in str(end["error"])
            assert end["votes"] == [False]  # the step whose receive failed, which torchft fails itself
            assert end["torn"] == [True, True]
            assert end["optimizer steps"] == 0
            assert end["step"] == BEHIND
            assert_mixed(end["kinds"])
            assert survivor._events.get("committed", []) == []
            said = survivor.call(insist)
            assert ["cannot serve" in text for text in said] == [False, True, False]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("transport", "async_quorum"),
    [
        pytest.param("group", False, id="group-sync"),
        pytest.param("group", True, id="group-async", marks=pytest.mark.thorough),
        pytest.param("lanes", False, id="lanes-sync", marks=pytest.mark.thorough),
        pytest.param("lanes", True, id="lanes-async"),
    ],
)
def test_another_source_heals(transport: str, async_quorum: bool) -> None:
    last = AHEAD + 4
    with lighthouse() as (address, signals):
        job = Job(address, signals.port, async_quorum, transport)
        with replicas([AHEAD, AHEAD, BEHIND], join, job) as found:
            for worker in found:
                worker.start(train, last, False)
            dead = _first_to_die(found[:2])  # which of the two is the source is torchft's choice
            other, healed = (found[number].result() for number in (1 - dead, 2))
            print(other, healed)
            assert healed["error"] is None
            assert healed["votes"][0] is False
            assert healed["torn"][0] is True
            assert healed["torn"][-1] is False
            assert healed["step"] == other["step"] == last
            assert healed["digest"] == other["digest"]
            if async_quorum:
                assert healed["buffers"][0] == {float(AHEAD)}
            assert healed["same addresses"]
            assert healed["optimizer steps"] >= 3
            found[1 - dead].start(leave)
            found[2].call(leave)
            found[1 - dead].result()


def assert_mixed(kinds: set[float]) -> None:
    """Some numbers are the source's, some still one's own; where the bytes broke off, one may be half of each."""
    received, own = struct.pack("<f", AHEAD), struct.pack("<f", BEHIND)
    halves = {struct.unpack("<f", received[:at] + own[at:])[0] for at in range(1, 4)}
    assert {float(AHEAD), float(BEHIND)} <= kinds <= {float(AHEAD), float(BEHIND), *halves}


def _first_to_die(workers: Sequence[Worker]) -> int:
    for _ in range(100):
        for number, worker in enumerate(workers):
            with contextlib.suppress(TimeoutError):
                worker.event("dies", 0.1)
                worker.wait_dead()
                return number
    raise TimeoutError("nobody died")


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "async_quorum", [pytest.param(False, id="sync", marks=pytest.mark.thorough), pytest.param(True, id="async")]
)
def test_a_quorum_that_may_not_heal(async_quorum: bool) -> None:
    """The source is there, but the next quorum is not allowed to heal: that is no reason to step."""
    with lighthouse() as (address, signals):
        job = Job(address, signals.port, async_quorum, "lanes", break_only=True)
        with replicas([AHEAD, BEHIND], join, job) as (source, survivor):
            source.start(train, AHEAD + 2, True)
            survivor.start(train, FAR, True)
            end = survivor.result()
            print(end)
            assert isinstance(end["error"], TornStateError)
            assert end["votes"] == [False]
            assert end["optimizer steps"] == 0
            assert_mixed(end["kinds"])
            survivor.end()
            assert source.result()["error"] is None
            source.call(leave)


# ------------------------------------------------------------------------ what torchft must go on doing


class Recording(CheckpointTransport[Any]):
    """Moves nothing and notes every call, with the Manager's step at that moment."""

    def __init__(self) -> None:
        self.manager: Manager | None = None
        self.calls: list[tuple[str, int]] = []
        self.fail = ""

    def _note(self, name: str) -> None:
        self.calls.append((name, self.manager.current_step() if self.manager else -1))
        if self.fail == name:
            raise TornStateError(f"{name} failed")

    def metadata(self) -> str:
        self._note("metadata")
        return "nowhere"

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: Any, timeout: timedelta) -> None:
        self._note("send")

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> Any:
        self._note("recv")
        return {"user": {"default": {}}, "torchft": {"step": step, "batches_committed": step}}

    def disallow_checkpoint(self) -> None:
        self._note("disallow")

    def shutdown(self, wait: bool = True) -> None:
        self._note("shutdown")


_recording: tuple[Recording, Manager] | None = None


def join_recording(address: str, async_quorum: bool, number: int, step: int, store: int) -> None:
    global _recording
    transport = Recording()
    manager = new_manager(
        address,
        store,
        f"replica_{number}",
        TIMEOUT,
        pg=ProcessGroupGloo(timeout=TIMEOUT),
        load_state_dict=lambda state: None,
        state_dict=dict,
        use_async_quorum=async_quorum,
        checkpoint_transport=transport,
    )
    manager.load_state_dict({"step": step, "batches_committed": step})
    transport.manager = manager
    _recording = transport, manager
    wait_for_heartbeat(address, manager)


def recorded_step(fail: str) -> tuple[bool | str, list[tuple[str, int]], int]:
    """One step in which a call may fail: the vote or what should_commit raised, the calls, the step afterwards."""
    assert _recording is not None
    transport, manager = _recording
    transport.calls, transport.fail = [], fail
    manager.start_quorum()
    outcome: bool | str
    try:
        outcome = manager.should_commit()
    except TornStateError as exc:
        outcome = exc.message
    return outcome, transport.calls, manager.current_step()


def leave_recording() -> list[tuple[str, int]]:
    assert _recording is not None
    transport, manager = _recording
    transport.calls, transport.fail = [], ""
    manager.shutdown()
    return transport.calls


@pytest.mark.timeout(60)
@BOTH
def test_the_calls_that_the_guard_rests_on(async_quorum: bool) -> None:
    """If a new torchft changes this order, ``_plan.torn.TornGuard`` has to stop a torn replica elsewhere."""
    steps = [AHEAD, BEHIND]
    with lighthouse() as (address, _), replicas(steps, join_recording, address, async_quorum) as (ahead, behind):

        def both(fail_ahead: str = "", fail_behind: str = "") -> tuple[Any, Any]:
            ahead.start(recorded_step, fail_ahead)
            behind.start(recorded_step, fail_behind)
            return ahead.result(), behind.result()

        # A receive that fails: it was preceded by metadata(), the step is not committed, the step count stays.
        first, second = both(fail_behind="recv")
        assert first == (True, [("metadata", 10), ("send", 10), ("disallow", 10)], 11)
        assert second == (False, [("metadata", 5), ("recv", 5), ("disallow", 5)], 5)

        # One that succeeds: disallow_checkpoint() comes after it, and before the step counts as committed.
        first, second = both()
        assert first == (True, [("metadata", 11), ("send", 11), ("disallow", 11)], 12)
        assert second == (True, [("metadata", 5), ("recv", 5), ("disallow", 11)], 12)

        # Nobody is behind: metadata() and disallow_checkpoint() alone.
        first, second = both()
        assert first == second == (True, [("metadata", 12), ("disallow", 12)], 13)

        # What disallow_checkpoint() raises comes out of should_commit(), which has not returned and not counted.
        first, second = both(fail_behind="disallow")
        assert first[0] is True
        assert second == ("disallow failed", [("metadata", 13), ("disallow", 13)], 13)

        assert [worker.call(leave_recording)[0][0] for worker in (ahead, behind)] == ["shutdown", "shutdown"]
