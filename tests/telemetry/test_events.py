"""What a transfer tells when it is over: the event, the log record, the callback, spans and metrics."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from ft_transport import PeerFailure, RedactSecrets, TransferTimeout, transfer_event
from ft_transport._telemetry import otel
from ft_transport._telemetry.events import publish
from ft_transport._telemetry.report import PHASES, PeerReport, TransferReport

SECRET = "5e" * 32
METADATA = f"ft-lanes+tls://10.0.0.3,[fe80::1]:4711/2/{SECRET}"


class Lying:
    def __str__(self) -> str:
        return METADATA


class Raising:
    def __str__(self) -> str:
        raise ValueError(METADATA)


def redacted(log: Callable[[logging.Logger], None], name: str = "torchft.manager") -> str:
    """What a handler with the filter writes."""
    stream = io.StringIO()
    handler, logger = logging.StreamHandler(stream), logging.getLogger(name)
    handler.addFilter(RedactSecrets())
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        log(logger)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return stream.getvalue()


def fail(logger: logging.Logger) -> None:
    try:
        raise OSError(METADATA)
    except OSError:
        logger.exception("it failed")


@pytest.mark.parametrize(
    "log",
    [
        lambda logger: logger.info(f"fetching with checkpoint_metadata={METADATA!r}"),
        lambda logger: logger.info("with %s and %d", METADATA, 5),
        lambda logger: logger.info("with %(m)s", {"m": METADATA}),
        lambda logger: logger.info("with %s", Lying()),
        lambda logger: logger.info("with %s", [METADATA, METADATA]),
        fail,
    ],
)
def test_the_secret_of_metadata_is_redacted(log: Callable[[logging.Logger], None]) -> None:
    text = redacted(log)
    assert "ft-lanes+tls://10.0.0.3,[fe80::1]:4711/2/<secret>" in text
    assert SECRET not in text


def test_the_secret_is_redacted_in_torchft_s_own_line() -> None:
    from torchft.manager import _ManagerLogger

    manager: Any = SimpleNamespace(current_step=lambda: 7)
    checkpoint_metadata, recover_src_replica_rank = METADATA, 0
    line = f"fetching checkpoint from {recover_src_replica_rank=} with {checkpoint_metadata=}"
    text = redacted(lambda _: _ManagerLogger(manager, "replica_1", 0).info(line))
    assert text == f"[replica_1/0 - step 7] {line}\n".replace(SECRET, "<secret>")


def test_other_records_pass_unchanged_and_nothing_raises() -> None:
    name, one = "ft_transport", logging.LogRecord
    records = [
        one(name, 20, "f", 1, "a %s", ("b",), None),
        one(name, 20, "f", 1, "a %d", ("b",), None),  # does not take its arguments
        one(name, 20, "f", 1, 5, None, None),
        one(name, 20, "f", 1, "ft-lanes://10.0.0.3:4711/2/", None, None),
    ]
    for record in records:
        before = dict(record.__dict__)
        assert RedactSecrets().filter(record)
        assert record.__dict__ == before
    assert RedactSecrets().filter(one(name, 20, "f", 1, "a %s", (Raising(),), None))


# Every field of the event, as docs/operations.md has them. Fields may be added; none may go or change.
FIELDS = {
    "event", "role", "transport", "step", "outcome", "phase", "reason", "error", "error_type", "torn", "seconds",
    "seconds_describe", "seconds_agree", "seconds_move", "seconds_verify", "seconds_rebuild", "gigabytes_per_second",
    "nbytes_total", "nbytes_moved", "nbytes_wire", "nbytes_in_place", "nbytes_fresh", "nbytes_staged", "nbytes_kept",
    "in_place_share", "num_leaves", "num_messages", "num_repaired", "num_unexpected_keys",
    "num_missing_keys", "num_not_in_place", "num_mismatched", "num_peers", "num_peers_complete", "peers",
}  # fmt: skip
PEER_FIELDS = {
    "rank", "name", "address", "outcome", "phase", "reason", "nbytes", "nbytes_wire", "nbytes_direct", "num_lanes",
    *(f"seconds_{phase}" for phase in PHASES),
}  # fmt: skip


def received(error: BaseException | None = None) -> TransferReport:
    """A finished receive of 3 MB, one second long, its phases in their order."""
    report = TransferReport("destination", "LaneTransport", 7, nbytes_total=3_000_000, num_leaves=4, num_messages=2)
    peer = PeerReport(1, "complete", "rebuild", 3_000_000, 3_000_200, address="10.0.0.1")
    report.nbytes_in_place, report.nbytes_fresh, report.nbytes_kept = 2_100_000, 900_000, 100_000
    report.unexpected_keys, report.num_repaired = ["a.b"], 1
    begin = time.perf_counter() - 1.0
    for phase, at, seconds in (("agree", 0.0, 0.2), ("move", 0.2, 0.5), ("verify", 0.7, 0.1), ("rebuild", 0.8, 0.2)):
        peer.began[phase], peer.seconds[phase] = begin + at, seconds
    if error is not None:
        peer.outcome, peer.phase, peer.reason = "dead", "move", "the connection broke"
    report.peers = [peer]
    report.finish(1.0, error)
    return report


def sent() -> TransferReport:
    """A finished send to three destinations: one is served, one is dead, one has refused."""
    report = TransferReport("source", "PGTransport", 7, nbytes_total=2_000_000)
    begin = time.perf_counter() - 0.9
    report.began["describe"], report.seconds["describe"] = begin, 0.1
    outcomes = (("complete", "verify", 2_000_000), ("dead", "move", 500_000), ("refused", "agree", 0))
    for rank, (outcome, phase, nbytes) in enumerate(outcomes):
        peer = PeerReport(rank, outcome, phase, nbytes, seconds={"agree": 0.1, "move": 0.3})  # type: ignore[arg-type]
        peer.began = {"agree": begin + 0.1, "move": begin + 0.2}
        report.peers.append(peer)
    report.finish(0.9, None)
    return report


# ----------------------------------------------------------------------------------------------- event


def test_an_event_has_the_documented_fields_and_is_json() -> None:
    event = transfer_event(received())
    assert set(event) == FIELDS
    assert set(event["peers"][0]) == PEER_FIELDS
    assert json.loads(json.dumps(event)) == event
    assert event["event"] == "ft_transport.transfer"
    assert (event["outcome"], event["error"], event["error_type"], event["phase"]) == ("complete", "", "", "")
    assert event["seconds"] == 1.0
    assert event["seconds_move"] == 0.5
    assert event["seconds_describe"] == 0.0
    assert (event["nbytes_moved"], event["nbytes_total"], event["nbytes_kept"]) == (3_000_000, 3_000_000, 100_000)
    assert (event["num_unexpected_keys"], event["num_peers"], event["num_peers_complete"]) == (1, 1, 1)


def test_the_event_of_a_failure_says_what_and_where() -> None:
    event = transfer_event(received(PeerFailure("the connection broke", step=7)))
    assert (event["outcome"], event["phase"], event["reason"]) == ("dead", "move", "the connection broke")
    assert event["error_type"] == "PeerFailure"
    assert event["error"].startswith("PeerFailure: the connection broke")
    assert event["num_peers_complete"] == 0


def test_the_event_of_a_source_has_the_first_failure_and_all_peers() -> None:
    event = transfer_event(sent())
    assert (event["outcome"], event["phase"], event["error_type"]) == ("dead", "move", "")
    assert [peer["outcome"] for peer in event["peers"]] == ["complete", "dead", "refused"]
    assert (event["num_peers"], event["num_peers_complete"], event["nbytes_moved"]) == (3, 1, 2_500_000)


def test_a_call_that_fails_before_it_has_a_peer_has_failed() -> None:
    report = TransferReport("source", "x", 1, [PeerReport(1)])
    report.finish(0.1, ValueError("x"))
    assert transfer_event(report)["outcome"] == "failed"
    assert transfer_event(report)["error_type"] == "ValueError"


def test_a_report_is_finished_once() -> None:
    report = received()
    assert not report.finish(5.0, TransferTimeout("late"))
    assert (report.total_seconds, report.error) == (1.0, "")


# ------------------------------------------------------------------------------------------- listeners


def test_the_log_record_carries_the_event(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ft_transport"):
        publish(received(), None)
        publish(sent(), None)
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    for record, report in zip(caplog.records, (received(), sent()), strict=True):
        assert record.ft_transport["step"] == report.step  # type: ignore[attr-defined]
        assert set(record.ft_transport) == FIELDS  # type: ignore[attr-defined]
        assert record.getMessage() == report.summary()


def test_a_callback_gets_the_event_and_what_it_raises_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    events: list[dict[str, Any]] = []
    publish(received(), events.append)
    assert [event["outcome"] for event in events] == ["complete"]

    def broken(event: dict[str, Any]) -> None:
        raise RuntimeError("on purpose")

    publish(received(), broken)
    assert "the event callback raised" in caplog.text
    assert "on purpose" in caplog.text


def test_a_handler_that_raises_costs_nothing() -> None:
    class Broken(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            raise RuntimeError("on purpose")

    handler, logger = Broken(), logging.getLogger("ft_transport")
    logger.addHandler(handler)
    events: list[dict[str, Any]] = []
    try:
        publish(sent(), events.append)
    finally:
        logger.removeHandler(handler)
    assert len(events) == 1


# --------------------------------------------------------------------------------------- OpenTelemetry


@pytest.fixture(scope="module")
def providers() -> Iterator[tuple[TracerProvider, InMemoryMetricReader]]:
    """The application's own, set as an application would: once for each process."""
    # Instruments that are made before there is a provider must reach it, too.
    otel.record(received(), transfer_event(received()))
    tracers, reader = TracerProvider(shutdown_on_exit=False), InMemoryMetricReader()
    meters = MeterProvider([reader], shutdown_on_exit=False)
    trace.set_tracer_provider(tracers)
    metrics.set_meter_provider(meters)
    yield tracers, reader
    tracers.shutdown()
    meters.shutdown()


@pytest.fixture
def exporter(providers: tuple[TracerProvider, InMemoryMetricReader]) -> Iterator[InMemorySpanExporter]:
    tracers, _ = providers
    found, before = InMemorySpanExporter(), tracers._active_span_processor._span_processors
    tracers.add_span_processor(SimpleSpanProcessor(found))
    yield found
    tracers._active_span_processor._span_processors = before


def spans(exporter: InMemorySpanExporter) -> tuple[ReadableSpan, list[ReadableSpan]]:
    """The span of the transfer, and those of its phases by their begin."""
    (parent,) = [span for span in exporter.get_finished_spans() if span.name == "ft_transport.transfer"]
    rest = [span for span in exporter.get_finished_spans() if span is not parent]
    for span in rest:
        assert span.parent is not None
        assert parent.context is not None
        assert span.parent.span_id == parent.context.span_id
        assert parent.start_time <= span.start_time <= span.end_time <= parent.end_time  # type: ignore[operator]
    return parent, sorted(rest, key=lambda span: span.start_time or 0)


def test_a_transfer_is_a_span_with_its_phases_below(exporter: InMemorySpanExporter) -> None:
    begin = time.time_ns()
    publish(received(), None)
    parent, phases = spans(exporter)
    assert parent.attributes is not None
    assert parent.attributes["ft_transport.step"] == 7
    assert parent.attributes["ft_transport.outcome"] == "complete"
    assert parent.attributes["ft_transport.nbytes_in_place"] == 2_100_000
    assert parent.attributes["ft_transport.peer.address"] == "10.0.0.1"
    own = {name for name in parent.attributes if not name.startswith("ft_transport.peer.")}
    elsewhere = {name for name in FIELDS if name.startswith("seconds")} | {"event", "error", "error_type", "peers"}
    assert own == {f"ft_transport.{name}" for name in FIELDS - elsewhere}
    assert parent.status.is_ok
    assert parent.end_time - parent.start_time == 1_000_000_000  # type: ignore[operator]
    assert begin <= parent.end_time <= time.time_ns()  # type: ignore[operator]
    names = [span.name.removeprefix("ft_transport.") for span in phases]
    assert names == ["agree", "move", "verify", "rebuild"]
    move = phases[1]
    assert move.end_time - move.start_time == 500_000_000  # type: ignore[operator]
    offset = move.start_time - parent.start_time  # type: ignore[operator]
    assert 190_000_000 <= offset <= 500_000_000


def test_the_phases_of_several_peers_are_told_apart(exporter: InMemorySpanExporter) -> None:
    publish(sent(), None)
    parent, phases = spans(exporter)
    assert not parent.status.is_ok
    assert len(phases) == 7
    by_rank = [span.attributes.get("ft_transport.peer.rank") for span in phases if span.attributes]
    assert by_rank == [None, 0, 1, 2, 0, 1, 2]
    assert phases[0].name == "ft_transport.describe"


def test_the_span_of_a_failure_has_the_error(exporter: InMemorySpanExporter) -> None:
    publish(received(PeerFailure("the connection broke", step=7)), None)
    parent, _ = spans(exporter)
    assert not parent.status.is_ok
    assert "the connection broke" in str(parent.status.description)
    assert parent.attributes is not None
    assert parent.attributes["error.type"] == "PeerFailure"


def collected(reader: InMemoryMetricReader) -> dict[str, list[tuple[dict[str, Any], Any]]]:
    found: dict[str, list[tuple[dict[str, Any], Any]]] = {}
    data = reader.get_metrics_data()
    for resource in data.resource_metrics if data is not None else ():
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                for point in metric.data.data_points:
                    value = getattr(point, "value", None)
                    value = getattr(point, "sum", 0.0) if value is None else value
                    named = (point.attributes or {}).items()
                    marks = {name.removeprefix("ft_transport."): mark for name, mark in named}
                    found.setdefault(f"{metric.name} {metric.unit}", []).append((marks, value))
    return found


def change(reader: InMemoryMetricReader, report: TransferReport) -> dict[str, list[tuple[dict[str, Any], Any]]]:
    """What one transfer adds to each metric."""
    before = collected(reader)
    publish(report, None)
    added: dict[str, list[tuple[dict[str, Any], Any]]] = {}
    for name, points in collected(reader).items():
        for marks, value in points:
            old = next((was for same, was in before.get(name, []) if same == marks), 0)
            if value != old:
                added.setdefault(name, []).append((marks, pytest.approx(value - old)))
    return added


def test_metrics_of_a_receive(providers: tuple[TracerProvider, InMemoryMetricReader]) -> None:
    marks = {"role": "destination", "transport": "LaneTransport"}
    added = change(providers[1], received())
    assert added["ft_transport.transfers {transfer}"] == [({**marks, "outcome": "complete"}, 1)]
    assert added["ft_transport.transfer.duration s"] == [({**marks, "outcome": "complete"}, 1.0)]
    assert added["ft_transport.payload By"] == [(marks, 3_000_000)]
    assert added["ft_transport.wire By"] == [(marks, 3_000_200)]
    assert added["ft_transport.repaired {message}"] == [(marks, 1)]
    assert sorted((m["where"], value) for m, value in added["ft_transport.landed By"]) == [
        ("fresh", 900_000), ("in_place", 2_000_000), ("kept", 100_000),
    ]  # fmt: skip
    assert {m["phase"] for m, _ in added["ft_transport.phase.duration s"]} == set(PHASES) - {"describe"}
    assert "ft_transport.failures {failure}" not in added


def test_metrics_of_failures_by_kind(providers: tuple[TracerProvider, InMemoryMetricReader]) -> None:
    added = change(providers[1], sent())
    kinds = [(m["outcome"], m["phase"]) for m, _ in added["ft_transport.failures {failure}"]]
    assert sorted(kinds) == [("dead", "move"), ("refused", "agree")]
    added = change(providers[1], received(PeerFailure("x")))
    ((marks, value),) = added["ft_transport.failures {failure}"]
    assert value == 1
    assert "ft_transport.landed By" not in added, "it says where bytes would have landed"
    assert (marks["outcome"], marks["phase"], marks["error"]) == ("dead", "move", "PeerFailure")
    alone = TransferReport("source", "x", 1, [PeerReport(1)])
    alone.finish(0.1, ValueError("x"))
    ((marks, _),) = change(providers[1], alone)["ft_transport.failures {failure}"]
    assert (marks["outcome"], marks["phase"], marks["error"]) == ("failed", "describe", "ValueError")


class _BrokenExporter(SpanExporter):
    def export(self, spans: Any) -> SpanExportResult:
        raise RuntimeError("on purpose")


def test_an_exporter_that_raises_costs_nothing(
    providers: tuple[TracerProvider, InMemoryMetricReader], exporter: InMemorySpanExporter
) -> None:
    providers[0].add_span_processor(SimpleSpanProcessor(_BrokenExporter()))
    publish(received(), None)
    assert len(exporter.get_finished_spans()) == 5


def test_a_provider_that_raises_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(otel, "record", broken)
    publish(received(), None)
    assert "OpenTelemetry could not be told" in caplog.text


def test_without_the_api_nothing_is_told_and_nothing_fails() -> None:
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "opentelemetry":
            raise ModuleNotFoundError(f"blocked: {name}", name=name)
sys.meta_path.insert(0, Blocked())
from ft_transport._telemetry.events import publish
from ft_transport._telemetry.report import PeerReport, TransferReport
report = TransferReport("source", "x", 1, [PeerReport(1, "complete")])
report.finish(1.0, None)
publish(report, lambda event: print(event["outcome"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert (done.stdout, done.stderr) == ("complete\n", "")
