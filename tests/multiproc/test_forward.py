"""Forward and backward run at the replica that heals, as torchft has it by default: what is committed is what was sent.

Two replicas under a real Lighthouse and real Managers, each a thread of this process: one at step 10, one at step 5,
whose forward writes (BatchNorm's statistics, the vectors of spectral norm, a history of maxima) before its state lands,
while it does, and afterwards. What each torchft transport leaves behind is compared with the same line.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, cast

import pytest
import torch
from torch.distributed import TCPStore
from torchft.checkpointing.http_transport import HTTPTransport
from torchft.coordination import LighthouseServer
from torchft.process_group import ProcessGroupGloo

from ft_transport import LaneTransport, PGTransport

from .harness import digest, new_manager, wait_for_heartbeat

AHEAD, BEHIND = 10, 5
TIMEOUT = timedelta(seconds=30)
TRANSFER_TIMEOUT = timedelta(seconds=20)
CPU = torch.device("cpu")

# torchft's own, in a quorum's thread, where an error would be the step's.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning"),
]


class Layer(torch.nn.Module):
    """What forward writes to, in the ways in which modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(16, 16))
        self.norm = torch.nn.BatchNorm1d(16)
        self.maxima = torch.nn.Buffer(torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.maxima.copy_(self.maxima.roll(1))
        self.maxima[0] = x.detach().abs().max()
        y: torch.Tensor = self.norm(self.linear(x))
        return y


class Replica:
    """A model, its optimizer, a Manager at a step."""

    def __init__(
        self, kind: str, lighthouse: str, number: int, step: int, *, async_quorum: bool, **options: Any
    ) -> None:
        options.setdefault("state_dict", self.state_dict)
        torch.manual_seed(number)
        self.model = torch.nn.Sequential(Layer(), Layer())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.batch = torch.randn(32, 16)
        self.forward()  # an optimizer that has not stepped has no state to land in
        self.optimizer.step()
        self.store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self.async_quorum = async_quorum
        group = ProcessGroupGloo(timeout=TIMEOUT)
        self.transport: Any = {
            "group": lambda: PGTransport(group, TRANSFER_TIMEOUT, CPU, **options),
            "lanes": lambda: LaneTransport(TRANSFER_TIMEOUT, CPU, **options),
            "http": lambda: HTTPTransport(TRANSFER_TIMEOUT, num_chunks=0),
        }[kind]()
        self.manager = new_manager(
            lighthouse,
            self.store.port,
            f"replica_{number}",
            TIMEOUT,
            pg=group,
            load_state_dict=self.load_state_dict,
            state_dict=self.state_dict,
            use_async_quorum=async_quorum,
            quorum_timeout=TIMEOUT,
            checkpoint_transport=self.transport,
        )
        self.manager.load_state_dict({"step": step, "batches_committed": step})
        wait_for_heartbeat(lighthouse, self.manager)

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def forward(self) -> None:
        self.optimizer.zero_grad()
        self.model(self.batch).square().sum().backward()

    def step(self) -> dict[str, Any]:
        """One step, up to the moment when the optimizer may step; gives the state then."""
        self.manager.start_quorum()
        for _ in range(3):
            self.forward()
        self.manager.wait_quorum()
        for _ in range(2):
            self.forward()
        for parameter in self.model.parameters():
            assert parameter.grad is not None
            self.manager.allreduce(parameter.grad).wait()
        assert self.manager.should_commit()
        return copy.deepcopy(self.state_dict())

    def serve(self) -> None:
        """A step of a source whose forward waits, so that there is no question of what was sent."""
        self.manager.start_quorum()
        self.manager.wait_quorum()
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
            self.manager.allreduce(parameter.grad).wait()
        assert self.manager.should_commit()

    def shutdown(self) -> None:
        self.manager.shutdown()
        if isinstance(self.transport, HTTPTransport):
            # Its own shutdown stops the server and leaves the port open.
            self.transport.shutdown(wait=True)
            self.transport._server.server_close()


@pytest.fixture
def lighthouse() -> Iterator[str]:
    server = LighthouseServer(bind="[::]:0", min_replicas=2, join_timeout_ms=60_000)
    try:
        yield server.address()
    finally:
        server.shutdown()


def heal(
    kind: str, lighthouse: str, *, async_quorum: bool, **options: Any
) -> tuple[Replica, dict[str, Any], dict[str, Any]]:
    """The replica that was healed, its state when its optimizer could have stepped, and what it had been sent."""
    source = Replica(kind, lighthouse, 0, AHEAD, async_quorum=async_quorum)
    healed = Replica(kind, lighthouse, 1, BEHIND, async_quorum=async_quorum, **options)
    try:
        sent = copy.deepcopy(source.state_dict())
        serving = threading.Thread(target=source.serve)
        serving.start()
        try:
            state = healed.step()
        finally:
            serving.join(TIMEOUT.total_seconds())
        assert not serving.is_alive()
        assert healed.manager.current_step() == AHEAD + 1
        return healed, state, sent
    finally:
        source.shutdown()
        healed.shutdown()


def after_forward(sent: dict[str, Any], healed: Replica) -> dict[str, Any]:
    """What five forwards make of the state that was sent."""
    healed.load_state_dict(copy.deepcopy(sent))
    for _ in range(5):
        healed.forward()
    return healed.state_dict()


@pytest.mark.parametrize(
    ("kind", "options"),
    [("group", {}), ("lanes", {}), ("group", {"shadow": True}), ("lanes", {"shadow": True}), ("http", {})],
    ids=["group", "lanes", "group-shadow", "lanes-shadow", "torchft-http"],
)
@pytest.mark.parametrize("async_quorum", [True, False], ids=["async", "sync"])
def test_what_is_committed_is_what_was_sent(
    lighthouse: str, kind: str, options: dict[str, Any], async_quorum: bool
) -> None:
    """Under a synchronous quorum forward follows the load: there its writes are training, and stay."""
    healed, state, sent = heal(kind, lighthouse, async_quorum=async_quorum, **options)
    assert digest(state) == digest(sent if async_quorum else after_forward(sent, healed))
    if kind != "http":
        report = healed.transport.last_report
        landed = report.nbytes_copied if options else report.nbytes_in_place
        assert landed == report.nbytes_total
        assert not healed.transport.torn


@pytest.mark.parametrize("kind", ["group", "lanes"])
def test_the_template_of_the_manager_has_every_key(lighthouse: str, kind: str) -> None:
    """What is registered later lands in place as well."""
    added = torch.zeros(1000)
    source = Replica(kind, lighthouse, 0, AHEAD, async_quorum=True)
    healed = Replica(kind, lighthouse, 1, BEHIND, async_quorum=True, state_dict="manager")
    try:
        source.manager.register_state_dict_fn("later", cast(Any, print), lambda: torch.ones(1000))
        healed.manager.register_state_dict_fn("later", cast(Any, added.copy_), lambda: added)
        serving = threading.Thread(target=source.serve)
        serving.start()
        try:
            healed.step()
        finally:
            serving.join(TIMEOUT.total_seconds())
        assert torch.equal(added, torch.ones(1000))
        report = healed.transport.last_report
        assert (report.in_place_share, report.unexpected_keys, report.missing_keys) == (1, [], [])
    finally:
        source.shutdown()
        healed.shutdown()
