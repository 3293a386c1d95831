"""How many lanes there are where the caller leaves that to us."""

from __future__ import annotations

import time

import pytest

from ft_transport._lanes.growth import MOST_LANES, LaneCount


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


class Path:
    """A path, and the lanes that are opened over it.

    Args:
        rates: Bytes a second with so many lanes; with more, what the last one has.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rates: dict[int, float], round_trip: float = 0.0) -> None:
        self._clock = Clock(monkeypatch)
        self._rates = rates
        self.count = LaneCount("auto", round_trip, is_local=False)
        self.nbytes = 0.0

    def run(self, seconds: float) -> list[int]:
        """Look every now and then; gives each number that there was."""
        found = [self.count.number]
        for _ in range(round(seconds / 0.05)):
            self._clock.now += 0.05
            fitting = [rate for lanes, rate in self._rates.items() if lanes <= self.count.number]
            self.nbytes += 0.05 * fitting[-1]
            if self.count.look(int(self.nbytes)):
                found.append(self.count.number)
        return found


def test_twice_as_many_as_long_as_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path(monkeypatch, {2: 1e9, 4: 1.9e9, 8: 3e9, 16: 3.1e9}).run(60) == [2, 4, 8, 16]


def test_no_more_once_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path(monkeypatch, {2: 1e8, 4: 1.1e8, 8: 9e8}).run(60) == [2, 4]


def test_what_is_over_soon_has_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path(monkeypatch, {2: 1e9}).run(0.6) == [2]


def test_a_path_that_stands_still_is_no_reason_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path(monkeypatch, {2: 0.0, 4: 1e9}).run(60) == [2]


@pytest.mark.parametrize(
    ("round_trip", "number"), [(0.0, 2), (0.0001, 2), (0.003, 2), (0.010, 6), (0.025, 15), (0.2, 16), (4.0, 16)]
)
def test_over_a_long_way_there_are_many_from_the_beginning(round_trip: float, number: int) -> None:
    assert LaneCount("auto", round_trip, is_local=False).number == number


def test_growth_ends_at_the_most_that_a_caller_may_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path(monkeypatch, {6: 1e8, 12: 3e8, 16: 9e8}, round_trip=0.01).run(60) == [6, 12, MOST_LANES]


@pytest.mark.parametrize(
    ("lane_bytes", "number"), [(0, 16), (8 << 20, 16), (16 << 20, 8), (32 << 20, 4), (256 << 20, 2)]
)
def test_buckets_of_all_lanes_together_are_bounded(lane_bytes: int, number: int) -> None:
    assert LaneCount("auto", 0.2, is_local=False, lane_bytes=lane_bytes).number == number
    assert LaneCount(16, 0.2, is_local=False, lane_bytes=lane_bytes).number == 16, "the caller has said so"


@pytest.mark.parametrize("chosen", [1, 5, 16])
def test_what_the_caller_has_chosen_stays(monkeypatch: pytest.MonkeyPatch, chosen: int) -> None:
    path = Path(monkeypatch, {1: 1e8, 2: 1e9, 16: 9e9})
    path.count = LaneCount(chosen, 0.2, is_local=False)
    assert path.run(60) == [chosen]


def test_within_a_machine_there_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(monkeypatch, {2: 1e8, 4: 9e8})
    path.count = LaneCount("auto", 0.0001, is_local=True)
    assert path.run(60) == [2]
