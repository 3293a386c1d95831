"""Optimizers that step while a state is read: they wait until it is read no more, and nobody gets two moments of it.

Over lanes on loopback and over channels in memory, all ends in this process; last, torchft's streaming DiLoCo.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ft_transport import LaneTransport, PGTransport
from ft_transport._deadline import Deadline
from ft_transport._group.channel import Pending
from ft_transport._group.control import FIRST_MESSAGE_TAG
from ft_transport._group.destination import receive
from ft_transport._lanes.relay import Relay
from ft_transport._lanes.source import SourceTransfer
from ft_transport._options import Options
from ft_transport._plan.unchanged import Reading
from ft_transport._telemetry.report import PeerReport, TransferReport
from ft_transport.testing import memory_channels

from .harness import digest, wait_until
from .test_lanes import CPU, MIB, STEP, TIMEOUT, Destination, Lanes, envelope, lanes

__all__ = ["lanes"]

# So that nobody is given up, or tries another supplier, on a machine that is busy.
CALM: dict[str, Any] = {"stall_timeout": timedelta(seconds=15)}


class Trained:
    """A large parameter and its fused optimizer, or a small one."""

    def __init__(self, seed: int, numel: int = 1_500_000) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.rand(numel, generator=generator))
        self.optimizer = torch.optim.AdamW([self.weight], lr=0.1, fused=True)
        self.weight.grad = torch.rand(numel, generator=generator)
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight.detach(), "optimizer": self.optimizer.state_dict()}


class Gate:
    """Lets no byte of a lane pass behind the first ones, until it is opened."""

    def __init__(self, first_lane: int = 1, behind: int = MIB) -> None:
        self.reached, self._open, self._first, self._behind = threading.Event(), threading.Event(), first_lane, behind

    def __call__(self, number: int, way: str, position: int, data: bytes) -> bytes:
        if number >= self._first and way == "down" and position > self._behind:
            self.reached.set()
            self._open.wait(20)
        return data

    def open(self) -> None:
        self._open.set()


class Step:
    """A step of an optimizer in a thread of its own, which has come so far that it waits."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, optimizer: torch.optim.Optimizer, where: type, name: str
    ) -> None:
        waits, original = threading.Event(), getattr(where, name)

        def end(*args: Any) -> None:
            waits.set()
            original(*args)

        monkeypatch.setattr(where, name, end)
        self._thread = threading.Thread(target=optimizer.step)
        self._thread.start()
        assert waits.wait(20)
        assert self._thread.is_alive()

    def join(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive()


def begun(lanes: Lanes, source: LaneTransport[Any], gate: Gate, seed: int = 2) -> Destination:
    """A destination that begins to fetch, through a gate."""
    proxy = lanes.proxy(source.metadata(), gate)
    return lanes.destination(Trained(seed).state_dict(), lanes=1, **CALM).start(proxy.metadata)


def got(destination: Destination) -> str:
    destination.join()
    assert destination.error is None
    return digest(destination.result["user"]["default"])


# --------------------------------------------------------------------------------------- over lanes


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "not verified"])
def test_a_source_waits_until_it_is_read(lanes: Lanes, monkeypatch: pytest.MonkeyPatch, verify: bool) -> None:
    trained, gate = Trained(1), Gate()
    offered, before = digest(trained.state_dict()), trained.weight.detach().clone()
    source = lanes.transport(verify=verify, **CALM)
    destination = begun(lanes, source, gate)
    source.send_checkpoint([1], STEP, envelope(trained.state_dict()), TIMEOUT)
    assert gate.reached.wait(20)
    step = Step(monkeypatch, trained.optimizer, SourceTransfer, "end_reading")
    assert torch.equal(trained.weight, before)
    gate.open()
    step.join()
    assert not torch.equal(trained.weight, before)
    assert got(destination) == offered
    source.disallow_checkpoint()
    report = source.last_report
    assert report is not None
    assert report.complete, report.error


def test_a_source_waits_no_longer_than_its_deadline(lanes: Lanes) -> None:
    trained, gate = Trained(1), Gate()
    before = trained.weight.detach().clone()
    source = lanes.transport(**CALM)
    destination = begun(lanes, source, gate)
    source.send_checkpoint([1], STEP, envelope(trained.state_dict()), TIMEOUT)
    assert gate.reached.wait(20)
    assert source._serving.transfer is not None
    source._serving.transfer._deadline.expire()
    trained.optimizer.step()
    assert not torch.equal(trained.weight, before)
    report = source.last_report
    assert report is not None
    assert report.peers[0].outcome in ("timed out", "failed")
    gate.open()
    destination.join()
    assert destination.error is not None
    assert destination.transport.torn
    source.disallow_checkpoint()


def test_who_has_not_come_is_not_waited_for_beyond_the_stall_timeout(lanes: Lanes) -> None:
    trained = Trained(1)
    source = lanes.transport(stall_timeout=timedelta(seconds=0.1))
    source.send_checkpoint([1], STEP, envelope(trained.state_dict()), TIMEOUT)
    trained.optimizer.step()
    report = source.last_report
    assert report is not None
    assert "has not come within 0.1 s" in report.peers[0].reason
    source.disallow_checkpoint()


@pytest.mark.parametrize("case", ["copied", "another one's"])
def test_nobody_waits_for_what_is_not_read(lanes: Lanes, case: str) -> None:
    trained = Trained(1, 1_000 if case == "copied" else 1_500_000)
    other = trained if case == "copied" else Trained(3)
    offered, before = digest(trained.state_dict()), other.weight.detach().clone()
    source = lanes.transport(**CALM)
    source.send_checkpoint([1], STEP, envelope(trained.state_dict()), TIMEOUT)
    other.optimizer.step()
    assert not torch.equal(other.weight, before)
    destination = lanes.destination(Trained(2, trained.weight.numel()).state_dict()).start(source.metadata())
    assert got(destination) == offered
    source.disallow_checkpoint()
    report = source.last_report
    assert report is not None
    assert report.complete, report.error


def test_a_step_after_everybody_was_served_voids_nothing(lanes: Lanes) -> None:
    trained = Trained(1)
    offered = digest(trained.state_dict())
    source = lanes.transport(**CALM)
    source.send_checkpoint([1], STEP, envelope(trained.state_dict()), TIMEOUT)
    destination = lanes.destination(Trained(2).state_dict()).start(source.metadata())
    assert got(destination) == offered
    wait_until(lambda: source._serving.transfer is not None and source._serving.transfer.is_over)
    trained.optimizer.step()
    trained.weight.detach().add_(1)
    source.disallow_checkpoint()
    report = source.last_report
    assert report is not None
    assert report.complete, report.error


def test_shutdown_ends_the_wait(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, gate = Trained(1), Gate()
    source = lanes.transport(**CALM)
    destination = begun(lanes, source, gate)
    source.send_checkpoint([1], STEP, envelope(trained.state_dict()), TIMEOUT)
    assert gate.reached.wait(20)
    step = Step(monkeypatch, trained.optimizer, SourceTransfer, "end_reading")
    source.shutdown()
    step.join()
    gate.open()
    assert destination.join().error is not None


def chain_of_two(lanes: Lanes, trained: Trained, receive: Callable[[Destination, str], object]) -> tuple[Any, ...]:
    """A source, a destination that passes the state on through a gate, one that does not fetch yet, what is offered."""
    state, gate = Trained(1).state_dict(), Gate(first_lane=0)
    source = lanes.transport(**CALM)
    source.send_checkpoint([1, 2], STEP, envelope(state), TIMEOUT)
    first = lanes.destination(trained.state_dict(), **CALM)
    proxy = lanes.proxy(first.transport.metadata(), gate)
    first.transport._local = first.transport._local._replace(metadata=proxy.metadata)
    receive(first, source.metadata())
    second = lanes.destination(Trained(3).state_dict(), lanes=1, **CALM)
    return source, first, second, gate, digest(state)


def test_a_destination_waits_until_it_has_passed_the_state_on(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Trained(2)
    source, first, second, gate, offered = chain_of_two(
        lanes, trained, lambda first, metadata: first.start(metadata).join()
    )
    assert got(first) == offered
    second.start(source.metadata())
    assert gate.reached.wait(20)
    before = trained.weight.detach().clone()
    step = Step(monkeypatch, trained.optimizer, Relay, "end_reading")
    assert torch.equal(trained.weight, before)
    gate.open()
    assert got(second) == offered
    step.join()
    assert not torch.equal(trained.weight, before)
    assert second.report.num_repaired == 0
    first.transport.disallow_checkpoint()
    source.disallow_checkpoint()


# ------------------------------------------------------- a quorum within a step (DiLoCo without delay)


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "not verified"])
def test_what_a_hook_writes_past_autograd_is_never_a_second_moment(lanes: Lanes, verify: bool) -> None:
    """Two destinations, of which one dies; torchft restores parameters through ``.data`` then."""
    trained, gates, offered = Trained(1), [Gate(), Gate()], []
    source = lanes.transport(verify=verify, topology="star", **CALM)
    dying, living = (begun(lanes, source, gate, seed) for seed, gate in enumerate(gates, 2))

    def post_hook(*_: object) -> None:
        offered.append(digest(trained.state_dict()))
        source.send_checkpoint([1, 2], STEP, envelope(trained.state_dict()), TIMEOUT)
        trained.weight.data.zero_()

    trained.optimizer.register_step_post_hook(post_hook)
    step = threading.Thread(target=trained.optimizer.step)
    step.start()
    assert all(gate.reached.wait(20) for gate in gates)
    lanes.proxies[0].cut()
    gates[0].open()
    assert dying.join().error is not None
    assert step.is_alive()
    gates[1].open()
    assert got(living) == offered[0]
    step.join(20)
    assert not step.is_alive()
    assert not trained.weight.any()
    source.disallow_checkpoint()
    report = source.last_report
    assert report is not None
    assert sorted(peer.outcome == "complete" for peer in report.peers) == [False, True]


def test_what_a_hook_of_a_destination_writes_is_not_passed_on(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, behind, offers, ends = Trained(2), Gate(behind=5 * MIB), [], threading.Event()
    original = Relay.end_reading
    monkeypatch.setattr(Relay, "end_reading", lambda relay: (ends.set(), original(relay))[1])

    def begin(first: Destination, metadata: str) -> None:
        def post_hook(*_: object) -> None:
            first._receive(lanes.proxy(metadata, behind).metadata, STEP, TIMEOUT)
            offers.append(digest(first.result["user"]["default"]))
            trained.weight.data.zero_()

        trained.optimizer.register_step_post_hook(post_hook)
        threads.append(threading.Thread(target=trained.optimizer.step))
        threads[0].start()

    threads: list[threading.Thread] = []
    source, first, second, gate, offered = chain_of_two(lanes, trained, begin)
    assert behind.reached.wait(20)
    second.start(source.metadata())
    assert gate.reached.wait(20)
    behind.open()
    assert ends.wait(10)
    assert not offers
    gate.open()
    assert got(second) == offered
    threads[0].join(20)
    assert not threads[0].is_alive()
    assert offers == [offered]
    assert not trained.weight.any()
    first.transport.disallow_checkpoint()
    source.disallow_checkpoint()


# --------------------------------------------------------------------------------------- over a group


class Gated:
    """A channel in memory whose messages behind the first wait until the gate is open."""

    def __init__(self, channel: Any) -> None:
        self._channel, self.reached, self.opened = channel, threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def send(self, tensor: torch.Tensor, tag: int) -> Pending:
        if tag > FIRST_MESSAGE_TAG:
            self.reached.set()
            assert self.opened.wait(20)
        pending: Pending = self._channel.send(tensor, tag)
        return pending


def over_memory(monkeypatch: pytest.MonkeyPatch, channels: dict[int, Any]) -> PGTransport[Any]:
    group: Any = SimpleNamespace(size=lambda: 1 + len(channels), _rank=0)
    transport: PGTransport[Any] = PGTransport(group, TIMEOUT, CPU)
    monkeypatch.setattr(transport, "_channel", lambda rank, lock=None: channels[rank])
    return transport


def test_a_step_waits_for_a_send_over_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under async quorum the call is in another thread."""
    trained = Trained(1)
    offered, before = digest(trained.state_dict()), trained.weight.detach().clone()
    near, far = memory_channels()
    gated = Gated(near)
    transport = over_memory(monkeypatch, {1: gated})
    results: list[Any] = []

    def run_destination() -> None:
        report = TransferReport("destination", "test", STEP, [PeerReport(0)])
        results.append(receive(far, STEP, None, Options(CPU), Deadline(TIMEOUT), report)[0])

    threads = [
        threading.Thread(target=run_destination),
        threading.Thread(target=transport.send_checkpoint, args=([1], STEP, envelope(trained.state_dict()), TIMEOUT)),
    ]
    for thread in threads:
        thread.start()
    assert gated.reached.wait(20)
    step = Step(monkeypatch, trained.optimizer, Reading, "await_release")
    assert torch.equal(trained.weight, before)
    gated.opened.set()
    for thread in threads:
        thread.join(20)
    step.join()
    assert not torch.equal(trained.weight, before)
    report = transport.last_report
    assert report is not None
    assert report.complete, report.error
    assert digest(results[0]["user"]["default"]) == offered


def test_a_send_to_nobody_over_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    transport = over_memory(monkeypatch, {})
    transport.send_checkpoint([], STEP, {"weight": torch.ones(3)}, TIMEOUT)
    report = transport.last_report
    assert report is not None
    assert report.complete
