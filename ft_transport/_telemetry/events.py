"""Tells how a transfer ended: a line in the log, an event for the caller's callback, spans and metrics.

An *event* is a dict of plain values. Its names are public: fields may be added, none changes its meaning or unit.
Sizes are in bytes (``nbytes_…``), durations in seconds (``seconds…``), counts begin with ``num_``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

from ft_transport._telemetry import otel
from ft_transport._telemetry.report import PHASES, PeerReport, TransferReport, shortened

__all__ = ["PROGRESS", "TRANSFER", "EventCallback", "RedactSecrets", "log_event", "publish", "transfer_event"]

logger = logging.getLogger("ft_transport")

Event = dict[str, Any]
EventCallback = Callable[[Event], None]
"""What a constructor takes as ``on_event``: called with the event of each transfer that is over. ``docs/operations.md``
has the table of its fields.
"""

# What is in an event under "event".
TRANSFER = "ft_transport.transfer"
PROGRESS = "ft_transport.progress"


def transfer_event(report: TransferReport) -> Event:
    """A finished transfer as an event.

    ``outcome`` is ``"complete"``, or that of the first peer for which it is another one (see ``PeerReport``), or
    ``"failed"``; ``phase`` is where that was, ``error_type`` the class of what the call raised. A phase that was not
    reached has 0 seconds, and a source's are those of its slowest destination. ``docs/operations.md`` has the table of
    all fields.
    """
    # The first, as in the error: what a table of transfers is grouped by should not depend on which of two destinations
    # was slower to fail.
    worst = _worst(report)
    return {
        "event": TRANSFER,
        **_fields(report, ("role", "transport", "step")),
        "outcome": _outcome(report, worst),
        "phase": worst.phase if worst is not None else "",
        "reason": shortened(worst.reason) if worst is not None else "",
        "error": shortened(report.error),
        "error_type": report.error.partition(":")[0],
        "torn": report.torn,
        "seconds": report.total_seconds,
        **_seconds(report),
        **_fields(report, _AS_THEY_ARE),
        "nbytes_moved": sum(peer.nbytes for peer in report.peers),
        **{f"num_{name}": len(getattr(report, name)) for name in _COUNTED},
        "num_peers_complete": sum(peer.outcome == "complete" for peer in report.peers),
        "peers": [_peer(peer) for peer in report.peers],
    }


# Fields of a report that are in its event as they are. What is in neither tuple (paths, clocks) is for whoever holds
# the report: an event is sent somewhere for each transfer, and a state may have twenty thousand paths.
_AS_THEY_ARE = (
    "gigabytes_per_second", "nbytes_total", "nbytes_wire", "nbytes_in_place", "nbytes_fresh", "nbytes_staged",
    "nbytes_kept", "in_place_share", "num_leaves", "num_messages", "num_repaired",
)  # fmt: skip
# Those of which the event has the number.
_COUNTED = ("unexpected_keys", "missing_keys", "not_in_place", "mismatched", "peers")


def _peer(peer: PeerReport) -> Event:
    fields = _fields(
        peer, ("rank", "name", "address", "outcome", "phase", "nbytes", "nbytes_wire", "nbytes_direct", "num_lanes")
    )
    return {**fields, "reason": shortened(peer.reason), **_seconds(peer)}


def _fields(report: TransferReport | PeerReport, names: tuple[str, ...]) -> Event:
    return {name: getattr(report, name) for name in names}


def _seconds(report: TransferReport | PeerReport) -> Event:
    # Each phase, reached or not: whoever keeps events in a table has the same columns for all.
    return {f"seconds_{phase}": report.seconds.get(phase, 0.0) for phase in PHASES}


def _worst(report: TransferReport) -> PeerReport | None:
    return next((peer for peer in report.peers if peer.outcome != "complete"), None)


def _outcome(report: TransferReport, worst: PeerReport | None) -> str:
    if report.complete:
        return "complete"
    # A call may fail for no peer's sake: before there was one, or with all of them still waiting.
    return worst.outcome if worst is not None and worst.outcome != "pending" else "failed"


def publish(report: TransferReport, on_event: EventCallback | None) -> None:
    """Tell everybody who listens how a transfer ended. What a listener raises is logged; never raises.

    Args:
        report: Of a transfer that is over.
        on_event: The caller's callback.
    """
    # Made once, for all: a filter that changes a record's event changes it for those after it, too, as with any
    # logging.
    event = transfer_event(report)
    complete = event["outcome"] == "complete"
    # First the log, which is the least likely to raise or to take its time, and last what may send it over a network.
    log_event(logging.INFO if complete else logging.WARNING, report.summary(), event)
    if on_event is not None:
        _guarded("the event callback raised; the transfer is not affected", on_event, event)
    _guarded("OpenTelemetry could not be told; the transfer is not affected", otel.record, report, event)


def log_event(level: int, text: str, event: Event) -> None:
    """Log a line, with the event as the record's ``ft_transport``, where formatters for JSON find it. Never raises."""
    try:
        logger.log(level, "%s", text, extra={"ft_transport": event})
    except Exception:
        pass  # a filter or handler of the user's; there is nowhere left to say so


def _guarded(text: str, call: Callable[..., None], *args: object) -> None:
    try:
        call(*args)
    except Exception:
        try:
            logger.exception(text)
        except Exception:
            pass  # as in log_event


class RedactSecrets(logging.Filter):
    """Puts ``<secret>`` in the place of the secret in each ``metadata()`` of a ``LaneTransport`` that is logged.

    torchft logs the source's metadata on the replica that heals. Add this to each *handler* that should not have it: a
    filter on a logger does not see what comes from the loggers below it. ::

        for handler in logging.getLogger().handlers:
            handler.addFilter(ft_transport.RedactSecrets())

    Every record passes, those without a secret unchanged. Looked at are the message with its arguments, the traceback,
    and all fields of the record that are text. Never raises. Any thread may call.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Redact a record, in place; always true."""
        try:
            _redact(record)
        except Exception:
            pass  # a message that does not take its arguments, which the handler itself tells of
        return True


def _redact(record: logging.LogRecord) -> None:
    # A copy, since formatters add fields (``message``, ``asctime``) to the same dict.
    for name, value in list(record.__dict__.items()):
        if isinstance(value, str) and _METADATA.search(value):
            setattr(record, name, _METADATA.sub(_REDACTED, value))
    # The traceback's text is made by the first formatter, and kept in the record for the others. Made here it can be
    # redacted; the exception itself cannot, and is dropped then.
    if record.exc_info and record.exc_info[0] is not None and not record.exc_text:
        text = logging.Formatter().formatException(record.exc_info)
        if _METADATA.search(text):
            record.exc_text = _METADATA.sub(_REDACTED, text)  # formatters take it as it is
            record.exc_info = None
    if record.args:
        message = record.getMessage()
        if _METADATA.search(message):
            # The arguments are gone with that: one of them was the secret.
            record.msg, record.args = _METADATA.sub(_REDACTED, message), None


# As ``_net.handshake`` writes it, with whatever has been put around it, and any version.
_METADATA = re.compile(r"(ft-lanes(?:\+tls)?://[^\s/]{1,4000}/\d{1,4}/)[0-9a-fA-F]+")
_REDACTED = r"\1<secret>"
