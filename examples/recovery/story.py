"""What happened, told from the events alone: each replica's state, each recovery's times, and the checks."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from recovery.cluster import Event

__all__ = ["Check", "LossPoint", "Recovery", "Row", "Standby", "Story"]

MAX_WINDOW = 10  # steps on each side of the comparison of losses


@dataclass(frozen=True)
class LossPoint:
    """One replica's loss, in nats per character, at a step that it took part in."""

    time: float
    step: int
    loss: float


@dataclass
class Row:
    """One replica as the live view shows it.

    Attributes:
        state: ``"starting"``, ``"ready"``, ``"syncing"`` (the first weights, at step 0), ``"training"``,
            ``"dead"``, ``"healing"``, ``"healed"`` (until its next commit) or ``"finished"``.
        nbytes_done: Bytes received so far of the transfer that runs or ran last.
        nbytes_total: Bytes of that transfer; 0 when there was none, or while they are unknown.
        received: The last transfer's ``received`` event.
        finished: The ``finished`` event.
    """

    replica: int
    incarnation: int = 0
    state: str = "starting"
    step: int = 0
    participants: int = 0
    losses: list[LossPoint] = field(default_factory=list)
    commits: list[float] = field(default_factory=list)
    nbytes_done: int = 0
    nbytes_total: int = 0
    received: dict[str, Any] | None = None
    finished: dict[str, Any] | None = None


@dataclass
class Standby:
    """A process that waits for a replica to die. Times are seconds after the origin, None while not reached.

    Attributes:
        waiting: When it had imported and built everything.
        handed_over: When it took the place of ``replica``.
    """

    started: float
    interpreter: float | None = None
    imported: float | None = None
    waiting: float | None = None
    handed_over: float | None = None
    replica: int | None = None

    @property
    def state(self) -> str:
        """``"starting"``, ``"waiting"`` or ``"handed over"``."""
        if self.handed_over is not None:
            return "handed over"
        return "starting" if self.waiting is None else "waiting"


@dataclass
class Recovery:
    """One kill and the way back. Times are seconds after the origin, None while not reached.

    The moments come in the order of the fields; ``durations`` is their differences, so they add up. A standby
    had imported and built all before the kill: what it starts with is the Manager.
    """

    replica: int
    killed_after_step: int
    killed: float
    standby: bool = False
    started: float | None = None
    interpreter: float | None = None
    imported: float | None = None
    ready: float | None = None
    receiving: float | None = None
    received: float | None = None
    healed: float | None = None
    healed_at_step: int | None = None
    transfer: dict[str, Any] = field(default_factory=dict)
    same_addresses: bool | None = None
    failed_attempts: int = 0
    pause_at_kill: float = 0.0
    pause_at_heal: float = 0.0

    def durations(self) -> dict[str, float]:
        """Seconds of each stretch between SIGKILL and the first commit, and their total; {} until healed."""
        stretches = {
            "restart": (self.killed, self.started),
            "interpreter": (self.started, self.interpreter),
            "imports": (self.interpreter, self.imported),
            "model_and_manager": (self.imported, self.ready),
            "quorum": (self.ready, self.receiving),
            "transfer": (self.receiving, self.received),
            "first_commit": (self.received, self.healed),
            "total": (self.killed, self.healed),
        }
        known = {name: (a, b) for name, (a, b) in stretches.items() if a is not None and b is not None}
        return {name: b - a for name, (a, b) in known.items()} if len(known) == len(stretches) else {}

    @property
    def in_place_share(self) -> float:
        """Share of the received tensors' bytes that lie at the template's addresses, 0 to 1."""
        nbytes = self.transfer.get("nbytes", 0)
        return self.transfer["in_place_nbytes"] / nbytes if nbytes else 0.0

    @property
    def gigabytes_per_second(self) -> float:
        """Bytes of the state's tensors by the seconds of the whole ``recv_checkpoint``, in GB/s (10^9)."""
        seconds = self.transfer.get("seconds", 0.0)
        return self.transfer["nbytes"] / seconds / 1e9 if seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The recovery for ``summary.json``."""
        return {
            **dataclasses.asdict(self),
            "durations": self.durations(),
            "in_place_share": self.in_place_share,
            "gigabytes_per_second": self.gigabytes_per_second,
        }


@dataclass(frozen=True)
class Check:
    """Something the demo promises: whether it held, None where it was not asked for, and the figures."""

    name: str
    passed: bool | None
    detail: str


class Story:
    """Follows the events. Nothing in here reads a clock or touches a process.

    Args:
        num_replicas: Replicas of the job.
        num_kills: Kills that are planned.
        in_place: Whether all bytes of a heal are to land in the template.
    """

    def __init__(self, num_replicas: int, num_kills: int, in_place: bool) -> None:
        self.rows = [Row(replica) for replica in range(num_replicas)]
        self.recoveries: list[Recovery] = []
        self.standbys: list[Standby] = []
        self.num_kills = num_kills
        self._in_place = in_place

    @property
    def healthy(self) -> bool:
        """Whether every replica trains, and every kill so far has healed."""
        return all(row.state == "training" for row in self.rows) and all(
            recovery.healed is not None for recovery in self.recoveries
        )

    @property
    def finished(self) -> bool:
        """Whether every replica has reached its last step and told its state's digest."""
        return all(row.finished is not None for row in self.rows)

    @property
    def standby_waits(self) -> bool:
        """Whether a standby could take over at once."""
        return bool(self.standbys) and self.standbys[-1].state == "waiting"

    @property
    def step(self) -> int:
        """The last step that any replica committed."""
        return max(row.step for row in self.rows)

    def step_seconds(self) -> float:
        """Median seconds between two commits of the last ten, 0 before there are two."""
        times = max((row.commits for row in self.rows), key=len)[-MAX_WINDOW:]
        gaps = [later - earlier for earlier, later in pairwise(times)]
        return statistics.median(gaps) if gaps else 0.0

    def apply(self, event: Event) -> None:
        """Take in one event. What a killed incarnation had still sent counts as loss and commit only."""
        if event.replica is None:
            self._apply_to_standby(event)
            return
        row = self.rows[event.replica]
        if event.event == "committed":
            self._commit(row, event)
        begins = event.event in ("started", "handed_over")
        if begins:
            row.incarnation = event.incarnation
        alive = row.state != "dead" or begins
        if event.incarnation == row.incarnation and alive:
            handler = getattr(self, f"_on_{event.event}", None)
            if handler is not None:
                handler(row, event)

    def _apply_to_standby(self, event: Event) -> None:
        if event.event == "started":
            self.standbys.append(Standby(event.time))
        elif event.event in ("interpreter", "imported", "waiting"):
            setattr(self.standbys[-1], event.event, event.time)

    def _commit(self, row: Row, event: Event) -> None:
        row.commits.append(event.time)
        row.step = event.fields["step"]
        row.participants = event.fields["participants"]
        if row.state == "dead":
            self.recoveries[-1].killed_after_step = row.step
        if event.fields["loss"] is not None:
            row.losses.append(LossPoint(event.time, row.step, event.fields["loss"]))

    def _recovery(self, row: Row) -> Recovery | None:
        """The recovery that this incarnation of a replica is; None for the first."""
        mine = [recovery for recovery in self.recoveries if recovery.replica == row.replica]
        return mine[-1] if mine and row.incarnation else None

    def _mark(self, row: Row, event: Event) -> None:
        recovery = self._recovery(row)
        if recovery is not None and recovery.healed is None:
            setattr(recovery, event.event, event.time)

    def _on_started(self, row: Row, event: Event) -> None:
        row.state = "starting"
        row.received = None
        self._mark(row, event)

    def _on_handed_over(self, row: Row, event: Event) -> None:
        standby = self.standbys[-1]
        standby.handed_over, standby.replica = event.time, event.replica
        row.state = "starting"
        row.received = None
        recovery = self._recovery(row)
        assert recovery is not None
        recovery.standby = True
        recovery.started = recovery.interpreter = recovery.imported = event.time

    def _on_interpreter(self, row: Row, event: Event) -> None:
        self._mark(row, event)

    def _on_imported(self, row: Row, event: Event) -> None:
        self._mark(row, event)

    def _on_ready(self, row: Row, event: Event) -> None:
        row.state = "ready"
        self._mark(row, event)

    def _on_committed(self, row: Row, event: Event) -> None:
        # "healed" follows the first commit at once; until it came, the heal is not over.
        if row.state not in ("healing", "syncing"):
            row.state = "training"

    def _on_killed(self, row: Row, event: Event) -> None:
        row.state = "dead"
        row.nbytes_done = row.nbytes_total = 0
        self.recoveries.append(Recovery(row.replica, row.step, event.time))

    def _on_receiving(self, row: Row, event: Event) -> None:
        row.state = "healing" if row.incarnation or row.step else "syncing"
        row.received = None
        row.nbytes_done = row.nbytes_total = 0
        self._mark(row, event)

    def _on_progress(self, row: Row, event: Event) -> None:
        row.nbytes_done = event.fields["nbytes_done"]
        row.nbytes_total = event.fields["nbytes_total"]

    def _on_received(self, row: Row, event: Event) -> None:
        row.received = event.fields
        row.nbytes_done = row.nbytes_total = event.fields["nbytes"]
        self._mark(row, event)
        recovery = self._recovery(row)
        if recovery is not None and recovery.healed is None:
            recovery.transfer = event.fields

    def _on_transfer_failed(self, row: Row, event: Event) -> None:
        recovery = self._recovery(row)
        if recovery is not None and event.fields["role"] == "destination":
            recovery.failed_attempts += 1

    def _on_healed(self, row: Row, event: Event) -> None:
        row.state = "healed" if row.state == "healing" else "training"
        recovery = self._recovery(row)
        if recovery is None or recovery.healed is not None:
            return
        recovery.healed = row.commits[-1]
        recovery.healed_at_step = event.fields["step"]
        recovery.same_addresses = event.fields["same_addresses"]

    def _on_finished(self, row: Row, event: Event) -> None:
        row.state = "finished"
        row.finished = event.fields

    def measure_pauses(self) -> None:
        """Fill in the survivors' longest gap between two commits around each kill and each heal, in seconds."""
        for recovery in self.recoveries:
            others = [row.commits for row in self.rows if row.replica != recovery.replica]
            if recovery.ready is None or recovery.healed is None:
                continue
            recovery.pause_at_kill = max(_longest_gap(t, recovery.killed, recovery.ready) for t in others)
            recovery.pause_at_heal = max(_longest_gap(t, recovery.ready, recovery.healed) for t in others)

    def standby_share(self) -> tuple[float, float] | None:
        """Mean seconds from SIGKILL to the first commit, with a standby and without; None if not both were seen."""
        totals: dict[bool, list[float]] = {True: [], False: []}
        for recovery in self.recoveries:
            if durations := recovery.durations():
                totals[recovery.standby].append(durations["total"])
        if not totals[True] or not totals[False]:
            return None
        return statistics.fmean(totals[True]), statistics.fmean(totals[False])

    def mean_losses(self) -> tuple[float, float, int] | None:
        """Mean loss of all replicas before the first kill and at the end, and of how many steps each.

        None when nothing was killed, or too little was trained.
        """
        last = min(row.step for row in self.rows)
        kill = self.recoveries[0].killed_after_step if self.recoveries else last // 2
        window = min(MAX_WINDOW, kill, last - kill)
        if window < 1:
            return None
        before = self._losses(kill - window, kill)
        after = self._losses(last - window, last)
        return (statistics.fmean(before), statistics.fmean(after), window) if before and after else None

    def _losses(self, begin: int, end: int) -> list[float]:
        """Losses of the steps after ``begin`` up to and with ``end``."""
        return [point.loss for row in self.rows for point in row.losses if begin < point.step <= end]

    def checks(self) -> list[Check]:
        """All that the demo promises, judged at its end."""
        return [self._check_healed(), self._check_equal(), self._check_in_place(), self._check_loss()]

    def _check_healed(self) -> Check:
        healed = [recovery for recovery in self.recoveries if recovery.healed is not None]
        detail = f"{len(healed)} of {self.num_kills} kills healed"
        attempts = sum(recovery.failed_attempts for recovery in self.recoveries)
        if attempts:
            detail += f", after {attempts} failed transfers"
        return Check("every killed replica healed", len(healed) == self.num_kills, detail)

    def _check_equal(self) -> Check:
        name = "weights, optimizer states and steps are equal bit for bit"
        if not self.finished:
            return Check(name, False, "not every replica reached the last step")
        finals = [row.finished for row in self.rows if row.finished is not None]
        digests = {(final["digest"], final["step"]) for final in finals}
        first = finals[0]
        if len(digests) == 1:
            what = f"{first['num_tensors']} tensors, {first['num_values']} other values"
            detail = f"sha256 {first['digest'][:12]} on all {len(finals)} ({what}) after step {first['step']}"
        else:
            detail = ", ".join(f"{final['digest'][:12]} after step {final['step']}" for final in finals)
        return Check(name, len(digests) == 1, detail)

    def _check_in_place(self) -> Check:
        name = "received at the template's own addresses"
        if not self._in_place or not self.recoveries:
            shares = [f"{recovery.in_place_share:.0%}" for recovery in self.recoveries]
            return Check(name, None, f"not asked for; in place: {', '.join(shares) or 'no heal'}")
        passed = all(
            recovery.healed is not None
            and recovery.same_addresses
            and recovery.transfer["in_place_nbytes"] == recovery.transfer["nbytes"]
            for recovery in self.recoveries
        )
        shares = [f"{recovery.in_place_share:.1%}" for recovery in self.recoveries]
        same = "unchanged" if all(r.same_addresses for r in self.recoveries) else "CHANGED"
        return Check(name, passed, f"{', '.join(shares)} of the bytes; all tensors' addresses {same} by the heal")

    def _check_loss(self) -> Check:
        name = "the loss went on falling"
        means = self.mean_losses()
        if means is None:
            return Check(name, False, "too few steps to judge")
        before, after, window = means
        steps = f"{window} steps" if window > 1 else "step"
        where = "before the kill" if self.recoveries else "in the middle"
        detail = f"mean of all replicas {before:.3f} in the last {steps} {where}, {after:.3f} in the last {steps}"
        return Check(name, after < before, detail)


def _longest_gap(times: list[float], begin: float, end: float) -> float:
    """The longest gap between consecutive times that shares a moment with ``begin`` to ``end``."""
    gaps = ((earlier, later) for earlier, later in pairwise(times) if earlier < end and later > begin)
    return max((later - earlier for earlier, later in gaps), default=0.0)
