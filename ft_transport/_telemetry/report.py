"""What a transfer tells: :class:`TransferReport`, its phases, and progress.

A report is filled in while the transfer runs and is complete once the call returned or raised.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch

from ft_transport._telemetry.causes import likely_cause
from ft_transport.errors import PeerFailure, TransferError, TransferTimeout, printable, reason_of

__all__ = [
    "Copies",
    "OnMismatch",
    "Outcome",
    "PeerReport",
    "PhaseCallback",
    "Progress",
    "ProgressCallback",
    "TransferReport",
    "counted",
    "first_of",
    "outcome_of",
    "peer_label",
    "shortened",
]

# What becomes of a leaf that does not fit the template's; a function gets its path, what was expected, and what the
# source has.
# "fresh" leaves the judgement to load_state_dict, which names what does not fit as its users know it.
Mismatch = Literal["fresh", "refuse"]
OnMismatch = Mismatch | Callable[[str, str, str], Mismatch]

# As peers and events name them, in full: a "sender" of the state is a receiver of answers.
Role = Literal["source", "destination"]
Outcome = Literal["pending", "complete", "refused", "failed", "dead", "timed out"]

# In their order. Not all are of each side: a source has nothing to rebuild, a destination nothing to describe.
PHASES = ("describe", "agree", "move", "verify", "rebuild")


@dataclass(frozen=True)
class Progress:
    """How far one transfer to or from one peer has come. Sizes in bytes.

    Several destinations over lanes have no known ranks (-1), and differ in ``peer_name``, what each calls itself.
    """

    role: Role
    step: int | None
    peer_rank: int
    nbytes_done: int
    nbytes_total: int
    peer_name: str = ""


ProgressCallback = Callable[[Progress], None]
# Called as a phase begins, with the report that it is of, in the thread that is in it: to let things happen there. What
# it raises ends the transfer, as an error of the phase's own would.
PhaseCallback = Callable[["PeerReport | TransferReport", str], None]


def peer_label(rank: int, name: str) -> str:
    """A peer in a few words."""
    # Over lanes a source with several destinations does not know their ranks, but each says its name.
    return f"rank {rank}" if rank >= 0 or not name else name


@dataclass
class Copies:
    """What a transport has found out about its ``state_dict`` callback.

    Attributes:
        paths: Of the leaves that it makes anew each time it is called; None if that is not known yet.
    """

    paths: frozenset[str] | None = None


@dataclass
class PeerReport:
    """How the transfer to or from one peer ended.

    Attributes:
        rank: Rank of the peer; -1 where it is not known (see ``LaneTransport.send_checkpoint``).
        outcome: ``"complete"`` (everything arrived and both sides agree), ``"refused"`` (the peer does
            not accept this state), ``"failed"`` (either side gave up), ``"dead"`` (the peer or the
            channel to it is gone), ``"timed out"``, or ``"pending"`` while it runs.
        phase: The phase it ended in.
        nbytes: Payload bytes that moved. As a source over lanes: that the peer says to have, those among them that it
            had before (its own report tells them apart, by ``nbytes_kept``).
        nbytes_wire: Bytes for payload, manifest and control, both directions.
        seconds: Seconds in each phase.
        reason: Why, where the outcome is not ``"complete"``.
        address: The peer's address that was used, empty where the transport has none.
        name: What the peer calls itself, empty if it does not.
        began: When each phase began, on the clock of ``time.perf_counter``.
        nbytes_direct: As a destination over lanes: of ``nbytes_wire``, bytes that were read from the supplier's
            memory, and did not go over TCP (see ``fabric`` of ``LaneTransport``).
        num_lanes: As a destination over lanes: connections that the state came by, at the most.
    """

    rank: int
    outcome: Outcome = "pending"
    phase: str = "describe"
    nbytes: int = 0
    nbytes_wire: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    address: str = ""
    name: str = ""
    began: dict[str, float] = field(default_factory=dict)
    nbytes_direct: int = 0
    num_lanes: int = 0

    def __setattr__(self, name: str, value: Any) -> None:
        # What the peer may have chosen is shown in logs, events and spans.
        # At each assignment, so that nobody who fills in a report has to think of it.
        object.__setattr__(self, name, printable(value) if name in _TEXTS else value)

    @property
    def label(self) -> str:
        """The peer in a few words."""
        called = peer_label(self.rank, self.name)
        return f"{called} at {self.address}" if self.address else called

    @contextmanager
    def enter(self, phase: str, role: Role, on_phase: PhaseCallback | None = None) -> Iterator[None]:
        """Be in ``phase``: add the time spent inside to its seconds, and mark it for ``torch.profiler``."""
        # Stays when the phase is left: where a transfer has ended is where it was last.
        self.phase = phase
        with _timed(self, phase, role, on_phase):
            yield


@dataclass
class TransferReport:
    """What one ``send_checkpoint`` or ``recv_checkpoint`` did.

    The phases are ``describe``, ``agree``, ``move``, ``verify`` and ``rebuild``; they are also ranges of
    ``torch.profiler``, named ``ft_transport::source::move`` and so on.

    Attributes:
        role: ``"source"`` or ``"destination"``.
        transport: Name of the transport.
        step: Step of the state, None in the API without steps.
        peers: One entry for each peer.
        num_leaves: Leaves of the state dict, tensors and plain values.
        num_messages: Messages that carry payload, to or from one peer.
        nbytes_total: Distinct bytes that the state refers to.
        nbytes_wire: Bytes for payload, manifest and control, both directions, over all peers.
        nbytes_in_place: Bytes of the state that are in the template's own memory, ``nbytes_kept`` among them.
        nbytes_fresh: Bytes that landed in newly allocated memory.
        nbytes_staged: Bytes that went through a bucket on this side (also counted above).
        seconds: Seconds in each phase; for a source, of the slowest destination.
        total_seconds: Seconds of the whole call.
        not_in_place: For each template leaf that could not take its bytes as they came: path and reason.
        unexpected_keys: Paths that the source has and the template lacks; they were allocated.
        missing_keys: Paths that the template has and the source lacks; they were left alone. Both as
            ``torch.nn.Module.load_state_dict`` means them.
        torn: Whether this transfer broke after the first byte had landed in the template.
        error: The error that ended the transfer, empty when there was none.
        nbytes_kept: Bytes that were in place already and did not travel.
        num_repaired: Messages that came damaged and were sent again.
        nbytes_copied: Bytes of ``nbytes_fresh`` that were copied into the template once all had arrived and agreed.
        began: When each phase that all peers share began, on the clock of ``time.perf_counter``.
        mismatched: For each leaf whose shape, dtype or kind is not the template's: path and ``"expected …, source has
            …"``. It was allocated, and the template's own was left alone.
    """

    role: Role
    transport: str
    step: int | None
    peers: list[PeerReport] = field(default_factory=list)
    num_leaves: int = 0
    num_messages: int = 0
    nbytes_total: int = 0
    nbytes_wire: int = 0
    nbytes_in_place: int = 0
    nbytes_fresh: int = 0
    nbytes_staged: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    total_seconds: float = 0.0
    not_in_place: dict[str, str] = field(default_factory=dict)
    unexpected_keys: list[str] = field(default_factory=list)
    missing_keys: list[str] = field(default_factory=list)
    torn: bool = False
    error: str = ""
    nbytes_kept: int = 0
    num_repaired: int = 0
    nbytes_copied: int = 0
    began: dict[str, float] = field(default_factory=dict)
    mismatched: dict[str, str] = field(default_factory=dict)

    # Without annotations, so that they are no fields: neither as_dict() nor a comparison sees them.
    _finished = False
    without_template = False  # whether a destination had none

    @property
    def complete(self) -> bool:
        """Whether every peer was served, or for a destination, whether the state arrived."""
        return not self.error and all(peer.outcome == "complete" for peer in self.peers)

    @property
    def gigabytes_per_second(self) -> float:
        """Payload bytes of one peer's transfer by the seconds of the whole call, in GB/s (10^9 bytes)."""
        # Of one peer, not of all: what the link, the disk or the state's owner sees as the speed of a heal. A source
        # with three destinations moves three times as much.
        nbytes = max((peer.nbytes for peer in self.peers), default=0)
        return nbytes / self.total_seconds / 1e9 if self.total_seconds else 0.0

    @property
    def in_place_share(self) -> float:
        """Share of the state's bytes that landed in the template's own memory, 0 to 1."""
        return self.nbytes_in_place / self.nbytes_total if self.nbytes_total else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON or a structured log."""
        return {
            **dataclasses.asdict(self),
            "complete": self.complete,
            "gigabytes_per_second": self.gigabytes_per_second,
            "in_place_share": self.in_place_share,
        }

    def summary(self) -> str:
        """The report in one line, as it is logged."""
        step = "" if self.step is None else f" step {self.step}"
        direction = "to" if self.role == "source" else "from"
        peers = ", ".join(
            f"{peer.label} {peer.outcome}" + (f" ({peer.phase}: {shortened(peer.reason)})" if peer.reason else "")
            for peer in self.peers
        )
        # Only those that were reached, in the order of PHASES, which is that of time.
        phases = " ".join(f"{name} {self.seconds[name]:.3f}" for name in PHASES if name in self.seconds)
        landed, size = "", _megabytes(self.nbytes_total)
        # Of a failed transfer how far it came is what people ask for first.
        if not self.complete:
            moved = max((peer.nbytes for peer in self.peers), default=0) + self.nbytes_kept
            size = f"{moved / 1e6:.1f} of {size}"
        # Until it is complete the report says where bytes shall land, not where they have.
        if self.role == "destination" and not self.error:
            landed = f", {self.in_place_share:.0%} in place, {_megabytes(self.nbytes_fresh)} fresh"
            # Also where all has landed in place: a key that is on one side only is what load_state_dict may raise for.
            if causes := self._causes():
                landed += f" ({shortened(causes)})"
        # What ended the call, where it was no peer's doing.
        own = f" {shortened(self.error)}" if self.error and not any(peer.reason for peer in self.peers) else ""
        return printable(
            f"{self.transport}{step} {direction} {peers}: {size} in "
            f"{self.total_seconds:.3f} s ({self.gigabytes_per_second:.2f} GB/s), "
            f"{self.num_messages} messages{landed} [{phases}]{own}"
        )

    def gaps(self) -> str:
        """What only one side has, and the likely cause; empty if there is nothing."""
        unexpected, missing = self.unexpected_keys, self.missing_keys
        parts = []
        if unexpected:
            parts.append(f"unexpected keys: the template lacks {counted(len(unexpected))}, first {unexpected[0]}")
        if missing:
            parts.append(f"missing keys: the source lacks {counted(len(missing))} of the template, first {missing[0]}")
        cause = likely_cause(unexpected, missing)
        return "; ".join(parts) + (f": {cause}" if cause else "")

    def _causes(self) -> str:
        """Why not all has landed in place, or may not be loaded, as far as the template is the reason."""
        if self.without_template:
            return "the transport was given no state_dict to receive into"
        unfit = "does not fit" if len(self.mismatched) == 1 else "do not fit"
        causes = [self.gaps(), first_of(self.mismatched, unfit), first_of(self.not_in_place, "not received in place")]
        return "; ".join(filter(None, causes))

    @contextmanager
    def phase(self, name: str, on_phase: PhaseCallback | None = None) -> Iterator[None]:
        """Add the time spent inside to ``seconds[name]`` and mark it for ``torch.profiler``."""
        with _timed(self, name, self.role, on_phase):
            yield

    def finish(self, total_seconds: float, error: BaseException | None) -> bool:
        """Sum up over the peers, once the call is over; False, and nothing changes, if that was done before."""
        # Over lanes two threads may find that it is over: the one that called, and the listener's.
        if self._finished:
            return False
        self._finished = True
        self.total_seconds = total_seconds
        self.error = "" if error is None else printable(f"{_public_name(error)}: {error}")
        for peer in self.peers:
            if peer.outcome == "pending":
                self._end(peer, error)
            # Whoever noted the outcome left the reason to the error that it raised.
            elif peer.outcome != "complete" and not peer.reason and error is not None:
                peer.reason = reason_of(error)
        # Summed up here and not while bytes move: many threads fill in peers, and each has one of its own.
        self.nbytes_wire = sum(peer.nbytes_wire for peer in self.peers)
        for name in PHASES:
            # They run side by side, so the slowest is how long the call was in that phase.
            slowest = max((peer.seconds.get(name, 0.0) for peer in self.peers), default=0.0)
            if slowest or name in self.seconds:
                self.seconds[name] = self.seconds.get(name, 0.0) + slowest
        return True

    def _end(self, peer: PeerReport, error: BaseException | None) -> None:
        """Note what the end of the call was for a peer whose transfer was under way, or had not begun."""
        # A peer whose own transfer had not begun is told by the phase that all share: the description failed, and so
        # did all of them.
        last = max(self.began, key=self.began.__getitem__, default=peer.phase)
        peer.phase = getattr(error, "phase", "") or (last if peer.phase == "describe" else peer.phase)
        peer.reason = peer.reason or ("the call is over" if error is None else reason_of(error))
        peer.outcome = outcome_of(error)


def outcome_of(error: BaseException | None, *, cancelled: bool = False) -> Outcome:
    """How the transfer with a peer has ended, by what it ended with.

    Args:
        error: None for one that the end of the call has cut short.
        cancelled: Whether this side has cut the channel itself: then a channel that breaks says nothing of the peer.
    """
    if isinstance(error, TransferError) and error._outcome:
        return cast(Outcome, error._outcome)
    if isinstance(error, TransferTimeout):
        return "timed out"
    if isinstance(error, PeerFailure) and not cancelled:
        return "dead"
    return "failed"


_TEXTS = frozenset({"reason", "address", "name"})


def counted(num_leaves: int) -> str:
    """How many leaves there are, in words."""
    return "1 leaf" if num_leaves == 1 else f"{num_leaves} leaves"


def first_of(found: Mapping[str, str], what: str) -> str:
    """How many leaves something is true of, by path and reason, and the first; empty for none.

    That is enough to see what was forgotten. Whoever shows it has all of them.
    """
    if not found:
        return ""
    path, reason = next(iter(found.items()))
    return f"{counted(len(found))} {what}, first {path}: {reason}"


def _public_name(error: BaseException) -> str:
    """The name of an error's class; of one of ours, the one that callers know it by."""
    # What callers can name in an ``except``.
    public = (cls.__name__ for cls in type(error).__mro__ if cls.__module__ == TransferError.__module__)
    return next(public, type(error).__name__)


@contextmanager
def _timed(
    report: PeerReport | TransferReport, phase: str, role: Role, on_phase: PhaseCallback | None
) -> Iterator[None]:
    seconds, start = report.seconds, time.perf_counter()
    # The first time counts for spans: a phase that is entered again goes on.
    report.began.setdefault(phase, start)
    try:
        if on_phase is not None:
            on_phase(report, phase)
        # Costs a microsecond or two where no profiler runs, and there are five for each transfer.
        with torch.profiler.record_function(f"ft_transport::{role}::{phase}"):
            yield
    finally:
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


def shortened(text: str) -> str:
    """A text for people: of twenty thousand paths that disagree the first few say it all."""
    # The error keeps all of it, for whoever compares two states by it.
    rest = len(text) - _MAX_SHOWN
    return text if rest <= 0 else f"{text[:_MAX_SHOWN]}… and {rest} characters more, which are in the error"


# Of a reason, in the log and in events, in characters.
_MAX_SHOWN = 2_000


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"
