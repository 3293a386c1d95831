"""Threads that are over when the call is, Ctrl-C or not."""

from __future__ import annotations

import signal
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest

from ft_transport._threads import ThreadGroup, Ticker


@contextmanager
def interrupted(*seconds: float) -> Iterator[None]:
    """Ctrl-C, so many seconds from now, and again so many later."""
    rest = list(seconds)

    def interrupt(*_: object) -> None:
        if rest:
            signal.setitimer(signal.ITIMER_REAL, rest.pop(0))
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, rest.pop(0))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_join_that_is_interrupted_waits_all_the_same() -> None:
    group, go_on, over = ThreadGroup(), threading.Event(), []
    for number in range(3):
        group.start("test", lambda number: go_on.wait(10) and over.append(number), number)
    threading.Timer(0.3, go_on.set).start()
    with interrupted(0.05, 0.05), pytest.raises(KeyboardInterrupt):
        group.join()
    assert sorted(over) == [0, 1, 2]
    group.join()
    assert not any(thread.name == "ft_transport-test" for thread in threading.enumerate())


def test_attending_can_be_interrupted() -> None:
    group, go_on = ThreadGroup(), threading.Event()
    group.start("test", go_on.wait, 10)
    with interrupted(0.05), pytest.raises(KeyboardInterrupt):
        group.attend()
    go_on.set()
    group.join()


def test_a_thread_that_was_being_started_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    over: list[int] = []
    start = threading.Thread.start

    def start_and_interrupt(self: threading.Thread) -> None:
        start(self)
        raise KeyboardInterrupt

    group, go_on = ThreadGroup(), threading.Event()
    monkeypatch.setattr(threading.Thread, "start", start_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        group.start("test", lambda: go_on.wait(10) and over.append(1))
    monkeypatch.undo()
    threading.Timer(0.1, go_on.set).start()
    group.join()
    assert over == [1]


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), KeyboardInterrupt()])
def test_a_thread_that_never_was_is_not_waited_for(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        raise error

    group = ThreadGroup()
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(type(error)):
        group.start("test", lambda: None)
    monkeypatch.undo()
    group.join()


def test_one_of_them_waits_for_the_others() -> None:
    group, seen, go_on = ThreadGroup(), [], threading.Event()
    group.start("test", lambda: go_on.wait(10) and seen.append(1))
    group.start("test", lambda: group.join() or seen.append(2))  # type: ignore[func-returns-value]
    go_on.set()
    group.join()
    assert seen == [1, 2]


def test_what_a_thread_raises_does_not_keep_others_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    group = ThreadGroup()
    group.start("test", lambda: 1 / 0)
    group.join()


def test_a_ticker_calls_within_its_blocks_alone() -> None:
    calls, during = [], threading.Event()

    def call() -> None:
        calls.append(threading.get_ident())
        during.set()

    ticker = Ticker(call, timedelta(milliseconds=1), "test")
    for _ in range(2):
        during.clear()
        with ticker:
            assert during.wait(10)
        before = len(calls)
        assert not threading.Event().wait(0.02)
        assert len(calls) == before
    ticker.end()
    ticker.end()
    assert len({*calls}) == 1, "from one thread"
    assert not any(thread.name == "ft_transport-test" for thread in threading.enumerate())


def test_a_block_is_not_left_while_a_ticker_calls() -> None:
    begun, over = threading.Event(), []

    def call() -> bool:
        begun.set()
        over.append(threading.Event().wait(0.1))
        return True

    ticker = Ticker(call, timedelta(milliseconds=1), "test")
    with interrupted(0.03), pytest.raises(KeyboardInterrupt), ticker:
        assert begun.wait(10)
    assert over == [False]
    ticker.end()


def test_a_ticker_whose_thread_was_being_started_is_in_no_block(monkeypatch: pytest.MonkeyPatch) -> None:
    called, start = threading.Event(), threading.Thread.start

    def start_and_interrupt(self: threading.Thread) -> None:
        start(self)
        raise KeyboardInterrupt

    ticker = Ticker(called.set, timedelta(milliseconds=1), "test")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_and_interrupt)
        with pytest.raises(KeyboardInterrupt), ticker:
            pytest.fail("no block was begun")
    assert not called.wait(0.05)
    ticker.end()
    assert not any(thread.name == "ft_transport-test" for thread in threading.enumerate())


def test_a_ticker_that_is_over_holds_nothing() -> None:
    class Holder:
        def __init__(self) -> None:
            self.ticker = Ticker(self.call, timedelta(seconds=10), "test")

        def call(self) -> None:
            pass

    holder = Holder()
    with holder.ticker:
        pass
    holder.ticker.end()
    known = weakref.ref(holder)
    del holder
    assert known() is None, "without the collector"
