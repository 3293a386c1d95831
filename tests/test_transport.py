"""What is true of each call of a torchft transport, whatever it moves over."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CPU, noise, until
from plan.test_torn import Group, Pair

from ft_transport import LaneTransport, LocalProtocolError, PGTransport, TransferError, state_digest
from ft_transport._deadline import Deadline
from ft_transport._process import no_collection
from ft_transport._telemetry import progress
from ft_transport._telemetry.report import TransferReport
from ft_transport._transport import check_ranks
from ft_transport.testing import memory_channels

SECOND = timedelta(seconds=1)


@pytest.fixture(params=["group", "lanes"])
def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Makes a transport of each kind."""
    made: list[Any] = []

    def one(state_dict: Any = None, **options: Any) -> Any:
        if request.param == "lanes":
            made.append(LaneTransport(10 * SECOND, CPU, state_dict, host="127.0.0.1", **options))
        else:
            group: Any = Group(memory_channels()[0], 0)
            made.append(PGTransport(group, 10 * SECOND, CPU, state_dict, **options))
        return made[-1]

    yield one
    for transport in made:
        transport.shutdown()


def raised(call: Callable[[], object]) -> TransferError:
    with pytest.raises(TransferError) as caught:
        call()
    return caught.value


@pytest.mark.parametrize(
    "wrong",
    [
        {"timeout": timedelta(0)},
        {"timeout": -SECOND},
        {"state_dict": "trainer"},
        {"strict": True},
        {"on_mismatch": "ignore"},
    ],
    ids=str,
)
def test_arguments_that_cannot_be(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    arguments: dict[str, Any] = {"timeout": SECOND, "device": CPU, **wrong}
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        PGTransport(Group(None, 0), **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        LaneTransport(**arguments)


@pytest.mark.parametrize("wrong", [{"timeout": 20}, {"state_dict": {}}], ids=str)
def test_arguments_of_another_type_are_named(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    arguments: dict[str, Any] = {"timeout": SECOND, "device": CPU, **wrong}
    with pytest.raises(TypeError, match=f"^{name}: expected"):
        PGTransport(Group(None, 0), **arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=f"^{name}: expected"):
        LaneTransport(**arguments)


def test_arguments_of_the_other_transport_are_named() -> None:
    with pytest.raises(TypeError, match=r"^timeout: expected a datetime\.timedelta, got Group"):
        LaneTransport(Group(None, 0), SECOND, CPU)  # type: ignore[arg-type]


def test_before_the_first_transfer(make: Callable[..., Any]) -> None:
    transport = make()
    assert transport.last_report is None
    assert not transport.torn
    transport.metadata()
    transport.disallow_checkpoint()


def test_the_collector_is_held_back_in_a_call(make: Callable[..., Any]) -> None:
    seen: list[bool] = []
    transport = make()
    transport._options = replace(transport._options, on_phase=lambda *_: seen.append(gc.isenabled()))
    raised(lambda: transport.send_checkpoint([1], 5, {"a": threading.Lock()}, SECOND))
    transport.shutdown()
    assert seen
    assert not any(seen)
    assert gc.isenabled()


def test_the_collector_comes_again_in_a_call_that_lasts(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer's cycles may hold an accelerator's memory: they do not wait for what a transfer waits for."""
    monkeypatch.setattr(progress, "INTERVAL", timedelta(milliseconds=100))
    transport = make()
    report = TransferReport("source", "test", 5)
    with transport._transfer(report), transport._watching(report, Deadline(10 * SECOND)):
        assert not gc.isenabled()
        until(gc.isenabled)
        with no_collection():
            assert not gc.isenabled()
        assert gc.isenabled()
    assert gc.isenabled()


def test_whatever_is_raised_becomes_an_error_that_says_where(make: Callable[..., Any]) -> None:
    """torchft catches Exception, and logs it: the one line must be enough."""

    class Odd:
        def __reduce__(self) -> Any:
            raise KeyError("no such thing")

    events: list[dict[str, Any]] = []
    transport = make(on_event=events.append)
    error = raised(lambda: transport.send_checkpoint([1], 5, {"a": Odd()}, SECOND))
    assert isinstance(error, LocalProtocolError)
    assert "no such thing" in str(error)
    assert (error.step, error.phase, error.torn) == (5, "describe", False)
    transport.shutdown()
    report = transport.last_report
    assert not report.complete
    assert report.step == 5
    assert [(event["outcome"], event["step"], event["phase"]) for event in events] == [("failed", 5, "describe")]


def test_without_a_timeout_the_constructors_counts(make: Callable[..., Any]) -> None:
    """As in torchft's nightly, whose own transport takes None."""
    transport = make()
    assert transport._limit(None).timeout == 10 * SECOND
    assert transport._limit(SECOND).timeout == SECOND
    transport.send_checkpoint([], 5, {"w": noise(3, 1)})
    transport.disallow_checkpoint()
    assert transport.last_report.complete


def test_a_rank_named_twice(make: Callable[..., Any]) -> None:
    error = raised(lambda: make().send_checkpoint([1, 1], 5, {}, SECOND))
    assert "expected each once" in str(error)


def test_a_second_call_is_kept_out() -> None:
    """From the callback that gives the template, which is a call under way."""
    inner: list[TransferError] = []

    def template() -> Any:
        inner.append(raised(lambda: pair.destination.recv_checkpoint(0, "", 7, SECOND)))
        return {"w": noise(3, 2)}

    pair = Pair(None)
    pair.destination._state_dict = template
    errors = pair.heal({"w": noise(3, 1)})
    assert errors == [None, None]
    assert "one at a time" in str(inner[0])


def test_a_call_that_failed_lets_the_next_one_in() -> None:
    pair = Pair({"w": noise(3, 2)})
    raised(lambda: pair.source.send_checkpoint([5], 7, {}, SECOND))
    assert pair.heal({"w": noise(3, 1)}) == [None, None]
    assert pair.source.last_report is not None
    assert pair.source.last_report.complete


def test_modes_of_the_calling_thread_are_out_of_a_transfer_and_back_after_it() -> None:
    pair, state = Pair({"w": noise(3, 2)}), {"w": noise(3, 1)}
    with torch.device("meta"):
        assert pair.heal(state) == [None, None]
        assert torch.empty(1).is_meta


def test_a_captured_template_is_asked_for_once(make: Callable[..., Any]) -> None:
    asked: list[threading.Thread] = []
    state = {"w": noise(3, 1)}

    def template() -> object:
        asked.append(threading.current_thread())
        return state

    transport = make(template)
    transport.capture_template()
    assert asked == [threading.current_thread()]
    assert transport._template()() is state
    assert len(asked) == 1
    with pytest.raises(ValueError, match="state_dict: expected one"):
        make().capture_template()


def test_the_digest_of_what_the_function_gives(make: Callable[..., Any]) -> None:
    transport = make(lambda: {"w": noise(3, 1)})
    assert transport.state_digest() == state_digest({"w": noise(3, 1)})
    assert transport.state_digest({"w": noise(3, 2)}) != transport.state_digest()
    with pytest.raises(ValueError, match="state_dict: expected one"):
        make().state_digest()


@pytest.mark.parametrize("step", [None, "7", 1.5, -1, 1 << 63])
def test_what_is_no_step_is_named(make: Callable[..., Any], step: Any) -> None:
    transport = make()
    for call in (
        lambda: transport.send_checkpoint([1], step, {"w": noise(2, 1)}, SECOND),
        lambda: transport.recv_checkpoint(1, transport.metadata(), step, SECOND),
    ):
        with pytest.raises(LocalProtocolError, match=f"step: expected an int of 0 or more, got {step!r}"):
            call()
        assert transport.last_report.step == step


def test_ranks_of_peers() -> None:
    check_ranks([2, 0, np.int64(1)], 4, 3)
    check_ranks([70, 0])
    check_ranks([], 1, 0)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([1, 2, 1], r"ranks \[1, 2, 1\]: expected each once"),
        (["1"], "rank '1': expected an int, got str"),
        ([None], "rank None: expected an int, got NoneType"),
        ([1.0], "rank 1.0: expected an int, got float"),
        ([4], "rank 4: expected 0 to 3, the ranks of the group"),
        ([1, -1], "rank -1: expected 0 to 3, the ranks of the group"),
        ([3], "rank 3: expected another rank than this side's own"),
    ],
)
def test_ranks_that_cannot_be_of_peers(ranks: Any, message: str) -> None:
    with pytest.raises(LocalProtocolError, match=message):
        check_ranks(ranks, 4, 3)
