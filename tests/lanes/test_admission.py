"""Which destinations a source lets in, and when there is nobody left to wait for; without sockets."""

from __future__ import annotations

from datetime import timedelta

import pytest

from ft_transport._deadline import Deadline
from ft_transport._lanes import admission
from ft_transport._lanes.admission import Admission
from ft_transport._telemetry.report import Outcome, PeerReport, TransferReport

STEP = 7


def made(num_expected: int) -> tuple[Admission, TransferReport]:
    report = TransferReport("source", "test", STEP, [PeerReport(rank) for rank in range(num_expected)])
    return Admission(report, STEP), report


def outcomes(report: TransferReport) -> list[Outcome]:
    return [peer.outcome for peer in report.peers]


@pytest.mark.parametrize(
    ("attempt", "step", "refusal"),
    [
        (1, STEP, None),
        (3, STEP, None),
        (1, STEP + 1, None),
        (1, STEP - 1, "expected step 6, source has step 7"),
        (0, STEP, "a later attempt has come before"),
        (0, STEP + 1, None),
    ],
    ids=["again", "a later attempt", "of a later step", "of an earlier step", "an earlier attempt", "both"],
)
def test_who_is_refused(attempt: int, step: int, refusal: str | None) -> None:
    found, _ = made(1)
    found.admit(b"a", 1)
    assert found.refusal(b"a", attempt, step) == refusal
    assert found.has_place(b"a", step) is (step <= STEP)


def test_so_many_at_once_and_who_is_served_takes_its_own_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "SPARE_DESTINATIONS", 1)
    found, report = made(1)
    first, second = found.admit(b"a", 1), found.admit(b"b", 1)
    assert [peer.rank for peer in report.peers] == [0, -1]
    assert not found.has_place(b"c", STEP)
    assert found.has_place(b"a", STEP)
    first.peer.outcome = "complete"
    assert found.has_place(b"c", STEP)
    assert second.peer.outcome == "pending"


def test_so_many_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "SPARE_CONVERSATIONS", 1)
    found, _ = made(1)
    for attempt in (1, 2):
        assert found.refusal(b"a", attempt, STEP) is None
        found.admit(b"a", attempt)
    assert found.refusal(b"b", 1, STEP) == "too many have come for this transfer"
    assert found.refusal(b"b", 1, STEP + 1) is None, "the next transfer has room"


def test_who_comes_again_has_one_line_in_the_report() -> None:
    found, report = made(2)
    earlier = found.admit(b"a", 1)
    again = found.admit(b"a", 2)
    assert again.peer is report.peers[0]
    assert again.peer is not earlier.peer
    assert again.peer.rank == earlier.peer.rank
    assert found.num_expected == 1


def test_it_is_over_once_nobody_is_expected_or_served() -> None:
    found, report = made(2)
    state = found.admit(b"a", 1)
    assert not found.settle(is_late=False)
    found.give_up("it has not come")
    assert outcomes(report) == ["pending", "timed out"]
    assert not found.settle(is_late=True)
    state.peer.outcome = "complete"
    assert found.settle(is_late=False)
    assert found.is_over
    assert not found.settle(is_late=False), "that is said once"
    assert not found.has_place(b"b", STEP)


def test_whoever_comes_is_served_until_it_is_given_up() -> None:
    found, report = made(0)
    assert found.is_open
    found.admit(b"a", 1).peer.outcome = "complete"
    assert not found.settle(is_late=True)
    found.give_up("")
    assert found.settle(is_late=False)
    assert outcomes(report) == ["complete"]


@pytest.mark.parametrize("because", ["late", "closing", "gone"])
def test_who_waits_for_a_place_is_waited_for(because: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "SPARE_DESTINATIONS", 0)
    monkeypatch.setattr(admission, "_CROWDED", timedelta(days=1))
    found, _ = made(1)
    found.admit(b"a", 1).peer.outcome = "pending"
    assert not found.has_place(b"b", STEP)
    found._known[b"a"].peer.outcome = "dead"
    assert not found.settle(is_late=False), "it is the turn of whoever waits"
    found.is_closing = because == "closing"
    if because == "gone":
        found._crowded = Deadline(timedelta(0))
    assert found.settle(is_late=because == "late")


def test_who_has_failed_already_is_not_called_late() -> None:
    found, report = made(1)
    report.peers[0].outcome = "failed"
    found.give_up("it has not come")
    assert outcomes(report) == ["failed"]
