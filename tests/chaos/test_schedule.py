"""A schedule is a pure function of its seed, and aims at heals."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest

from .schedule import Plan, draw, spared

PLAN = Plan(seed=1, seconds=1800.0)


def test_the_same_seed_gives_the_same_schedule() -> None:
    assert draw(PLAN) == draw(Plan(seed=1, seconds=1800.0))
    assert draw(PLAN) != draw(Plan(seed=2, seconds=1800.0))


def test_a_seed_gives_the_same_schedule_in_every_version() -> None:
    """What a report says can be replayed later: the schedule of seed 1 is pinned."""
    text = "\n".join(map(str, draw(PLAN)))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "6d259eaa07dae4fa"


def test_a_longer_run_begins_as_a_shorter_one() -> None:
    short = draw(Plan(seed=1, seconds=60.0))
    assert draw(PLAN)[: len(short)] == short


@pytest.mark.parametrize("seed", range(5))
def test_half_an_hour_has_enough_faults_most_of_them_while_bytes_move(seed: int) -> None:
    faults = draw(Plan(seed=seed, seconds=1800.0))
    assert [fault.number for fault in faults] == list(range(len(faults)))
    assert [fault.at for fault in faults] == sorted(fault.at for fault in faults)
    kinds = Counter(fault.kind for fault in faults)
    assert kinds["kill"] + kinds["stop"] + kinds["stop and kill"] > 320
    assert set(kinds) == {"kill", "stop", "stop and kill", "cut one", "cut all"}
    assert Counter(fault.phase for fault in faults)["move"] > 0.75 * len(faults)
    assert {fault.role for fault in faults} == {"destination", "source", "bystander"}
    assert {fault.replica for fault in faults} == {0, 1, 2, 3}
    assert all(0 < fault.share < 1 for fault in faults)


def test_without_lanes_nothing_is_cut() -> None:
    assert not [fault for fault in draw(Plan(1, 1800.0, cuts=False)) if fault.kind.startswith("cut")]


def test_each_replica_is_spared_in_its_turn() -> None:
    assert [spared(PLAN, at) for at in (0.0, 449.0, 451.0, 1000.0, 1799.0, 1900.0)] == [1, 1, 2, 3, 0, 0]
    # In a short run, one for all of it.
    assert {spared(Plan(1, 40.0), at) for at in range(45)} == {1}
