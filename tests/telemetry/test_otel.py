"""Spans and metrics of a finished transfer, told to providers that only take notes."""

from __future__ import annotations

import time
from typing import Any

import pytest

from ft_transport import TransferTimeout, transfer_event
from ft_transport._telemetry import otel
from ft_transport._telemetry.report import PHASES, PeerReport, TransferReport


class Span:
    def __init__(self, name: str, parent: Any, attributes: dict[str, Any], start_time: int) -> None:
        self.name = name
        self.parent = parent
        self.attributes = attributes
        self.start_time = start_time
        self.end_time = 0
        self.status: Any = None

    def set_status(self, status: Any) -> None:
        self.status = status

    def end(self, end_time: int) -> None:
        self.end_time = end_time


class Notes:
    """A tracer, and every instrument."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.counts: list[tuple[str, float, dict[str, Any]]] = []

    def start_span(self, name: str, context: Any = None, *, attributes: dict[str, Any], start_time: int) -> Span:
        self.spans.append(Span(name, context, attributes, start_time))
        return self.spans[-1]

    def instruments(self) -> Any:
        notes = self

        class Instrument:
            def __init__(self, name: str) -> None:
                self.name = name

            def add(self, value: float, marks: dict[str, Any]) -> None:
                notes.counts.append((self.name, value, marks))

            record = add

        return otel._Instruments(*map(Instrument, otel._Instruments._fields))

    def counted(self, name: str) -> list[tuple[float, dict[str, Any]]]:
        found = [(value, marks) for which, value, marks in self.counts if which == name]
        return [(value, {k.removeprefix("ft_transport."): v for k, v in marks.items()}) for value, marks in found]


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Notes:
    made = Notes()
    monkeypatch.setattr(otel.trace, "get_tracer", lambda *_: made)
    monkeypatch.setattr(otel.trace, "set_span_in_context", lambda span: span)
    monkeypatch.setattr(otel, "_instruments", made.instruments)
    return made


def told(report: TransferReport, seconds: float, error: BaseException | None = None) -> None:
    report.finish(seconds, error)
    otel.record(report, transfer_event(report))


def test_phases_lie_inside_of_the_transfer_whatever_was_rounded(notes: Notes) -> None:
    """A viewer draws a child that begins before its parent as an error of the clock."""
    report = TransferReport("destination", "test", 7, [PeerReport(0, "complete")])
    (peer,) = report.peers
    for number, phase in enumerate(PHASES[1:]):
        peer.began[phase] = time.perf_counter() - 100 + number  # longer ago than the transfer took
        peer.seconds[phase] = 1000.0  # and longer
    told(report, 2.0)
    parent, *children = notes.spans
    assert parent.name == "ft_transport.transfer"
    assert parent.end_time - parent.start_time == 2_000_000_000
    assert [child.name for child in children] == [f"ft_transport.{phase}" for phase in PHASES[1:]]
    for child in children:
        assert child.parent is parent
        assert parent.start_time <= child.start_time <= child.end_time <= parent.end_time


def test_a_phase_that_is_under_way_ends_with_the_transfer(notes: Notes) -> None:
    """A source that fails has told so while it still speaks with a destination."""
    report = TransferReport("source", "test", 7, [PeerReport(0, "failed", began={"agree": time.perf_counter()})])
    told(report, 2.0)
    parent, child = notes.spans
    assert (child.name, child.end_time) == ("ft_transport.agree", parent.end_time)


def test_what_is_not_known_is_no_attribute(notes: Notes) -> None:
    """OpenTelemetry knows no None, and warns of it for each."""
    told(TransferReport("source", "test", None, [PeerReport(3, "complete", name="", address="")]), 1.0)
    (span,) = notes.spans
    assert None not in span.attributes.values()
    assert span.attributes["ft_transport.peer.rank"] == 3
    assert not {"ft_transport.step", "ft_transport.peer.name", "ft_transport.peer.address"} & set(span.attributes)
    assert span.status is None


def test_peers_of_several_are_on_their_own_spans_alone(notes: Notes) -> None:
    report = TransferReport("source", "test", 7, [PeerReport(rank, "complete") for rank in (1, 2)])
    for peer in report.peers:
        peer.began["move"] = time.perf_counter()
        peer.seconds["move"] = 0.0
    told(report, 1.0)
    parent, *children = notes.spans
    assert "ft_transport.peer.rank" not in parent.attributes
    assert [child.attributes["ft_transport.peer.rank"] for child in children] == [1, 2]


@pytest.mark.parametrize(
    ("outcomes", "error", "kinds"),
    [
        (["complete", "complete"], None, []),
        (["complete", "dead"], None, ["dead"]),
        (["pending", "refused"], None, ["failed", "refused"]),
        (["timed out", "dead"], TransferTimeout("x"), ["timed out", "dead"]),
        ([], ValueError("x"), ["failed"]),
        (["pending"], ValueError("x"), ["failed"]),
    ],
)
def test_a_failure_is_counted_for_each_peer_and_once_for_none(
    notes: Notes, outcomes: list[str], error: BaseException | None, kinds: list[str]
) -> None:
    peers: list[Any] = [PeerReport(rank, outcome) for rank, outcome in enumerate(outcomes)]  # type: ignore[arg-type]
    told(TransferReport("source", "test", 7, peers), 1.0, error)
    found = notes.counted("failures")
    assert [marks["outcome"] for _, marks in found] == kinds
    assert all(value == 1 for value, _ in found)
    assert all(marks.get("error") == (type(error).__name__ if error else None) for _, marks in found)


@pytest.mark.parametrize(("role", "outcome", "counted"), [("destination", "complete", 2), ("destination", "dead", 0)])
def test_bytes_have_landed_once_a_receive_is_complete(notes: Notes, role: Any, outcome: Any, counted: int) -> None:
    report = TransferReport(role, "test", 7, [PeerReport(0, outcome)])
    report.nbytes_in_place, report.nbytes_fresh = 100, 50
    told(report, 1.0)
    assert len(notes.counted("landed")) == counted


def test_without_the_api_nothing_is_told(monkeypatch: pytest.MonkeyPatch, notes: Notes) -> None:
    monkeypatch.setattr(otel, "trace", None)
    told(TransferReport("source", "test", 7, []), 1.0)
    assert notes.spans == []
    assert notes.counts == []
