"""Memory of flights that is provided before they are posted."""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from ft_transport._deadline import Deadline
from ft_transport._group.ahead import Ahead
from ft_transport._threads import ThreadGroup
from ft_transport.errors import TransferTimeout

FLIGHTS = [range(2), range(2, 3), range(3, 6)]
SOON = timedelta(seconds=10)


class Landing:
    """Memory that is provided one message at a time, when it is let."""

    def __init__(self, *, has_pages: bool = True) -> None:
        self.has_pages = has_pages
        self.provided: list[int] = []
        self._let = threading.Semaphore(0)

    def let(self, messages: int) -> None:
        self._let.release(messages)

    def provide(self, message: int, *, ahead: bool) -> None:
        assert ahead, "by the time that bytes come, what was tried may be gone"
        assert self._let.acquire(timeout=10)
        self.provided.append(message)


def ahead(landing: Landing) -> Ahead:
    layout: Any = SimpleNamespace(flights=FLIGHTS)
    made = Ahead(layout, landing)  # type: ignore[arg-type]
    made.go_on(len(FLIGHTS))
    return made


def of_pages() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ft_transport-pages"]


def test_flights_are_there_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    landing = Landing()
    it = ahead(landing)
    it.start()
    assert len(of_pages()) == 1
    try:
        assert not it.is_there(0)
        landing.let(2)
        it.await_memory(0, Deadline(SOON))
        assert (it.is_there(0), it.is_there(1)) == (True, False)
        assert landing.provided == [0, 1]
        landing.let(4)
        it.await_memory(2, Deadline(SOON))
        assert landing.provided == [0, 1, 2, 3, 4, 5]
    finally:
        landing.let(6)
        it.close()
    assert of_pages() == []


def test_no_further_than_may_be_posted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    landing = Landing()
    it = ahead(landing)
    it.go_on(1)
    it.start()
    landing.let(6)
    it.await_memory(0, Deadline(SOON))
    with pytest.raises(TransferTimeout):
        it.await_memory(1, Deadline(timedelta(0)))
    assert sorted(landing.provided) == [0, 1]
    it.go_on(2)
    it.await_memory(1, Deadline(SOON))
    assert sorted(landing.provided) == [0, 1, 2]
    it.close()
    assert of_pages() == []


def test_no_more_threads_than_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    landing = Landing()
    it = ahead(landing)
    it.start()
    assert len(of_pages()) == 4
    landing.let(6)
    it.await_memory(2, Deadline(SOON))
    it.close()
    assert sorted(landing.provided) == [0, 1, 2, 3, 4, 5]
    assert of_pages() == []


def test_at_the_deadline() -> None:
    landing = Landing()
    it = ahead(landing)
    it.start()
    try:
        with pytest.raises(TransferTimeout, match="timed out after 0 s"):
            it.await_memory(0, Deadline(timedelta(0)))
    finally:
        landing.let(6)
        it.close()
    assert of_pages() == []


def test_the_end_does_not_wait_for_what_is_left() -> None:
    landing = Landing()
    it = ahead(landing)
    it.start()
    num_threads = len(of_pages())
    closing = threading.Thread(target=it.close)
    closing.start()
    while not it._closing:
        pass
    landing.let(num_threads)
    closing.join(10)
    assert not closing.is_alive()
    assert of_pages() == []
    assert len(landing.provided) == num_threads
    it.close()


def test_nothing_is_fresh() -> None:
    it = ahead(Landing(has_pages=False))
    it.start()
    assert of_pages() == []
    assert it.is_there(2)
    it.close()


@pytest.mark.parametrize("to_be_had", [0, 1])
def test_no_more_threads_are_to_be_had(monkeypatch: pytest.MonkeyPatch, to_be_had: int) -> None:
    """The state lands all the same."""
    start, left = ThreadGroup.start, [None] * to_be_had

    def refuse(self: ThreadGroup, *args: Any) -> None:
        if not left:
            raise RuntimeError("can't start new thread")
        left.pop()
        start(self, *args)

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(ThreadGroup, "start", refuse)
    landing = Landing()
    it = ahead(landing)
    it.start()
    landing.let(6)
    for flight in range(3):
        it.await_memory(flight, Deadline(SOON))
    it.close()
    assert len(landing.provided) == 6 * to_be_had


def test_never_begun() -> None:
    it = ahead(Landing())
    it.close()
    assert of_pages() == []
