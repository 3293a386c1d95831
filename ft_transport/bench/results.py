"""What was seen, medians and ratios. Pure."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from ft_transport.bench.plan import Case

__all__ = ["MEMMOVE", "Row", "Sample", "Size", "compare", "exit_status", "summarise"]

# The limit of all that is moved.
MEMMOVE = "memmove"

Status = Literal["equal", "limit", "WRONG", "failed", "unsupported"]


@dataclass
class Sample:
    """What one rank saw in one turn.

    Attributes:
        turn: Index of the turn.
        rank: 0 for the source.
        seconds: From the barrier to the return of the call.
        cpu_seconds: Of all threads of the process, until the last rank's call has returned.
        nbytes_memory: Resident memory at the peak beyond that before, None where the system does not tell.
        nbytes_wire: Bytes over the loopback interface meanwhile, None on a receiver or between two machines.
        in_place: How many tensors landed at the template's own addresses, and of how many.
        wrong: Paths where the received state is not the source's, ten at most.
        error: What the transport raised.
    """

    turn: int
    rank: int
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    nbytes_memory: int | None = None
    nbytes_wire: int | None = None
    in_place: tuple[int, int] = (0, 0)
    wrong: list[str] = field(default_factory=list)
    error: str = ""

    def to_json(self) -> str:
        """The sample as text, for the store."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> Sample:
        """The inverse of :meth:`to_json`."""
        fields = json.loads(text)
        # JSON has no tuples, and gives a list back.
        return Sample(**{**fields, "in_place": tuple(fields["in_place"])})


@dataclass(frozen=True)
class Size:
    """How large a state is. ``nbytes`` counts shared bytes once."""

    nbytes: int = 0
    num_tensors: int = 0
    num_storages: int = 0


@dataclass
class Row:
    """One transport on one case.

    Attributes:
        status: ``"equal"``: every received state was the source's, bit for bit. ``"limit"``: a limit, whose bytes were,
            if it brings any. ``"WRONG"``: at least one was not. ``"failed"``: the transport raised, hung, or ended its
            process. ``"unsupported"``: not for this mode, or a limit that failed here.
        note: Why, where the status is not ``"equal"``.
        seconds: One value for each counted round: of the slowest receiver.
        nbytes_wire: Least over the counted rounds, since other traffic can only add to it.
        cpu_seconds_source: Median over the counted rounds. ``cpu_seconds_receiver`` likewise, of the receiver that took
            most.
        nbytes_memory_source: At the peak, beside the state; median over the counted rounds.
            ``nbytes_memory_receiver`` likewise, of the receiver that took most, and beside the state in either mode.
        in_place_share: Share of the tensors that landed at the template's addresses, the least of all turns.
        reference: Transport that ``ratio`` is against.
        ratio: How many times as fast as the reference: the median of the ratios of each round.
        limit: What bounds it.
        of_limit: Share of the limit's speed, likewise. ``of_memmove`` of a copy within the receiver's memory.
        samples: All that was seen, by round; the first is the warm-up.
    """

    case: Case
    transport: str
    status: Status
    size: Size = field(default_factory=Size)
    note: str = ""
    seconds: list[float] = field(default_factory=list)
    nbytes_wire: int | None = None
    cpu_seconds_source: float | None = None
    cpu_seconds_receiver: float | None = None
    nbytes_memory_source: int | None = None
    nbytes_memory_receiver: int | None = None
    in_place_share: float | None = None
    reference: str = ""
    ratio: float | None = None
    limit: str = ""
    of_limit: float | None = None
    of_memmove: float | None = None
    samples: list[list[Sample]] = field(default_factory=list)

    @property
    def median_seconds(self) -> float:
        """Median over the counted rounds."""
        return median(self.seconds)

    @property
    def gigabytes_per_second(self) -> float:
        """Distinct bytes of the state by the median, in GB/s (10^9 bytes)."""
        return self.size.nbytes / self.median_seconds / 1e9

    def as_dict(self) -> dict[str, Any]:
        """The row as plain values, for JSON."""
        fields = dataclasses.asdict(self)
        spread: dict[str, float] = {}
        if self.seconds:
            spread = {
                "median_seconds": self.median_seconds,
                "min_seconds": min(self.seconds),
                "max_seconds": max(self.seconds),
                "gigabytes_per_second": self.gigabytes_per_second,
            }
        # Flat, so that a data frame or jq takes it as it is; every sample is in it, for whoever doubts a median.
        return {**fields.pop("case"), **fields.pop("size"), **fields, **spread}


def summarise(
    case: Case, transport: str, size: Size, samples: list[list[Sample]], warm_up: int = 1, is_limit: bool = False
) -> Row:
    """The row of a transport that took all its turns.

    Args:
        samples: By round, the warm-up first, then by rank.
        warm_up: How many rounds do not count.
        is_limit: Whether it is no transport.
    """
    counted = samples[warm_up:]
    row = Row(case, transport, "limit" if is_limit else "equal", size, samples=samples)
    # The slowest receiver, since the step goes on when all are healed. Not the source: some sends return when the
    # kernel has the last bytes (up to 2 MiB were seen to count as sent to a receiver that was frozen), others when
    # they arrived.
    row.seconds = [max(sample.seconds for sample in turn[1:]) for turn in counted]
    # Times have noise on both sides, so they get a median. Bytes of others on the interface only add: so the least.
    row.nbytes_wire = min(_known(sample.nbytes_wire for turn in counted for sample in turn), default=None)
    row.cpu_seconds_source = median(turn[0].cpu_seconds for turn in counted)
    row.cpu_seconds_receiver = median(max(sample.cpu_seconds for sample in turn[1:]) for turn in counted)
    row.nbytes_memory_source = _middle([turn[0].nbytes_memory for turn in counted])
    taken = _middle([max(_known(sample.nbytes_memory for sample in turn[1:]), default=None) for turn in counted])
    # A state that was received afresh is no more beside itself than one in place.
    row.nbytes_memory_receiver = taken if taken is None or case.mode == "in-place" else max(0, taken - size.nbytes)
    # The warm-up too: a state that arrives wrong the first time is wrong.
    received = [sample for turn in samples for sample in turn[1:]]
    if case.mode == "in-place":
        row.in_place_share = min(_share(*sample.in_place) for sample in received)
    wrong = [path for sample in received for path in sample.wrong]
    if wrong:
        row.status = "WRONG"
        row.note = f"the received state is not the source's at {', '.join(sorted(set(wrong))[:3])}"
    return row


def compare(
    rows: Sequence[Row], reference: str, ours: Sequence[str], limits: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Set how every row of a case compares with the reference, and with what bounds it.

    Args:
        reference: Where it has no result, the fastest of those that are neither ours nor a limit takes its place.
        limits: What bounds a transport; the first that has a result counts.
    """
    # Only those that were correct: to be faster than a transport which delivers something else is no merit.
    correct = {row.transport: row for row in rows if row.status in ("equal", "limit")}
    peers = [row for row in correct.values() if row.status == "equal" and row.transport not in ours]
    peers.sort(key=lambda row: row.median_seconds)
    base = correct.get(reference, peers[0] if peers else None)
    for name, row in correct.items():
        if base is not None:
            row.reference = base.transport
        row.ratio = _times(row, base)
        row.of_memmove = _times(row, correct.get(MEMMOVE))
        row.limit = next((limit for limit in (limits or {}).get(name, ()) if limit in correct), "")
        row.of_limit = _times(row, correct.get(row.limit))


def _times(row: Row, other: Row | None) -> float | None:
    """How many times as fast as the other one."""
    # Median of ratios, not ratio of medians: what slows the machine down for a minute hits both of one round and
    # cancels.
    return None if other is None else median(b / a for a, b in zip(row.seconds, other.seconds, strict=True))


def exit_status(rows: Sequence[Row]) -> int:
    """1 if a state arrived wrong, else 3 if a transport failed, else 0."""
    statuses = {row.status for row in rows}
    # Wrong bytes outweigh a failure. Not 2: that is argparse's, for a command line which it does not understand.
    return 1 if "WRONG" in statuses else 3 if "failed" in statuses else 0


def _middle(values: list[int | None]) -> int | None:
    known = _known(values)
    return round(median(known)) if known else None


def _known(values: Any) -> list[int]:
    return [value for value in values if value is not None]


def _share(landed: int, total: int) -> float:
    return landed / total if total else 1.0
