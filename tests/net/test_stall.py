"""How long a call may go on, on a clock that stands still until a test moves it."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest

from ft_transport._deadline import Deadline
from ft_transport._net.stall import Patience, Silence
from ft_transport.errors import PeerFailure, TransferTimeout


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "monotonic", made)
    return made


def patience(seconds: float = 60, silence: float | None = 5) -> Patience:
    return Patience(
        Deadline(timedelta(seconds=seconds)), None if silence is None else timedelta(seconds=silence), "the source"
    )


def test_silence_ends_a_call_long_before_its_deadline(clock: Clock) -> None:
    """TCP says nothing of a machine without power for minutes."""
    call = patience()
    clock.now += 4.9
    call.check()
    clock.now += 0.2
    with pytest.raises(Silence, match="the source has been silent for 5 s"):
        call.check()


def test_whatever_moves_begins_the_silence_anew(clock: Clock) -> None:
    call = patience()
    for _ in range(11):
        clock.now += 4.9
        call.moved()
        call.check()


def test_the_deadline_holds_whatever_moves(clock: Clock) -> None:
    call = patience(seconds=10)
    for _ in range(2):
        clock.now += 4.9
        call.moved()
        call.check()
    clock.now += 0.3
    call.moved()
    with pytest.raises(TransferTimeout, match="timed out after 10 s"):
        call.check()


def test_without_a_bound_for_silence_only_the_deadline_counts(clock: Clock) -> None:
    call = patience(silence=None)
    clock.now += 59
    call.moved()
    call.check()
    clock.now += 2
    with pytest.raises(TransferTimeout):
        call.check()


@pytest.mark.parametrize(
    ("after", "error"), [(0.0, PeerFailure), (6.0, PeerFailure), (61.0, TransferTimeout)], ids=["now", "silent", "late"]
)
def test_what_is_cancelled_says_so_unless_the_deadline_has_passed(
    clock: Clock, after: float, error: type[Exception]
) -> None:
    call = patience()
    assert not call.cancelled
    call.cancel("the step is over")
    assert call.cancelled
    clock.now += after
    with pytest.raises(error) as caught:
        call.check()
    assert type(caught.value) is error, "a silent peer is one to try again, a cancelled call is not"
