"""When a destination in a chain tries the source, and what it makes of what it has seen."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest

from ft_transport._lanes.probe import SourceProbe

SOON, LATER = timedelta(milliseconds=20), timedelta(seconds=60)


class Lanes:
    """What a trial sees of a ``Fetcher``."""

    def __init__(self, nbytes: int = 0, *, alive: bool = False) -> None:
        self.nbytes, self.alive, self.nbytes_wire, self.closed = nbytes, alive, 100, 0
        self.nbytes_direct = 40

    def close(self) -> None:
        self.closed += 1


def probe(lanes: Lanes, source: Lanes, interval: timedelta = SOON) -> tuple[SourceProbe, list[Lanes]]:
    begun: list[Any] = []

    def begin() -> Any:
        begun.append(source)
        return source

    return SourceProbe(lanes, begin, interval), begun  # type: ignore[arg-type]


def wait(interval: timedelta) -> None:
    threading.Event().wait(1.5 * interval.total_seconds())


def test_the_destination_before_is_left_alone_first() -> None:
    found, begun = probe(Lanes(), Lanes(), LATER)
    assert not found.look()
    assert begun == []


@pytest.mark.parametrize(("before", "source", "much_quicker"), [(0, 10**9, True), (10**9, 1, False), (0, 0, False)])
def test_speeds_are_compared_once_it_is_over(before: int, source: int, much_quicker: bool) -> None:
    lanes, tried = Lanes(), Lanes(alive=True)
    found, begun = probe(lanes, tried)
    wait(SOON)
    assert not found.look()
    assert begun == [tried]
    assert not found.look(), "it is still under way"
    lanes.nbytes, tried.nbytes, tried.alive = before, source, False
    assert found.look() is much_quicker
    assert tried.closed == 1
    assert (found.nbytes_wire, found.nbytes_direct) == (100, 40)


def test_what_had_landed_before_the_last_trial_does_not_count() -> None:
    lanes, tried = Lanes(10**12), Lanes(1000)
    found, _ = probe(lanes, tried)
    wait(SOON)
    found.look()
    assert found.look(), "since then nothing has come from the destination before"


def test_each_trial_that_changes_nothing_doubles_the_interval() -> None:
    interval = timedelta(milliseconds=200)
    found, begun = probe(Lanes(), Lanes(), interval)
    wait(interval)
    found.look()
    assert not found.look()
    wait(interval)
    assert not found.look()
    assert len(begun) == 1
    wait(interval)
    found.look()
    assert len(begun) == 2


def test_close_ends_what_is_under_way() -> None:
    tried = Lanes(alive=True)
    found, _ = probe(Lanes(), tried)
    wait(SOON)
    found.look()
    found.close()
    found.close()
    assert tried.closed == 1
