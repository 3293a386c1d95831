"""Calls of foreign code: in their order, each once, and nobody waits for one that takes its time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from datetime import timedelta

import pytest

from ft_transport._deadline import Deadline
from ft_transport._telemetry.teller import Teller

SOON = timedelta(milliseconds=10)
TIMEOUT = timedelta(seconds=10)


def telling() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ft_transport-telling"]


@pytest.fixture
def teller() -> Iterator[Teller]:
    teller = Teller()
    yield teller
    assert teller.drain(Deadline(TIMEOUT))
    assert not telling()


def test_calls_are_made_in_their_order_each_once(teller: Teller) -> None:
    go_on, made = threading.Event(), []
    teller.leave(lambda: made.append(go_on.wait(10)))
    for i in range(50):
        teller.leave(lambda i=i: made.append(i))  # type: ignore[misc]
    teller.call(lambda: made.append("last"))
    assert not teller.drain(Deadline(SOON))
    assert made == []
    assert len(telling()) == 1
    go_on.set()
    assert teller.drain(Deadline(TIMEOUT))
    assert made == [True, *range(50), "last"]


def test_a_call_alone_is_made_here_and_now(teller: Teller) -> None:
    made: list[object] = []
    teller.call(lambda: made.append(threading.current_thread()))
    assert made == [threading.current_thread()]


def test_what_a_call_leaves_is_called_after_it(teller: Teller) -> None:
    made: list[object] = []

    def outer() -> None:
        teller.leave(lambda: made.append("left"))
        teller.call(lambda: made.append("called"))
        made.append(teller.drain(Deadline(TIMEOUT)))  # itself it does not wait for

    teller.call(outer)
    assert teller.drain(Deadline(TIMEOUT))
    assert made == [False, "left", "called"]


def test_what_a_call_raises_is_logged_and_the_next_one_is_made(
    teller: Teller, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[object] = []

    def broken() -> None:
        raise ArithmeticError("on purpose")

    def leaving() -> None:
        raise SystemExit

    for call in (broken, leaving, lambda: made.append(1)):
        teller.leave(call)
    with caplog.at_level(logging.ERROR, "ft_transport"):
        assert teller.drain(Deadline(TIMEOUT))
    assert made == [1]
    assert "on purpose" in caplog.text


def test_ctrl_c_in_a_call_is_the_callers_and_the_next_one_is_made(teller: Teller) -> None:
    made: list[object] = []

    def interrupted() -> None:
        teller.leave(lambda: made.append(1))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teller.call(interrupted)
    assert teller.drain(Deadline(TIMEOUT))
    assert made == [1]


def test_without_a_thread_it_is_called_by_whoever_waits(teller: Teller, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []

    def unwilling(thread: threading.Thread) -> None:
        raise RuntimeError("no more threads")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", unwilling)
        teller.leave(lambda: made.append(1))
        assert made == []
        assert teller.drain(Deadline(TIMEOUT))
    assert made == [1]
