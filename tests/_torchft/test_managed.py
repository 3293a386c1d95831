"""What both torchft transports share, with a receive that is made up: no group, no socket, no Manager."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
from helpers import CPU

from _torchft.test_manager import called_by
from ft_transport import LocalProtocolError, TornStateError
from ft_transport._options import Options
from ft_transport._plan.rewrite import Received
from ft_transport._torchft.managed import ManagedTransport

TIMEOUT = timedelta(seconds=5)


class Manager:
    """What is read of one."""

    _use_async_quorum = True
    error: Exception | None = None

    def errored(self) -> Exception | None:
        return self.error


class Settled:
    """Stands for what is kept of a receive; says when it was written again."""

    def __init__(self, order: list[str], lost: list[str] | None = None) -> None:
        self._order, self._lost = order, lost

    def watch(self, settle: Any) -> None:
        self._order.append("watched")

    def write(self) -> list[str]:
        self._order.append("written")
        if self._lost is None:
            raise ArithmeticError("on purpose")
        return self._lost


class Made(ManagedTransport[Any]):
    """Receives what it is given."""

    def __init__(self, state_dict: Any, *, rewrite: Any = None) -> None:
        super().__init__(Options(CPU), state_dict, TIMEOUT)
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.trained: list[bool] = []
        self._arriving = rewrite

    def _receive(
        self, report: Any, src_rank: int, metadata: str, deadline: Any, attempt: Any, trains: bool
    ) -> Received:
        self.trained.append(trains)
        template = self._template()
        return Received(None if template is None else template(), [self.weight], self._arriving)

    def metadata(self) -> str:
        self._begin_quorum()
        return "made"

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: Any, timeout: timedelta) -> None:
        raise NotImplementedError

    def disallow_checkpoint(self) -> None:
        self._before_step()

    def heal(self) -> object:
        self.metadata()
        return self.recv_checkpoint(0, "made", 7, TIMEOUT)


def test_the_template_is_asked_for_in_each_receive_until_it_was_captured() -> None:
    given: list[int] = []
    made = Made(lambda: given.append(1) or len(given))  # type: ignore[func-returns-value]
    assert [made.heal(), made.heal()] == [1, 2]
    made.capture_template()
    assert [made.heal(), made.heal()] == [3, 3]


@pytest.mark.parametrize("call", [Made.capture_template, Made.state_digest])
def test_without_a_function_there_is_nothing_to_ask(call: Any) -> None:
    with pytest.raises(ValueError, match="state_dict: expected one"):
        call(Made(None))


def test_a_word_that_means_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a function or 'manager', got 'default'"):
        Made("default")


def test_the_managers_state_needs_a_manager() -> None:
    with pytest.raises(LocalProtocolError, match="state_dict='manager': expected to be called by a Manager"):
        Made("manager").heal()


def test_before_the_step_it_is_written_again_and_only_then_autograd_is_told() -> None:
    order: list[str] = []
    made = Made(None, rewrite=Settled(order, []))
    made.heal()
    version = made.weight._version
    assert (order, version) == (["watched"], 0)
    made.disallow_checkpoint()
    assert order == ["watched", "written"]
    assert made.weight._version > version
    made.disallow_checkpoint()
    assert order == ["watched", "written"], "once for each receive"


@pytest.mark.parametrize("lost", [["norm.mean"], None], ids=["some leaves", "nobody knows"])
def test_what_cannot_be_written_again_stops_the_replica_by_name(lost: list[str] | None) -> None:
    made = Made(None, rewrite=Settled([], lost))
    made.heal()
    with pytest.raises(TornStateError, match=r"norm\.mean" if lost else r"an unknown part of the state \(on purpose\)"):
        made.disallow_checkpoint()
    assert made.torn
    made.mark_restored()
    made.disallow_checkpoint()


def test_a_torn_replica_whose_step_has_failed_already_is_not_stopped() -> None:
    """A group that could not be configured: no heal was tried, and the Manager has voted against the step."""
    made = Made(None, rewrite=Settled([], ["norm.mean"]))
    made._guard._tear("a receive broke off", set())
    manager = Manager()
    manager.error = RuntimeError("the group could not be configured")
    called_by(manager, made.metadata)
    called_by(manager, made.disallow_checkpoint)
    manager.error = None
    called_by(manager, made.metadata)
    with pytest.raises(TornStateError, match="nobody was left to heal it"):
        called_by(manager, made.disallow_checkpoint)


def test_who_has_no_manager_goes_on_training() -> None:
    made = Made(None)
    made.heal()
    assert made.trained == [True]
