"""Spans and metrics of OpenTelemetry for a finished transfer.

Only the API is used, so whatever providers the application has set get them, and without any all of this is nothing.
Spans are made when the transfer is over, from the times in its report: no exporter is in the way of bytes.

The wall clock is read once, for the end of a transfer, and decides nothing: all other times are counted back from it
on the clock that the report was taken with, so a clock that jumps meanwhile bends no span.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from ft_transport._telemetry.report import PHASES, TransferReport
from ft_transport._version import __version__

try:
    from opentelemetry import metrics, trace
except ImportError:  # a dependency of torchft and of ours; those who have removed it do without
    trace = None  # type: ignore[assignment]

__all__ = ["record"]

_NAME = "ft_transport"
# Upper bounds in seconds: a heal takes from milliseconds to minutes.
_BOUNDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500]


def record(report: TransferReport, event: Mapping[str, Any]) -> None:
    """Give a finished transfer to OpenTelemetry. Raises whatever the application's own exporters do."""
    if trace is None:
        return
    _record_spans(report, event)
    _record_metrics(report, event)


# ---------------------------------------------------------------------------------------------- spans

# Fields of the event that a span has another place for: its name, its status, its children. Durations, too. All others
# are its attributes.
_ELSEWHERE = frozenset({"event", "error", "error_type", "peers"})


def _record_spans(report: TransferReport, event: Mapping[str, Any]) -> None:
    tracer = trace.get_tracer(_NAME, __version__)
    # Both clocks at one moment: what is subtracted afterwards is measured on the second one alone.
    end, now = time.time_ns(), time.perf_counter()
    start = end - _nanoseconds(report.total_seconds)
    attributes = _attributes(
        {name: event[name] for name in event if name not in _ELSEWHERE and not name.startswith("seconds")}
    )
    # Those of the one peer belong to the transfer; those of several are told apart by their own.
    if len(event["peers"]) == 1:
        attributes |= _peer_attributes(event["peers"][0])
    if event["error_type"]:
        attributes["error.type"] = event["error_type"]
    span = tracer.start_span("ft_transport.transfer", attributes=attributes, start_time=start)
    if event["outcome"] != "complete":
        span.set_status(trace.Status(trace.StatusCode.ERROR, event["error"] or event["reason"]))
    context = trace.set_span_in_context(span)
    own = {name: seconds for name, seconds in report.seconds.items() if name in report.began}
    parts = [(report.began, own, _attributes({"role": report.role}))]
    for peer, told in zip(report.peers, event["peers"], strict=True):
        parts.append((peer.began, peer.seconds, _attributes({"role": report.role}) | _peer_attributes(told)))
    for began, seconds, marks in parts:
        for phase in PHASES:
            # A phase that was not reached has no span, rather than one of no length.
            if phase in began:
                # Never outside of its parent: what is added up afterwards may be rounded.
                first = max(start, end - _nanoseconds(now - began[phase]))
                child = tracer.start_span(f"ft_transport.{phase}", context, attributes=marks, start_time=first)
                # One that is under way goes on until now: a call that fails is told of while others still hear why.
                child.end(min(end, first + _nanoseconds(seconds[phase])) if phase in seconds else end)
    span.end(end)


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def _attributes(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {f"ft_transport.{name}": value for name, value in fields.items() if value is not None}


def _peer_attributes(peer: Mapping[str, Any]) -> dict[str, Any]:
    names = ("rank", "name", "address", "outcome")
    return {f"ft_transport.peer.{name}": peer[name] for name in names if peer[name] != ""}


# -------------------------------------------------------------------------------------------- metrics


class _Instruments(NamedTuple):
    transfers: Any
    failures: Any
    duration: Any
    phase_duration: Any
    payload: Any
    wire: Any
    landed: Any
    repaired: Any


@functools.cache
def _instruments() -> _Instruments:
    # The API's own stand-ins, which pass on to the application's provider as soon as there is one.
    meter = metrics.get_meter(_NAME, __version__)

    def counter(name: str, unit: str, text: str) -> Any:
        return meter.create_counter(f"ft_transport.{name}", unit, text)

    def seconds(name: str, text: str) -> Any:
        how: Any = {"explicit_bucket_boundaries_advisory": _BOUNDS}
        return meter.create_histogram(f"ft_transport.{name}", "s", text, **how)

    return _Instruments(
        counter("transfers", "{transfer}", "Transfers that are over"),
        counter("failures", "{failure}", "Peers whose transfer failed, by outcome and phase"),
        seconds("transfer.duration", "Duration of a call as a whole"),
        seconds("phase.duration", "Duration of each phase, a source's of its slowest destination"),
        counter("payload", "By", "Bytes of states that moved"),
        counter("wire", "By", "Bytes for payload, manifest and control, both directions"),
        counter("landed", "By", "Where received bytes are: in place, fresh, or kept"),
        counter("repaired", "{message}", "Messages that came damaged and were sent again"),
    )


def _record_metrics(report: TransferReport, event: Mapping[str, Any]) -> None:
    to = _instruments()
    marks = _attributes({"role": report.role, "transport": report.transport})
    outcome = {**marks, "ft_transport.outcome": event["outcome"]}
    to.transfers.add(1, outcome)
    to.duration.record(report.total_seconds, outcome)
    for phase, seconds in report.seconds.items():
        to.phase_duration.record(seconds, {**marks, "ft_transport.phase": phase})
    # Counters, so that rates and sums over many processes are the collector's business.
    to.payload.add(event["nbytes_moved"], marks)
    to.wire.add(event["nbytes_wire"], marks)
    if report.num_repaired:
        to.repaired.add(report.num_repaired, marks)
    # Until it is complete the report says where bytes shall land.
    if report.role == "destination" and event["outcome"] == "complete":
        # Of the report's bytes in place, those that were there already have not landed.
        landed = {"in_place": report.nbytes_in_place - report.nbytes_kept, "fresh": report.nbytes_fresh}
        for where, nbytes in {**landed, "kept": report.nbytes_kept}.items():
            if nbytes > 0:
                to.landed.add(nbytes, {**marks, "ft_transport.where": where})
    _record_failures(to.failures, report, event, marks)


def _record_failures(counter: Any, report: TransferReport, event: Mapping[str, Any], marks: Mapping[str, Any]) -> None:
    """One for each peer that was not served; one for a call that failed for no peer's sake."""
    failed = [(peer.outcome, peer.phase) for peer in report.peers if peer.outcome not in ("complete", "pending")]
    if event["outcome"] != "complete" and not failed:
        failed = [(event["outcome"], event["phase"])]
    for outcome, phase in failed:
        kind = {"outcome": outcome, "phase": phase, "error": event["error_type"] or None}
        counter.add(1, {**marks, **_attributes(kind)})
