"""What the demo concludes from its events; above all, that it does not pass when it should not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from recovery.cluster import Event
from recovery.story import Check, Story

DIGESTS = ("a" * 64, "a" * 64)
NBYTES = 1000


def told(
    digests: tuple[str, str] = DIGESTS,
    final_losses: tuple[float, float] = (1.0, 1.0),
    in_place_nbytes: int = NBYTES,
    same_addresses: bool = True,
    heals: bool = True,
    in_place: bool = True,
) -> Story:
    """Two replicas: 1 is killed after step 2 at 2.5 s, and heals with step 4; both end with step 6."""
    story = Story(num_replicas=2, num_kills=1, in_place=in_place)

    def happened(time: float, replica: int, incarnation: int, event: str, **fields: Any) -> None:
        story.apply(Event(time, replica, incarnation, event, fields))

    def committed(time: float, replica: int, step: int, loss: float | None) -> None:
        incarnation = int(replica == 1 and step > 2)
        happened(time, replica, incarnation, "committed", step=step, loss=loss, participants=2)

    for replica in (0, 1):
        happened(0.0, replica, 0, "started")
        happened(0.5, replica, 0, "ready")
        committed(1.0, replica, 1, 3.0)
        committed(2.0, replica, 2, 2.0)
    happened(2.5, 1, 0, "killed")
    happened(2.6, 1, 1, "started")
    happened(2.7, 1, 1, "interpreter")
    happened(3.6, 1, 1, "imported")
    committed(4.0, 0, 3, 2.0)
    happened(4.1, 1, 1, "ready")
    if heals:
        happened(4.2, 1, 1, "receiving", step=3)
        transfer = {"nbytes": NBYTES, "in_place_nbytes": in_place_nbytes, "seconds": 0.25, "report": None}
        happened(4.5, 1, 1, "received", step=3, **transfer)
        committed(5.0, 1, 4, None)
        happened(5.0, 1, 1, "healed", step=4, same_addresses=same_addresses)
    committed(5.0, 0, 4, 2.0)
    for replica in (0, 1) if heals else (0,):
        committed(6.0, replica, 5, final_losses[replica])
        committed(7.0, replica, 6, final_losses[replica])
        final = {"digest": digests[replica], "step": 6, "num_tensors": 3, "num_values": 2, "nbytes": NBYTES}
        happened(8.0, replica, int(replica == 1), "finished", **final)
    story.measure_pauses()
    return story


def passed(story: Story) -> list[bool | None]:
    """Healed, equal, in place, loss."""
    return [check.passed for check in story.checks()]


def test_all_checks_pass() -> None:
    assert passed(told()) == [True, True, True, True]


def test_durations_add_up() -> None:
    (recovery,) = told().recoveries
    durations = recovery.durations()
    assert durations.pop("total") == pytest.approx(2.5)
    assert sum(durations.values()) == pytest.approx(2.5)
    assert durations["transfer"] == pytest.approx(0.3)
    assert (recovery.killed_after_step, recovery.healed_at_step) == (2, 4)
    assert recovery.gigabytes_per_second == pytest.approx(NBYTES / 0.25 / 1e9)


def test_a_standby_had_everything_but_its_manager_before_the_kill() -> None:
    story = Story(num_replicas=2, num_kills=1, in_place=True)

    def happened(time: float, replica: int | None, incarnation: int, event: str, **fields: Any) -> None:
        story.apply(Event(time, replica, incarnation, event, fields))

    for replica in (0, 1):
        happened(0.0, replica, 0, "started")
        happened(1.0, replica, 0, "committed", step=1, loss=3.0, participants=2)
    assert not story.standby_waits
    for time, event in ((1.0, "started"), (1.1, "interpreter"), (2.0, "imported"), (2.2, "waiting")):
        happened(time, None, 0, event)
    assert story.standby_waits
    happened(3.0, 1, 0, "killed")
    happened(3.1, 1, 1, "handed_over")
    assert (story.rows[1].state, story.rows[1].incarnation, story.standby_waits) == ("starting", 1, False)
    happened(3.2, 1, 1, "ready")
    happened(3.3, 1, 1, "receiving", step=1)
    happened(3.5, 1, 1, "received", nbytes=NBYTES, in_place_nbytes=NBYTES, seconds=0.2, report=None)
    happened(3.6, 1, 1, "committed", step=2, loss=None, participants=2)
    happened(3.6, 1, 1, "healed", step=2, same_addresses=True)
    (recovery,) = story.recoveries
    durations = recovery.durations()
    assert recovery.standby
    assert (durations["interpreter"], durations["imports"]) == (0.0, 0.0)
    assert durations.pop("total") == pytest.approx(0.6) == sum(durations.values())
    (standby,) = story.standbys
    assert (standby.waiting, standby.handed_over, standby.replica) == (2.2, 3.1, 1)
    assert story.standby_share() is None  # nothing to compare with


def test_pauses_are_the_survivors() -> None:
    (recovery,) = told().recoveries
    assert recovery.pause_at_kill == pytest.approx(2.0)  # step 2 at 2.0 s, step 3 at 4.0 s
    assert recovery.pause_at_heal == pytest.approx(1.0)


def test_different_digests_fail() -> None:
    assert passed(told(digests=("a" * 64, "b" * 64))) == [True, False, True, True]


@pytest.mark.parametrize("arguments", [{"in_place_nbytes": NBYTES - 1}, {"same_addresses": False}])
def test_bytes_elsewhere_fail(arguments: dict[str, Any]) -> None:
    assert passed(told(**arguments)) == [True, True, False, True]


def test_in_place_is_not_judged_unless_asked_for() -> None:
    assert passed(told(in_place_nbytes=0, in_place=False)) == [True, True, None, True]


def test_a_loss_that_rises_fails() -> None:
    assert passed(told(final_losses=(4.0, 4.0))) == [True, True, True, False]


def test_a_replica_that_does_not_heal_fails() -> None:
    story = told(heals=False)
    assert passed(story)[:3] == [False, False, False]
    assert not story.healthy
    assert story.recoveries[0].durations() == {}


def test_a_dead_replica_stays_dead_whatever_it_had_still_sent() -> None:
    story = Story(num_replicas=2, num_kills=1, in_place=True)
    story.apply(Event(1.0, 1, 0, "committed", {"step": 1, "loss": 2.0, "participants": 2}))
    story.apply(Event(1.5, 1, 0, "killed"))
    story.apply(Event(1.4, 1, 0, "committed", {"step": 2, "loss": 1.5, "participants": 2}))
    assert story.rows[1].state == "dead"
    assert story.recoveries[0].killed_after_step == 2


def test_checks_say_what_was_measured() -> None:
    details: list[Check] = told().checks()
    assert "aaaaaaaaaaaa on all 2" in details[1].detail
    assert "100.0%" in details[2].detail
    assert "before the kill" in details[3].detail
