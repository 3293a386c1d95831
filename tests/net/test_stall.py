"""How long a call may go on, and what ends it."""

from __future__ import annotations

from datetime import timedelta

import pytest

from ft_transport._deadline import Deadline
from ft_transport._net.stall import PeerStalled, StallTimer
from ft_transport.errors import PeerFailure, TransferTimeout

PAST, LONG = timedelta(0), timedelta(days=1)


@pytest.mark.parametrize(
    ("deadline", "stall", "cancelled", "error", "text"),
    [
        (PAST, PAST, "shut down", TransferTimeout, "timed out after 0 s"),
        (PAST, None, "", TransferTimeout, "timed out after 0 s"),
        (LONG, PAST, "shut down", PeerFailure, "shut down"),
        (LONG, PAST, "", PeerStalled, "the source has been silent for 0 s"),
        (LONG, LONG, "", None, ""),
        (LONG, None, "", None, ""),
    ],
    ids=["all at once", "late", "cancelled", "silent", "well", "silent for as long as it likes"],
)
def test_what_ends_a_call(
    deadline: timedelta, stall: timedelta | None, cancelled: str, error: type[Exception] | None, text: str
) -> None:
    timer = StallTimer(Deadline(deadline), stall, "the source")
    if cancelled:
        timer.cancel(cancelled)
    assert timer.cancelled is bool(cancelled)
    if error is None:
        timer.check()
        return
    with pytest.raises(error, match=text) as info:
        timer.check()
    assert type(info.value) is error


def test_progress_ends_silence_and_nothing_else() -> None:
    timer = StallTimer(Deadline(LONG), timedelta(seconds=60))
    assert timer._silent is not None
    timer._silent.expire()
    with pytest.raises(PeerStalled):
        timer.check()
    timer.progressed()
    timer.check()
    timer.deadline.expire()
    timer.progressed()
    with pytest.raises(TransferTimeout):
        timer.check()
