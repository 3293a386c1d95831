"""Runs a job under a schedule: arms faults, strikes those that replicas cannot carry out themselves, starts anew."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import signal
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from .events import Event, encode
from .processes import Cluster
from .roster import Roster
from .schedule import Fault, Plan, spared
from .settings import Settings
from .striker import claim

__all__ = ["Director"]

# Seconds for which all replicas train before one is killed, so that there is a heal for a fault to strike.
_PATIENCE = 0.5
# Seconds after which a fault that has not found its heal does without: it strikes a replica that trains.
_MUCH_PATIENCE = 15.0
# Faults that wait at the same time.
_MAX_ARMED = 3
# Seconds without an event after which a replica that is not frozen counts as hanging.
_SILENT = 30.0
# Steps that all replicas commit together, after the last fault, before the run ends; and seconds until they have.
_CALM_STEPS = 20
_CALM_SECONDS = 60.0
_EXIT_SECONDS = 15.0
_POLL = 0.25


class Director:
    """One run.

    Args:
        plan: What the schedule was drawn from.
        faults: The schedule.
        settings: Of the job.
        cluster: The replicas.
        folder: Where faults are claimed.
        log: Every event goes there, when it is heard.
        show: Called now and then with a line for people.

    Attributes:
        events: All events so far.
    """

    def __init__(
        self,
        plan: Plan,
        faults: list[Fault],
        settings: Settings,
        cluster: Cluster,
        folder: Path,
        log: IO[str],
        show: Callable[[str], None],
    ) -> None:
        self.events: list[Event] = []
        self._plan = plan
        self._settings = settings
        self._cluster = cluster
        self._folder = folder
        self._log = log
        self._show = show
        self._roster = Roster(settings.replicas)
        self._due = list(reversed(faults))
        self._armed: dict[int, tuple[Fault, float]] = {}  # with the time at which it was
        self._rested = 0.0  # when all replicas began to train
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._counts = {"strike": 0, "commit": 0, "heal": 0}
        self._finishing = False
        self._next_line = 0.0

    def run(self) -> None:
        """The whole run. Faults come for as long as the plan says; then all heal and end."""
        for replica in range(self._settings.replicas):
            self._start(replica)
        while self._cluster.now() < self._plan.seconds:
            self._turn()
            self._arm()
        self._calm()

    # ------------------------------------------------------------------------------------ events

    def _turn(self) -> None:
        """Hear, and do what is due."""
        limit = self._timers[0][0] - self._cluster.now() if self._timers else _POLL
        for event in self._cluster.hear(min(_POLL, max(0.0, limit))):
            self._hear(event)
        while self._timers and self._timers[0][0] <= self._cluster.now():
            heapq.heappop(self._timers)[2]()
        for replica, member in list(self._cluster.members.items()):
            if member.over:
                self._gone(replica)
        self._look_for_hangs()
        if self._cluster.now() >= self._next_line:
            self._next_line = self._cluster.now() + 5.0
            self._show(self._line())

    def _note(self, event: Event) -> None:
        self.events.append(event)
        self._log.write(encode(event))
        self._roster.hear(event)

    def _post(self, replica: int, name: str, **fields: Any) -> None:
        """An event of the director's own."""
        member = self._cluster.members.get(replica)
        life = member.life if member is not None else (replica, -1)
        self._note(Event(self._cluster.now(), *life, name, fields))

    def _hear(self, event: Event) -> None:
        self._note(event)
        if event.name == "commit":
            self._counts["commit"] = max(self._counts["commit"], event["step"])
        elif event.name == "end" and event["call"] == "receive" and not event["error"]:
            self._counts["heal"] += 1
        elif event.name == "strike":
            # A destination has struck itself.
            fault = Fault(**event["fault"])
            self._disarm(fault)
            self._counts["strike"] += 1
            self._follow(fault.kind, fault.frozen, event.replica)
        elif event.name == "trigger":
            self._pull(event)

    def _gone(self, replica: int) -> None:
        """A process has ended: say how, and start the replica again."""
        member = self._cluster.members[replica]
        status = member.end()
        self._post(replica, "gone", status=status)
        del self._cluster.members[replica]
        if not self._finishing:
            self._start(replica)

    def _start(self, replica: int) -> None:
        member = self._cluster.start(replica)
        self._post(replica, "started")
        for fault, _ in self._armed.values():
            member.tell({"arm": dataclasses.asdict(fault)})

    def _at(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (self._cluster.now() + seconds, next(self._order), action))

    # ------------------------------------------------------------------------------------ faults

    def _arm(self) -> None:
        """Arm what is due, and let those that have waited long enough strike whoever trains."""
        now = self._cluster.now()
        while self._due and self._due[-1].at <= now and len(self._armed) < _MAX_ARMED:
            fault = self._due.pop()
            self._armed[fault.number] = fault, now
            if fault.phase != "train":
                self._cluster.tell({"arm": dataclasses.asdict(fault)})
        if not all(row.current for row in self._roster.rows):
            self._rested = now
        for fault, since in list(self._armed.values()):
            if fault.phase == "train" or now - since > _MUCH_PATIENCE:
                self._strike_in_training(fault)
                return
        if self._armed and now - self._rested > _PATIENCE:
            self._open(next(fault for fault, _ in self._armed.values()))

    def _disarm(self, fault: Fault) -> None:
        if self._armed.pop(fault.number, None) is not None:
            self._cluster.tell({"disarm": fault.number})

    def _open(self, fault: Fault) -> None:
        """Kill a replica that trains, so that there is a heal; the fault waits on."""
        victim = self._victim(fault, "kill")
        if victim is not None:
            self._rested = self._cluster.now()
            self._strike(fault, "kill", victim, role="trainer", phase="train", share=0.0, opens=True)

    def _strike_in_training(self, fault: Fault) -> None:
        """Strike the fault's own replica, or the next one that may be struck now; else wait on."""
        kind = "kill" if fault.kind.startswith("cut") else fault.kind
        victim = self._victim(fault, kind)
        if victim is not None and claim(self._folder, fault.number):
            self._disarm(fault)
            self._rested = self._cluster.now()
            self._strike(fault, kind, victim, role="trainer", phase="train", share=0.0)

    def _victim(self, fault: Fault, kind: str) -> int | None:
        """The fault's own replica, or the next one that trains and may be struck."""
        order = [(fault.replica + i) % self._settings.replicas for i in range(self._settings.replicas)]
        return next((i for i in order if self._roster.rows[i].current and self._may(kind, i)), None)

    def _may(self, kind: str, victim: int) -> bool:
        """Whether a strike leaves somebody with the newest state, and spares whom the plan spares."""
        row = self._roster.rows[victim]
        if not row.alive or row.frozen:
            return False
        if kind.startswith("cut"):
            return True
        killed = kind != "stop" and spared(self._plan, self._cluster.now()) == victim
        return not killed and not self._roster.last_copy(victim)

    def _pull(self, event: Event) -> None:
        """A heal is where a fault is due that is not the destination's to carry out."""
        if event["fault"] not in self._armed:
            return
        fault, _ = self._armed[event["fault"]]
        self._disarm(fault)
        destination, source = event.replica, event["source"]
        where = {"phase": event["phase"], "share": event["share"], "step": event["step"], "quorum": event["quorum"]}
        others = [(fault.replica + i) % self._settings.replicas for i in range(self._settings.replicas)]
        chosen = [source] if fault.role == "source" else [i for i in others if i not in (source, destination)]
        for victim in chosen:
            if self._may(fault.kind, victim):
                self._strike(fault, fault.kind, victim, role=fault.role, **where)
                return
        # Never the last copy: then it is the destination.
        if self._may(fault.kind, destination):
            self._strike(fault, fault.kind, destination, role="destination", **where)
        else:
            self._post(destination, "withheld", fault=dataclasses.asdict(fault), **where)

    def _strike(self, fault: Fault, kind: str, victim: int, **where: Any) -> None:
        member = self._cluster.members[victim]
        fields = {"fault": {**dataclasses.asdict(fault), "kind": kind}, **where}
        if kind == "kill":
            member.signal(signal.SIGKILL)
        elif kind in ("stop", "stop and kill"):
            member.signal(signal.SIGSTOP)
        else:
            member.tell({"cut": fault.share if kind == "cut one" else None})
        self._post(victim, "strike", **fields)
        self._counts["strike"] += 1
        self._follow(kind, fault.frozen, victim)

    def _follow(self, kind: str, frozen: float, victim: int) -> None:
        """What comes after a strike: a frozen replica goes on, or is killed."""
        if kind == "kill":
            # Not a keeper from now on, though it takes a moment to hear of its end.
            self._roster.rows[victim].alive = False
        if kind not in ("stop", "stop and kill"):
            return
        self._post(victim, "stopped")
        life = self._cluster.members[victim].life

        def go_on() -> None:
            member = self._cluster.members.get(victim)
            if member is None or member.life != life:
                return
            if kind == "stop":
                self._post(victim, "continued")
                member.signal(signal.SIGCONT)
            else:
                member.signal(signal.SIGKILL)

        self._at(frozen, go_on)

    # --------------------------------------------------------------------------------------- end

    def _look_for_hangs(self) -> None:
        """Kill what has not moved for far too long, with its stacks in its log."""
        now = self._cluster.now()
        for replica, row in enumerate(self._roster.rows):
            member = self._cluster.members.get(replica)
            if member is None or row.frozen or now - row.heard < _SILENT:
                continue
            calls = [call["call"] for call in row.calls.values()]
            self._post(replica, "hangs", seconds=_SILENT, calls=calls)
            member.signal(signal.SIGUSR1)
            self._at(0.5, lambda member=member: member.signal(signal.SIGKILL))  # type: ignore[misc]

    def _calm(self) -> None:
        """No fault any more: all heal, train together for a while, and end."""
        for fault, _ in list(self._armed.values()):
            self._disarm(fault)
        self._post(-1, "calm")
        begin = self._cluster.now()
        while not self._together(begin) and self._cluster.now() < begin + _CALM_SECONDS:
            self._turn()
        self._finishing = True
        self._post(-1, "finishing", together=self._together(begin))
        self._cluster.tell({"finish_at": self._roster.step + _CALM_STEPS})
        limit = self._cluster.now() + _EXIT_SECONDS
        while self._cluster.members and self._cluster.now() < limit:
            self._turn()

    def _together(self, begin: float) -> bool:
        """Whether all replicas have committed the newest steps, in one quorum of all."""
        commits = [event for event in self.events[-400:] if event.name == "commit" and event.time > begin]
        for replica in range(self._settings.replicas):
            steps = [e for e in commits if e.replica == replica and len(e["members"]) == self._settings.replicas]
            if len(steps) < _CALM_STEPS // 2:
                return False
        return True

    def _line(self) -> str:
        def look(row: Any) -> str:
            return "frozen" if row.frozen else "trains" if row.current else "heals" if row.alive else "starts"

        counts, rows = self._counts, " ".join(f"{look(row):<6}" for row in self._roster.rows)
        return (
            f"{self._cluster.now():6.0f} s  step {counts['commit']:6}  {counts['strike']:4} faults  "
            f"{counts['heal']:4} heals  {rows}"
        )
