"""What a source's transfer tells, and that nobody who serves waits for who is told; without threads."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from helpers import CPU

from ft_transport._deadline import Deadline
from ft_transport._lanes.news import News
from ft_transport._options import LaneOptions
from ft_transport._telemetry.report import PeerReport, Progress, TransferReport
from ft_transport.errors import LocalProtocolError

TOTAL = 1000


class Later:
    """A teller that tells when the test says so."""

    def __init__(self) -> None:
        self.left: list[Callable[[], None]] = []
        self.limits: list[Deadline] = []

    def leave(self, call: Callable[[], None]) -> None:
        self.left.append(call)

    def drain(self, limit: Deadline) -> None:
        self.limits.append(limit)

    def tell(self) -> None:
        left, self.left = self.left, []
        for call in left:
            call()


class Clock(Deadline):
    """A deadline whose time the test sets."""

    def __init__(self) -> None:
        super().__init__(timedelta(seconds=60))
        self.now = 0.0

    def elapsed(self) -> float:
        return self.now


class Transfer:
    """A transfer to two destinations, which have no ranks that anybody knows of."""

    def __init__(self, **options: Any) -> None:
        self.peers = [PeerReport(-1, phase="move", name="first"), PeerReport(-1, phase="move", name="second")]
        self.report = TransferReport("source", "test", 7, list(self.peers), nbytes_total=TOTAL)
        self.teller, self.clock = Later(), Clock()
        self.news = News(self.report, LaneOptions(CPU, **options), self.clock, self.teller)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("said", "told", "known"),
    [
        ([10], [10], 10),
        ([10, 10], [10], 10),
        ([0], [], 0),
        ([10, 20, 30], [30], 30),
        ([30, 20], [20], 20),
        ([TOTAL], [TOTAL], TOTAL),
        ([TOTAL + 1], [TOTAL], TOTAL),
        ([(1 << 64) - 1, TOTAL + 1], [TOTAL], TOTAL),
    ],
    ids=["once", "the same", "nothing", "the newest", "backwards", "all", "more than there is", "as much as fits"],
)
def test_progress(said: list[int], told: list[int], known: int) -> None:
    """A destination's word, which goes into sums and bars, and a callback that may be slower than it."""
    seen: list[Progress] = []
    it = Transfer(on_progress=seen.append)
    for nbytes in said:
        it.news.progress(it.peers[0], nbytes)
    assert seen == [], "the thread that serves has told it"
    it.teller.tell()
    assert seen == [Progress("source", 7, -1, nbytes, TOTAL, "first") for nbytes in told]
    assert it.peers[0].nbytes == known
    assert it.peers[1].nbytes == 0


def test_each_destination_is_told_of_whatever_its_rank() -> None:
    seen: list[Progress] = []
    it = Transfer(on_progress=seen.append)
    it.news.progress(it.peers[0], 10)
    it.news.progress(it.peers[1], 20)
    it.teller.tell()
    assert [now.nbytes_done for now in seen] == [10, 20]


def test_what_comes_while_it_is_told_is_told_next() -> None:
    seen: list[int] = []

    def slow(now: Progress) -> None:
        seen.append(now.nbytes_done)
        if len(seen) == 1:
            it.news.progress(it.peers[0], 20)
            it.news.progress(it.peers[0], 30)

    it = Transfer(on_progress=slow)
    it.news.progress(it.peers[0], 10)
    it.teller.tell()
    assert seen == [10]
    it.teller.tell()
    assert seen == [10, 30]
    assert it.teller.left == []


def test_without_a_callback_nothing_is_left_to_tell() -> None:
    it = Transfer()
    it.news.progress(it.peers[0], 10)
    assert it.peers[0].nbytes == 10
    assert it.teller.left == []


def test_who_is_not_let_in_has_a_line(caplog: pytest.LogCaptureFixture) -> None:
    it = Transfer()
    with caplog.at_level(logging.WARNING, "ft_transport"):
        it.news.refused("stranger", "10.0.0.9", "expected step 6")
        assert not caplog.records, "a handler may block, and the dispatcher's lock is held"
        it.teller.tell()
    assert caplog.messages == ["stranger at 10.0.0.9 is not served: expected step 6"]


def test_lines_are_written_when_they_are_due_each_once(caplog: pytest.LogCaptureFixture) -> None:
    it = Transfer()
    with caplog.at_level(logging.INFO, "ft_transport"):
        it.news.look()
        assert it.teller.left == [], "none is due"
        it.clock.now = 6
        it.news.look()
        it.news.look()
        assert len(it.teller.left) == 1, "the first is not written yet"
        assert not caplog.records
        it.teller.tell()
        assert len(caplog.records) == len(it.peers)
        it.news.look()
        assert it.teller.left == []
        it.clock.now = 12
        it.news.look()
        it.teller.tell()
    assert len(caplog.records) == 2 * len(it.peers)


@pytest.mark.parametrize("error", [None, LocalProtocolError("the state changed")], ids=["well", "with an error"])
def test_the_end_is_told_once_and_the_report_is_complete_before(error: LocalProtocolError | None) -> None:
    events: list[dict[str, Any]] = []
    it = Transfer(on_event=events.append)
    for peer in it.peers:
        peer.outcome = "complete"
    it.news.over(error)
    assert it.report.total_seconds > 0
    assert ("the state changed" in it.report.error) is (error is not None)
    assert events == [], "a callback may block, and the transfer's lock is held"
    it.news.over(LocalProtocolError("too late"))
    it.teller.tell()
    assert [event["error"] for event in events] == [it.report.error]
    assert "too late" not in it.report.error


def test_who_ends_a_transfer_waits_for_callbacks_for_a_moment_only() -> None:
    it = Transfer()
    it.news.drain()
    (limit,) = it.teller.limits
    assert timedelta(0) < limit.timeout <= timedelta(seconds=2)
