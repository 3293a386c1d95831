"""What real transfers tell: one event each, and lines while they last, above all when nothing moves."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from corpus.wire import Plain, Torchft, Wire

from ft_transport import LocalProtocolError, PeerFailure, state_digest
from ft_transport._telemetry import progress

from .harness import wait_until
from .test_lanes import STEP, TIMEOUT, Lanes, envelope, lanes, make_state

__all__ = ["lanes"]  # the fixture

Event = dict[str, Any]


class Listener:
    """A callback that keeps its events, and does what else it is told to."""

    def __init__(self, then: Any = None) -> None:
        self.events: list[Event] = []
        self._then = then

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if self._then is not None:
            self._then()


@contextlib.contextmanager
def group_wire() -> Iterator[Torchft]:
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    with ThreadPoolExecutor(1, thread_name_prefix="destination") as helper:
        wire = Torchft(store, helper)
        try:
            yield wire
        finally:
            wire.close()


# ------------------------------------------------------------------------------------------- over lanes


def test_each_side_of_lanes_tells_once_and_before_the_state_may_change(lanes: Lanes) -> None:
    heard, told = Listener(), Listener()
    state = make_state()
    source = lanes.transport(on_event=told)
    destination = lanes.destination(make_state(2), on_event=heard).start(source.metadata())
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    destination.join()
    # Whenever training gets to the call below; and not at the deadline, when the listener would find it.
    wait_until(lambda: bool(told.events), TIMEOUT.total_seconds() / 2)
    source.disallow_checkpoint()
    destination.transport.disallow_checkpoint()
    (theirs,), (mine,) = heard.events, told.events
    assert (mine["role"], theirs["role"]) == ("source", "destination")
    for event in (mine, theirs):
        assert (event["event"], event["outcome"]) == ("ft_transport.transfer", "complete")
        assert (event["transport"], event["step"]) == ("LaneTransport", STEP)
        assert event["nbytes_moved"] == event["nbytes_total"] > 0
        assert event["seconds"] >= event["seconds_move"] > 0
    assert mine["seconds_describe"] > 0
    assert theirs["peers"][0]["address"] == "127.0.0.1"
    # The tensors of the template are the source's now; a number is the load function's to set.
    lines = destination.transport.state_digest().diff(source.state_digest(state))
    assert lines == ["lr: float 0.2 here, float 0.1 there"]
    with pytest.raises(ValueError, match="state_dict: expected one"):
        source.state_digest()


def test_listeners_that_raise_cost_no_transfer(lanes: Lanes, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> None:
        raise RuntimeError("on purpose")

    heard, told = Listener(broken), Listener(broken)
    state = make_state()
    source = lanes.transport(on_event=told)
    destination = lanes.destination(on_event=heard).start(source.metadata())
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    assert destination.join().sound(state)
    source.disallow_checkpoint()
    assert len(heard.events) == len(told.events) == 1
    assert caplog.text.count("the event callback raised") == 2


def test_a_listener_may_call_the_transport_back(lanes: Lanes) -> None:
    source = lanes.transport()
    source._options = source._options.__class__(
        **{**vars(source._options), "on_event": Listener(lambda: source.disallow_checkpoint())}
    )
    destination = lanes.destination().start(source.metadata())
    source.send_checkpoint([1], STEP, envelope(make_state()), TIMEOUT)
    destination.join()
    source.disallow_checkpoint()
    assert destination.error is None


def test_a_state_that_cannot_travel_is_told_once(lanes: Lanes) -> None:
    heard, told = Listener(), Listener()
    source = lanes.transport(on_event=told)
    destination = lanes.destination(on_event=heard).start(source.metadata())
    with pytest.raises(LocalProtocolError):
        source.send_checkpoint([1], STEP, envelope({"f": lambda: 1}), TIMEOUT)
    destination.join()
    source.disallow_checkpoint()
    assert isinstance(destination.error, PeerFailure)
    assert [event["error_type"] for event in told.events] == ["LocalProtocolError"]
    assert source.last_report is not None
    assert source.last_report.error.startswith("LocalProtocolError")
    assert [(event["error_type"], event["outcome"]) for event in heard.events] == [("PeerFailure", "failed")]


def test_a_destination_that_never_comes_is_told(lanes: Lanes) -> None:
    told = Listener()
    source = lanes.transport(on_event=told)
    source.send_checkpoint([1], STEP, envelope(make_state()), TIMEOUT)
    assert told.events == []
    source.disallow_checkpoint()
    (event,) = told.events
    assert (event["outcome"], event["num_peers_complete"]) == ("timed out", 0)
    assert "has not come" in event["reason"]


def test_an_offer_that_expires_is_told_by_the_time_the_state_may_change(lanes: Lanes) -> None:
    told = Listener()
    source = lanes.transport(on_event=told)
    source.send_checkpoint([1], STEP, envelope(make_state()), timedelta(milliseconds=300))
    wait_until(lambda: bool(told.events))  # by the listener, with nobody calling
    source.disallow_checkpoint()
    (event,) = told.events
    assert "timed out" in event["reason"]


def stalled(caplog: pytest.LogCaptureFixture, role: str) -> list[logging.LogRecord]:
    return [
        record
        for record in caplog.records
        if getattr(record, "ft_transport", {}).get("event") == "ft_transport.progress"
        and record.ft_transport["role"] == role  # type: ignore[attr-defined]
        and "nothing has moved for" in record.getMessage()
    ]


def test_a_heal_over_lanes_that_stalls_says_so_on_both_sides(
    lanes: Lanes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "INTERVAL", timedelta(milliseconds=300))
    go_on = threading.Event()

    def tamper(number: int, way: str, position: int, data: bytes) -> bytes:
        if number > 0 and way == "down" and position > 5 << 20:
            go_on.wait(30)
        return data

    state = make_state()
    patient = timedelta(seconds=20)
    source = lanes.transport(stall_timeout=patient)
    proxy = lanes.proxy(source.metadata(), tamper)
    destination = lanes.destination(make_state(2), lanes=1, stall_timeout=patient).start(proxy.metadata)
    try:
        with caplog.at_level(logging.INFO, "ft_transport"):
            source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
            wait_until(lambda: len(stalled(caplog, "source")) > 1 and len(stalled(caplog, "destination")) > 1)
    finally:
        go_on.set()
    assert destination.join().sound(state)
    source.disallow_checkpoint()
    for role, text in (("source", "step 7 to rank 1 at 127.0.0.1: "), ("destination", "step 7 from rank 0 at 127.0")):
        record = stalled(caplog, role)[-1]
        assert record.levelno == logging.WARNING
        assert record.getMessage().startswith(text)
        event = record.ft_transport  # type: ignore[attr-defined]
        assert 0 < event["nbytes_done"] < event["nbytes_total"]
        assert event["seconds_stalled"] > 0.2


# ----------------------------------------------------------------------------------------- over a group


def test_each_side_of_a_group_tells_once() -> None:
    heard = Listener()
    with group_wire() as wire:
        state, template = make_state(), make_state(2)
        outcome = wire.transfer(state, lambda: template, on_event=heard)
        outcome.check()
        (event,) = heard.events
        assert (event["transport"], event["role"], event["outcome"]) == ("PGTransport", "destination", "complete")
        assert event["in_place_share"] == 1.0
        assert state_digest(outcome.result) == state_digest(state)


def test_a_failed_receive_over_a_group_is_told_once() -> None:
    heard = Listener()
    with group_wire() as wire:
        template = {"large": torch.zeros(3)}
        outcome = wire.transfer({"large": torch.zeros(4)}, lambda: template, on_event=heard)
    assert outcome.error is not None
    (event,) = heard.events
    assert (event["outcome"], event["phase"], event["error_type"]) == ("refused", "agree", "RemoteProtocolError")
    assert "large" in event["reason"]


class Ends:
    """A leaf whose class ends the process when it is described."""

    def __reduce__(self) -> Any:
        raise SystemExit("enough")


@pytest.mark.parametrize("kind", [Torchft, Plain])
def test_a_leaf_that_ends_the_process_is_told_to_the_destinations(kind: type[Wire]) -> None:
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    with ThreadPoolExecutor(1, thread_name_prefix="destination") as helper:
        wire = kind(store, helper)
        groups = wire._groups = wire._connect()
        source, destination = (wire._make(group, None) for group in groups)
        received = helper.submit(wire._recv, destination)
        with pytest.raises(SystemExit, match="enough"):
            wire._send(source, {"leaf": Ends()})
        error = received.exception(10)
        wire.close()
    assert isinstance(error, PeerFailure)
    assert "SystemExit: enough" in str(error)


def test_a_group_where_everybody_is_in_a_call_says_so_on_both_sides(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "INTERVAL", timedelta(milliseconds=100))

    def lines(role: str) -> list[str]:
        events = [(record.getMessage(), getattr(record, "ft_transport", {})) for record in caplog.records]
        return [text for text, event in events if event.get("event") == progress.PROGRESS and event["role"] == role]

    def template() -> object:
        # The source waits in a call of Gloo for the answer, and this side's thread is here.
        wait_until(lambda: len(lines("source")) > 1 and len(lines("destination")) > 1)
        return make_state(2)

    with group_wire() as wire, caplog.at_level(logging.INFO, "ft_transport"):
        wire.transfer(make_state(), template).check()
    assert "step 7 to rank 1: 0.0 of " in lines("source")[0]
    assert "in phase agree" in lines("source")[0]
    assert lines("destination")[0].startswith("step 7 from rank 0: 0.0 of 0.0 MB, in phase agree for ")
    assert not [thread for thread in threading.enumerate() if "progress" in thread.name]
