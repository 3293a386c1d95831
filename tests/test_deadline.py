"""How much time is left, with the clock in the test's hand."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest

from ft_transport._deadline import MAX_WAIT, MIN_WAIT, Deadline, processor_seconds


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def test_it_runs_down(clock: Clock) -> None:
    deadline = Deadline(timedelta(seconds=10))
    assert deadline.remaining() == timedelta(seconds=10)
    assert not deadline.expired()
    clock.now += 4
    assert deadline.remaining() == timedelta(seconds=6)
    assert deadline.elapsed() == pytest.approx(4)
    clock.now += 6
    assert deadline.expired()
    assert deadline.timeout == timedelta(seconds=10)


def test_it_can_be_over_early(clock: Clock) -> None:
    deadline = Deadline(timedelta(seconds=10))
    clock.now += 4
    deadline.expire()
    assert deadline.expired()
    assert deadline.remaining() == MIN_WAIT
    assert deadline.elapsed() == pytest.approx(4)
    assert deadline.timeout == timedelta(seconds=10)
    clock.now += 20
    deadline.expire()
    assert deadline.expired()


def test_a_wait_is_never_zero_or_negative(clock: Clock) -> None:
    """To gloo that would mean the group's own time-out."""
    deadline = Deadline(timedelta(seconds=1))
    for step in (0.9995, 0.0005, 100.0):
        clock.now += step
        assert deadline.remaining() == MIN_WAIT == timedelta(milliseconds=1)


@pytest.mark.parametrize("timeout", [timedelta(0), timedelta(seconds=-5)])
def test_no_time_at_all(clock: Clock, timeout: timedelta) -> None:
    deadline = Deadline(timeout)
    assert deadline.expired()
    assert deadline.remaining() == MIN_WAIT


def test_the_clock_of_the_wall_does_not_matter(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    deadline = Deadline(timedelta(seconds=1))
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert deadline.remaining() == timedelta(seconds=1)


@pytest.mark.parametrize("timeout", [timedelta.max, timedelta(days=300 * 365)])
def test_what_is_too_long_for_the_system_is_long(clock: Clock, timeout: timedelta) -> None:
    deadline = Deadline(timeout)
    assert deadline.timeout == timeout
    assert deadline.remaining() == MAX_WAIT
    assert not deadline.expired()
    # Of all that waits, a poll takes the least: milliseconds in 32 bits.
    assert MAX_WAIT / timedelta(milliseconds=1) < 1 << 31
    assert MAX_WAIT.total_seconds() < threading.TIMEOUT_MAX


def test_what_a_thread_has_had_of_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "thread_time", lambda: 2.5)
    assert processor_seconds() == 2.5
