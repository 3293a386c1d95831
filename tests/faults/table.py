"""Fault by phase by role by transport: what is expected at each end. Data, and how ``docs/faults.md`` shows it.

    python -m faults.table          (in the folder tests/) writes the tables into docs/faults.md

A row groups cells that end alike. ``test_faults.py`` runs those that can be had in memory, at every operation of their
phase; ``multiproc/test_faults.py`` runs each with real processes; a few need a namespace or a Lighthouse of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "faults.md"

GROUP, LANES = "group", "lanes"
SOURCE, DESTINATION, NETWORK = "source", "destination", "network"

# In which the one with the fault is: it has not begun its call, the manifest is under way, bytes are, all have landed
# and are not confirmed, all are confirmed.
BEFORE, MANIFEST, MOVE, VERIFY, AFTER = "before", "manifest", "move", "verify", "after"
EARLY, LATE = (BEFORE, MANIFEST), (MOVE, VERIFY)
ANY = (*EARLY, *LATE)

PHASE_TEXT = {
    BEFORE: "before its call",
    MANIFEST: "in the manifest",
    MOVE: "while bytes move",
    VERIFY: "when all have landed",
    AFTER: "when all is confirmed",
}

# The template afterwards. Torn: a mix of two states, and every report says so.
HEALED, UNTOUCHED, TORN = "healed", "untouched", "torn"


class AtSource(NamedTuple):
    """How ``send_checkpoint`` ends.

    Attributes:
        outcome: Of the destination with the fault, in ``last_report``; of all, if it is the source's or the network's.
        raises: Name of the error, empty if the call returns.
    """

    outcome: str
    raises: str = ""


class AtDestination(NamedTuple):
    """How ``recv_checkpoint`` ends.

    Attributes:
        template: What is in it then.
        raises: Names of the errors, one of which it is; none if the call returns.
    """

    template: str
    raises: tuple[str, ...] = ()


class Row(NamedTuple):
    """Cells that end alike.

    Attributes:
        wire: ``"group"`` or ``"lanes"``.
        who: Has the fault. The other destinations have everything unless the source has it.
        faults: Which; what they are is in :data:`FAULTS`.
        phases: Where.
        source: At the source, None if it is dead or stopped.
        destination: At the destination, None if it is dead or stopped.
        when: Both know: a key of :data:`WHEN`.
        note: For the reader.
        woken: How the call of one that was stopped ends when it goes on, at the source or the destination.
    """

    wire: str
    who: str
    faults: tuple[str, ...]
    phases: tuple[str, ...]
    source: AtSource | None
    destination: AtDestination | None
    when: str
    note: str = ""
    woken: AtSource | AtDestination | None = None


# Fault: what a reader is told, and how it is made with real processes.
FAULTS = {
    "killed": "killed (SIGKILL)",
    "terminated": "terminated (SIGTERM)",
    "stopped": "stopped (SIGSTOP)",
    "interrupted": "Ctrl-C",
    "two killed": "killed, and another one too",
    "slow": "slow",
    "other template": 'another template, with `on_mismatch="refuse"`',
    "other step": "another step",
    "no room": "no memory for what is fresh",
    "callback raises": "`state_dict` raises",
    "callback blocks": "`state_dict` blocks beyond the deadline",
    "no descriptors": "no file descriptors left",
    "own error": "an error of its own",
    "no code": "its state cannot travel",
    "changing": "its state changes while it is sent",
    "changing unseen": "its state changes past autograd's count",
    "disallowed": "`disallow_checkpoint()`",
    "clock jumps": "the wall clock jumps by an hour",
    "never comes": "never comes",
    "nothing to send": "has nothing to send yet",
    "deadline": "its deadline passes, or `shutdown()`",
    "message damaged": "a bit of a message flips",
    "always damaged": "a bit of a message flips, every time",
    "truncated": "the end of a message is lost",
    "doubled": "a message comes twice",
    "frame damaged": "a bit of a frame flips",
    "lane cut": "a lane is cut",
    "cut": "every connection is cut",
    "frozen": "nothing passes any more",
    "delayed": "latency",
    "throttled": "little bandwidth",
    "queue full": "the source's listen queue is full",
}

WHEN = {
    "at once": "at once",
    "silent": "when it is silent",
    "absent": "`stall_timeout` after `disallow_checkpoint()`",
    "deadline": "at the deadline",
    "in time": "in its own time",
}

# Seconds from the fault until whoever lives has noticed; "deadline" counts from the call's begin.
NOTICE = {GROUP: 2.0, LANES: 0.5}
LATE_BY = 1.0

_DEAD = ("killed", "terminated")
_REFUSES = ("other template", "other step")
_HEALED = AtDestination(HEALED)

# fmt: off
_GROUP = [
    Row(GROUP, DESTINATION, _DEAD, ANY, AtSource("dead"), None, "at once",
        "raises nothing: its death is not the step's"),
    Row(GROUP, DESTINATION, ("two killed",), (MOVE,), AtSource("dead"), None, "at once", "two destinations"),
    Row(GROUP, DESTINATION, ("stopped",), EARLY, AtSource("timed out", "TransferTimeout"), None, "deadline",
        "the group must be configured anew", woken=AtDestination(UNTOUCHED, ("PeerFailure",))),
    Row(GROUP, DESTINATION, ("stopped",), LATE, AtSource("timed out", "TransferTimeout"), None, "deadline",
        "as above", woken=AtDestination(TORN, ("PeerFailure",))),
    Row(GROUP, DESTINATION, ("slow",), (MOVE,), AtSource("complete"), _HEALED, "in time",
        "the others do not wait for it"),
    Row(GROUP, DESTINATION, _REFUSES, (MANIFEST,), AtSource("refused"), AtDestination(UNTOUCHED,
        ("RemoteProtocolError",)), "at once", "all reasons, on both sides"),
    Row(GROUP, DESTINATION, ("no room", "callback raises"), (MANIFEST,), AtSource("refused"),
        AtDestination(UNTOUCHED, ("LocalProtocolError",)), "at once", "all reasons, on both sides"),
    Row(GROUP, DESTINATION, ("callback blocks",), (MANIFEST,), AtSource("timed out", "TransferTimeout"),
        AtDestination(UNTOUCHED, ("PeerFailure", "TransferTimeout")), "deadline",
        "its own call ends when the callback does"),
    Row(GROUP, DESTINATION, ("own error",), (VERIFY,), AtSource("failed dead"), AtDestination(TORN,
        ("LocalProtocolError",)), "at once", "the source is told why"),
    Row(GROUP, DESTINATION, ("own error",), (AFTER,), AtSource("complete"), AtDestination(TORN,
        ("LocalProtocolError",)), "at once", "a class whose code raises as it is built: the source is done by then"),
    Row(GROUP, DESTINATION, ("interrupted",), (MOVE,), AtSource("failed dead"), AtDestination(TORN,
        ("KeyboardInterrupt",)), "at once", "the source is told why"),
    Row(GROUP, SOURCE, ("no code",), (BEFORE,), AtSource("pending failed", "LocalProtocolError"),
        AtDestination(UNTOUCHED, ("PeerFailure",)), "at once", "path and reason, on both sides"),
    Row(GROUP, SOURCE, _DEAD, EARLY, None, AtDestination(UNTOUCHED, ("PeerFailure",)), "at once"),
    Row(GROUP, SOURCE, _DEAD, LATE, None, AtDestination(TORN, ("PeerFailure",)), "at once"),
    Row(GROUP, SOURCE, ("two killed",), (MOVE,), None, AtDestination(TORN, ("PeerFailure",)), "at once",
        "the source and a destination"),
    Row(GROUP, SOURCE, ("killed",), (AFTER,), None, _HEALED, "at once", "everything is there and agrees"),
    Row(GROUP, SOURCE, ("stopped",), EARLY, None, AtDestination(UNTOUCHED, ("TransferTimeout",)), "deadline",
        woken=AtSource("dead timed out failed", "*")),
    Row(GROUP, SOURCE, ("stopped",), LATE, None, AtDestination(TORN, ("TransferTimeout",)), "deadline",
        woken=AtSource("dead timed out failed", "*")),
    Row(GROUP, SOURCE, ("interrupted",), (MOVE,), AtSource("failed", "KeyboardInterrupt"), AtDestination(TORN,
        ("PeerFailure",)), "at once", "the destinations are told why, if what is under way leaves within 1 s"),
    Row(GROUP, SOURCE, ("changing",), (MOVE,), AtSource("failed", "LocalProtocolError"), AtDestination(TORN,
        ("PeerFailure",)), "at once", "the paths are named on both sides"),
    Row(GROUP, SOURCE, ("changing unseen",), (MOVE,), AtSource("failed"), AtDestination(TORN,
        ("RemoteProtocolError",)), "at once", "found by the digests"),
    Row(GROUP, NETWORK, ("message damaged", "truncated"), (MOVE,), AtSource("failed"), AtDestination(TORN,
        ("RemoteProtocolError",)), "at once", "found by the digests"),
    Row(GROUP, NETWORK, ("frozen",), (MOVE,), AtSource("timed out", "TransferTimeout"), AtDestination(TORN,
        ("TransferTimeout", "PeerFailure")), "deadline", "a cable that is cut"),
    Row(GROUP, NETWORK, ("clock jumps",), (MOVE,), AtSource("complete"), _HEALED, "in time",
        "only the monotonic clock is read"),
]
# fmt: on

# fmt: off
_LANES = [
    Row(LANES, DESTINATION, _DEAD, (BEFORE,), AtSource("timed out"), None, "absent",
        "nobody knows that it was to come"),
    Row(LANES, DESTINATION, _DEAD, (MANIFEST, *LATE), AtSource("dead"), None, "at once",
        "those behind it in the chain turn to others"),
    Row(LANES, DESTINATION, ("two killed",), (MOVE,), AtSource("dead"), None, "at once", "two destinations"),
    Row(LANES, DESTINATION, ("stopped",), (BEFORE,), AtSource("timed out"), None, "absent",
        woken=AtDestination(UNTOUCHED, ("PeerFailure",))),
    Row(LANES, DESTINATION, ("stopped",), (MANIFEST,), AtSource("timed out"), None, "silent",
        woken=AtDestination(UNTOUCHED, ("PeerFailure",))),
    Row(LANES, DESTINATION, ("stopped",), (MOVE,), AtSource("timed out"), None, "silent",
        "those behind it in the chain turn to others", woken=AtDestination(TORN, ("PeerFailure",))),
    Row(LANES, DESTINATION, ("stopped",), (VERIFY,), AtSource("timed out"), None, "silent", woken=_HEALED),
    Row(LANES, DESTINATION, ("slow",), (MOVE,), AtSource("complete"), _HEALED, "in time",
        "those behind it in the chain turn to others"),
    Row(LANES, DESTINATION, ("other template",), (MANIFEST,), AtSource("refused"), AtDestination(UNTOUCHED,
        ("RemoteProtocolError",)), "at once", "all reasons, on both sides"),
    Row(LANES, DESTINATION, ("other step",), (MANIFEST,), AtSource("timed out"), AtDestination(UNTOUCHED,
        ("PeerFailure", "TransferTimeout")), "deadline", "a later one: it waits until the source offers that; for an "
        "earlier one it is told at once that the source has gone on"),
    Row(LANES, DESTINATION, ("no room", "callback raises"), (MANIFEST,), AtSource("refused"),
        AtDestination(UNTOUCHED, ("LocalProtocolError",)), "at once", "all reasons, on both sides"),
    Row(LANES, DESTINATION, ("callback blocks",), (MANIFEST,), AtSource("timed out"), AtDestination(UNTOUCHED,
        ("PeerFailure", "TransferTimeout")), "deadline", "its own call ends when the callback does"),
    Row(LANES, DESTINATION, ("no descriptors",), (BEFORE,), AtSource("timed out"), AtDestination(UNTOUCHED,
        ("PeerFailure", "LocalProtocolError")), "absent", "the source does not get to know"),
    Row(LANES, DESTINATION, ("own error",), (VERIFY,), AtSource("failed"), AtDestination(TORN,
        ("LocalProtocolError",)), "at once", "the source is told why"),
    Row(LANES, DESTINATION, ("own error",), (AFTER,), AtSource("complete"), AtDestination(TORN,
        ("LocalProtocolError",)), "at once", "a class whose code raises as it is built: the source is done by then"),
    Row(LANES, DESTINATION, ("interrupted",), (MOVE,), AtSource("failed"), AtDestination(TORN,
        ("KeyboardInterrupt",)), "at once", "the source is told why"),
    Row(LANES, SOURCE, ("interrupted",), (MOVE,), AtSource("failed", "KeyboardInterrupt"), AtDestination(TORN,
        ("PeerFailure",)), "at once", "with `blocking=True`; the destinations are told why"),
    Row(LANES, SOURCE, ("no code",), (BEFORE,), AtSource("pending failed", "LocalProtocolError"),
        AtDestination(UNTOUCHED, ("PeerFailure",)), "at once", "path and reason, on both sides"),
    Row(LANES, SOURCE, _DEAD, EARLY, None, AtDestination(UNTOUCHED, ("PeerFailure",)), "at once"),
    Row(LANES, SOURCE, _DEAD, (MOVE,), None, AtDestination(TORN, ("PeerFailure",)), "at once",
        "the next receive of the same step moves the rest"),
    Row(LANES, SOURCE, ("two killed",), (MOVE,), None, AtDestination(TORN, ("PeerFailure",)), "at once",
        "the source and a destination"),
    Row(LANES, SOURCE, _DEAD, (VERIFY,), None, _HEALED, "at once", "every message has been verified"),
    Row(LANES, SOURCE, ("stopped",), EARLY, None, AtDestination(UNTOUCHED, ("PeerFailure",)), "silent",
        woken=AtSource("*")),
    Row(LANES, SOURCE, ("stopped",), (MOVE,), None, AtDestination(TORN, ("PeerFailure",)), "silent",
        woken=AtSource("*")),
    Row(LANES, SOURCE, ("stopped",), (VERIFY,), None, _HEALED, "silent", woken=AtSource("*")),
    Row(LANES, SOURCE, ("deadline",), (MOVE,), AtSource("timed out"), AtDestination(TORN, ("PeerFailure",)),
        "deadline", "the destinations are told why"),
    Row(LANES, SOURCE, ("disallowed",), (MOVE,), AtSource("complete"), _HEALED, "in time",
        "it returns when nobody reads the state any more"),
    Row(LANES, SOURCE, ("nothing to send",), (BEFORE,), None, AtDestination(UNTOUCHED, ("TransferTimeout",)),
        "deadline"),
    Row(LANES, SOURCE, ("changing",), (MOVE,), AtSource("failed"), AtDestination(TORN,
        ("PeerFailure", "RemoteProtocolError")), "at once",
        "the paths are named on both sides, unless a digest tells the destination first"),
    Row(LANES, NETWORK, ("message damaged", "truncated", "doubled", "lane cut"), (MOVE,), AtSource("complete"),
        _HEALED, "in time", "fetched again, over a new lane if the old one is out of step"),
    Row(LANES, NETWORK, ("delayed", "throttled", "clock jumps"), (MOVE,), AtSource("complete"), _HEALED,
        "in time", "slow is not silent"),
    Row(LANES, NETWORK, ("always damaged",), (MOVE,), AtSource("failed"), AtDestination(TORN,
        ("RemoteProtocolError",)), "at once", "after three times"),
    Row(LANES, NETWORK, ("frame damaged",), (MANIFEST,), AtSource("refused dead failed"), AtDestination(UNTOUCHED,
        ("RemoteProtocolError",)), "at once"),
    Row(LANES, NETWORK, ("cut",), (MOVE,), AtSource("dead"), AtDestination(TORN, ("PeerFailure",)), "at once"),
    Row(LANES, NETWORK, ("frozen",), (MOVE,), AtSource("timed out dead"), AtDestination(TORN, ("PeerFailure",)),
        "silent"),
    Row(LANES, NETWORK, ("queue full",), (BEFORE,), AtSource("timed out"), AtDestination(UNTOUCHED,
        ("PeerFailure", "TransferTimeout")), "silent"),
]
# fmt: on

TABLE = _GROUP + _LANES


class Cell(NamedTuple):
    """One fault of one row in one phase."""

    row: Row
    fault: str
    phase: str

    def __str__(self) -> str:
        return f"{self.row.wire}-{self.row.who}-{self.fault}-{self.phase}".replace(" ", "_")


def cells(wire: str = "", who: str = "") -> list[Cell]:
    """The cells of one transport, or of one who has the fault, or all."""
    return [
        Cell(row, fault, phase)
        for row in TABLE
        if wire in ("", row.wire) and who in ("", row.who)
        for fault in row.faults
        for phase in row.phases
    ]


# ------------------------------------------------------------------------------------------ the page

HEADINGS = {
    (GROUP, DESTINATION): "### The destination fails",
    (GROUP, SOURCE): "### The source fails",
    (GROUP, NETWORK): "### The network, the clock",
    (LANES, DESTINATION): "### The destination fails, over lanes",
    (LANES, SOURCE): "### The source fails, over lanes",
    (LANES, NETWORK): "### The network, the clock, over lanes",
}
_MARKED = re.compile(r"(<!-- (group|lanes): from tests/faults/table.py -->\n).*?(<!-- end -->)", re.DOTALL)


def page(text: str) -> str:
    """The page with the tables as they are here."""
    return _MARKED.sub(lambda match: match[1] + "\n".join(_tables(match[2])) + match[3], text)


def _tables(wire: str) -> Iterator[str]:
    for (of, who), heading in HEADINGS.items():
        if of == wire:
            yield f"{heading}\n"
            yield "| fault | where | at the source | at the destination | its template | known | |"
            yield "|---|---|---|---|---|---|---|"
            yield from (_line(row) for row in TABLE if (row.wire, row.who) == (wire, who))
            yield ""


def _line(row: Row) -> str:
    faults = "; ".join(FAULTS[fault] for fault in row.faults)
    where = "any" if row.phases == ANY else ", ".join(PHASE_TEXT[phase] for phase in row.phases)
    template = row.destination.template if row.destination is not None else ""
    source, destination = _source(row.source), _destination(row.destination)
    if isinstance(row.woken, AtDestination):
        destination, template = f"{_destination(row.woken)}, once it goes on", row.woken.template
    elif row.woken is not None:
        source = "fails, once it goes on" if row.woken.raises else "raises nothing, once it goes on"
    return f"| {faults} | {where} | {source} | {destination} | {template} | {WHEN[row.when]} | {row.note} |"


def _source(end: AtSource | None) -> str:
    if end is None:
        return "—"
    outcome = " or ".join(f'`"{outcome}"`' for outcome in _outcomes(end)) if "pending" not in end.outcome else ""
    raises = f"raises `{end.raises}`" if end.raises else ""
    return ", ".join(part for part in (raises, outcome) if part)


def _outcomes(end: AtSource) -> list[str]:
    return [outcome for outcome in OUTCOMES if outcome in end.outcome]


def _destination(end: AtDestination | None) -> str:
    if end is None:
        return "—"
    return " or ".join(f"`{name}`" for name in end.raises) if end.raises else "returns the state"


OUTCOMES = ("complete", "refused", "failed", "dead", "timed out", "pending")


def main() -> None:
    PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
