"""The line every few seconds: what it says of a transfer that moves, waits or stalls, and who writes it."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from ft_transport import progress_bar
from ft_transport._deadline import Deadline
from ft_transport._telemetry import progress
from ft_transport._telemetry.progress import Watch, watching
from ft_transport._telemetry.report import PeerReport, Progress, TransferReport

GB = 1_000_000_000


class Clock(Deadline):
    """A deadline of 60 s whose time the test sets."""

    def __init__(self) -> None:
        super().__init__(timedelta(seconds=60))
        self.now = 0.0

    def elapsed(self) -> float:
        return self.now

    def remaining(self) -> timedelta:
        return timedelta(seconds=60 - self.now)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, "ft_transport"):
        yield caplog


def receiving(phase: str = "move", total: int = 15 * GB) -> tuple[TransferReport, Clock, Watch]:
    report = TransferReport("destination", "LaneTransport", 120, [PeerReport(1, phase=phase)], nbytes_total=total)
    clock = Clock()
    return report, clock, Watch(report, clock)


def texts(lines: pytest.LogCaptureFixture) -> list[str]:
    return [f"{line.levelname} {line.getMessage()}" for line in lines.records]


def test_a_transfer_that_moves(lines: pytest.LogCaptureFixture) -> None:
    report, clock, watch = receiving()
    for now, done in ((1, 2 * GB), (4.9, 5 * GB), (5.0, 5 * GB), (6, 6 * GB), (10.0, 12 * GB)):
        clock.now, report.peers[0].nbytes = now, done
        watch.tick()
    assert texts(lines) == [
        "INFO step 120 from rank 1: 5.0 of 15.0 GB, 1.00 GB/s, 10 s left",
        "INFO step 120 from rank 1: 12.0 of 15.0 GB, 1.40 GB/s, 2 s left",
    ]
    event: dict[str, Any] = lines.records[1].ft_transport  # type: ignore[attr-defined]
    assert (event["event"], event["role"], event["step"]) == ("ft_transport.progress", "destination", 120)
    assert (event["nbytes_done"], event["nbytes_total"], event["peer_rank"]) == (12 * GB, 15 * GB, 1)
    assert event["gigabytes_per_second"] == pytest.approx(1.4)
    assert event["seconds_left"] == pytest.approx(3 / 1.4)
    assert (event["seconds"], event["seconds_stalled"], event["seconds_to_deadline"]) == (10.0, 0.0, 50.0)


def test_a_transfer_that_stalls_and_goes_on(lines: pytest.LogCaptureFixture) -> None:
    report, clock, watch = receiving()
    report.peers[0].address = "10.0.0.7"
    for now, done in ((5, 5 * GB), (10, 5 * GB), (15, 5 * GB), (20, 10 * GB)):
        clock.now, report.peers[0].nbytes = now, done
        watch.tick()
    prefix = "step 120 from rank 1 at 10.0.0.7: "
    assert texts(lines) == [
        f"INFO {prefix}5.0 of 15.0 GB, 1.00 GB/s, 10 s left",
        f"WARNING {prefix}5.0 of 15.0 GB, nothing has moved for 5 s, 50 s to the deadline",
        f"WARNING {prefix}5.0 of 15.0 GB, nothing has moved for 10 s, 45 s to the deadline",
        f"INFO {prefix}10.0 of 15.0 GB, 1.00 GB/s, 5 s left",
    ]


def test_a_transfer_that_has_not_begun_to_move_or_is_past_it(lines: pytest.LogCaptureFixture) -> None:
    report, clock, watch = receiving("agree", 0)
    clock.now = 5
    watch.tick()
    report.nbytes_total, report.peers[0].phase, report.nbytes_kept = 20_000_000, "rebuild", 5_000_000
    report.peers[0].nbytes, clock.now = 15_000_000, 10
    watch.tick()
    assert texts(lines) == [
        "INFO step 120 from rank 1: 0.0 of 0.0 MB, in phase agree for 5 s, 55 s to the deadline",
        "INFO step 120 from rank 1: 20.0 of 20.0 MB, in phase rebuild for 0 s, 50 s to the deadline",
    ]


def test_a_source_whose_destination_has_not_come(lines: pytest.LogCaptureFixture) -> None:
    report = TransferReport("source", "LaneTransport", 7, [PeerReport(1)], nbytes_total=GB)
    clock = Clock()
    watch = Watch(report, clock)
    clock.now = 5
    watch.tick()
    report.num_leaves, clock.now = 3, 10
    watch.tick()
    assert texts(lines) == [
        "INFO step 7 to rank 1: 0.0 of 1.0 GB, in phase describe for 5 s, 55 s to the deadline",
        "INFO step 7 to rank 1: it has not come yet, after 10 s; 50 s to the deadline",
    ]


def test_a_source_has_a_line_for_each_that_is_not_served_yet(lines: pytest.LogCaptureFixture) -> None:
    report = TransferReport("source", "PGTransport", None, nbytes_total=GB)
    report.peers = [PeerReport(1, "complete"), PeerReport(2, phase="move", nbytes=GB // 2), PeerReport(3, "dead")]
    clock = Clock()
    watch = Watch(report, clock)
    clock.now = 5
    watch.tick()
    assert texts(lines) == ["INFO to rank 2: 0.5 of 1.0 GB, 0.10 GB/s, 5 s left"]


def test_a_short_transfer_has_no_line_and_leaves_no_thread(lines: pytest.LogCaptureFixture) -> None:
    before = threading.active_count()
    with watching(TransferReport("source", "x", 1, [PeerReport(1)]), Deadline(timedelta(seconds=60))):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    assert texts(lines) == []


def test_one_that_is_stuck_in_a_call_has_lines_all_the_same(
    monkeypatch: pytest.MonkeyPatch, lines: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "INTERVAL", timedelta(milliseconds=20))
    report = TransferReport("source", "x", 1, [PeerReport(1, phase="move")], nbytes_total=8)
    stuck = threading.Event()

    class Seen(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if len(lines.records) >= 3:
                stuck.set()

    handler, logger = Seen(), logging.getLogger("ft_transport")
    logger.addHandler(handler)
    try:
        with watching(report, Deadline(timedelta(seconds=60))):
            assert stuck.wait(30)
    finally:
        logger.removeHandler(handler)
    assert "nothing has moved for" in lines.records[-1].getMessage()


def test_no_more_threads_cost_the_lines_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with watching(TransferReport("source", "x", 1), Deadline(timedelta(seconds=60))):
        pass


def test_what_a_transfer_raises_comes_through() -> None:
    with (
        pytest.raises(ValueError, match="inside"),
        watching(TransferReport("source", "x", 1), Deadline(timedelta(seconds=60))),
    ):
        raise ValueError("inside")


def test_the_bar() -> None:
    screen = io.StringIO()
    show = progress_bar(file=screen, mininterval=0, ncols=80)
    for done in (0, 40, 100):
        show(Progress("destination", 7, 1, done, 100))
    show(Progress("source", None, 2, 50, 100))
    show(Progress("source", None, 2, 10, 100))  # a new transfer: this one broke
    show(Progress("source", None, 2, 100, 100))
    text = screen.getvalue()
    assert "step 7 from rank 1: 100%" in text
    assert "to rank 2:  10%" in text
    assert "to rank 2: 100%" in text


def test_a_bar_for_each_of_several_destinations_without_ranks() -> None:
    screen = io.StringIO()
    show = progress_bar(file=screen, mininterval=0, ncols=80)
    for name, done in (("one", 60), ("other", 30), ("one", 100), ("other", 100)):
        show(Progress("source", 7, -1, done, 100, name))
    text = screen.getvalue()
    assert "step 7 to one: 100%" in text
    assert "step 7 to other: 100%" in text
    assert "-1" not in text
