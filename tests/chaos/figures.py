"""What a run comes to, in numbers, from its events. Pure."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from typing import Any

from .checks import call_times, limits
from .events import Event, told
from .settings import Settings

__all__ = ["REASONS", "figures", "recoveries", "strikes"]

# How long before a step broke the strike may have been that broke it: the Lighthouse takes the dead for alive for a
# while, and a group waits for the frozen.
_BEFORE = 8.0
# Why a replica may lose a step.
REASONS = (
    "a transfer on the source's side",
    "its own receive failed",
    "it was torn, and asked to serve",
    "too few held the newest state",
    "other",
    "a member of the group was struck",
    "a member's receive failed",
)


def figures(events: list[Event], settings: Settings) -> dict[str, Any]:
    """All figures of the report, by name; sizes in bytes, times in seconds."""
    struck = strikes(events)
    kinds = Counter(event["fault"]["kind"] for event in struck)
    return {
        "seconds": round(events[-1].time, 1) if events else 0.0,
        "strikes": dict(kinds),
        "kills and stops": sum(number for kind, number in kinds.items() if not kind.startswith("cut")),
        "kills": kinds["kill"] + kinds["stop and kill"],
        "stops": kinds["stop"] + kinds["stop and kill"],
        "cuts": kinds["cut one"] + kinds["cut all"],
        "faults struck": len({e["fault"]["number"] for e in struck if not e.fields.get("opens")}),
        "faults withheld": len(told(events, "withheld")),
        "by phase": _by_phase(struck),
        "heals": _heals(events),
        "seconds to recover": _spread([seconds for _, seconds in recoveries(events)]),
        "steps": _steps(events),
        "longest calls": _longest(events, settings),
        "stopped torn": sum(event["reason"] == "torn" for event in told(events, "ended")),
    }


def strikes(events: list[Event]) -> list[Event]:
    """The faults that struck somebody. Who has been killed already is not killed again."""
    found, killed = [], set()
    for event in told(events, "strike"):
        if event.life not in killed:
            found.append(event)
        if event["fault"]["kind"] == "kill":
            killed.add(event.life)
    return found


def recoveries(events: list[Event]) -> list[tuple[Event, float]]:
    """Each kill whose replica came back, and the seconds from the kill to its first commit.

    One that is struck again before is counted from the later kill.
    """
    killed = {e.life: e.time for e in told(events, "strike") if e["fault"]["kind"] == "kill"}
    first: dict[tuple[int, int], float] = {}
    for event in told(events, "commit"):
        first.setdefault(event.life, event.time)
    found = []
    for event in told(events, "gone"):
        after = (event.replica, event.incarnation + 1)
        if event["status"] == -9 and after in first:
            found.append((event, first[after] - killed.get(event.life, event.time)))
    return found


def _by_phase(struck: list[Event]) -> dict[str, dict[str, dict[str, int]]]:
    """Number of strikes by phase, who was struck, and kind."""
    table: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for event in struck:
        table[event["phase"]][event["role"]][event["fault"]["kind"]] += 1
    return {phase: {role: dict(kinds) for role, kinds in roles.items()} for phase, roles in table.items()}


def _heals(events: list[Event]) -> dict[str, Any]:
    ended = [event for event in told(events, "end") if event["call"] == "receive"]
    complete = [event for event in ended if not event["error"]]
    resumed = [event for event in complete if event["nbytes_kept"]]
    begun = sum(event["call"] == "receive" for event in told(events, "begin"))
    outcomes = Counter(event.fields.get("outcome", "") or "no answer" for event in ended if event["error"])
    return {
        "begun": begun,
        "complete": len(complete),
        "failed": dict(outcomes),
        "ended by a kill": begun - len(ended),
        "torn": sum(bool(event.fields.get("torn")) for event in ended),
        "nbytes_total": sum(event["nbytes_total"] for event in complete),
        "resumed": len(resumed),
        "resumed nbytes_kept": sum(event["nbytes_kept"] for event in resumed),
        "resumed nbytes_total": sum(event["nbytes_total"] for event in resumed),
        "num_repaired": sum(event["num_repaired"] for event in complete),
        "seconds": _spread([event["seconds"] for event in complete]),
    }


def _steps(events: list[Event]) -> dict[str, Any]:
    """Steps committed by the job, and steps that replicas lost, by what broke them."""
    failed = told(events, "failed")
    lost = Counter(_reasons(events))
    attempts = {(event["quorum"], event["step"]) for event in failed}
    commits = told(events, "commit")
    done = {(event["quorum"], event["step"] - 1) for event in commits}
    return {
        "committed": max((event["step"] for event in commits), default=0),
        "attempts that nobody committed": len(attempts - done),
        "lost by a replica": {reason: lost[reason] for reason in REASONS},
    }


def _reasons(events: list[Event]) -> list[str]:
    """What broke each replica's step that was not committed."""
    struck = [e for e in told(events, "strike") if not e["fault"]["kind"].startswith("cut")]
    broken = {e["quorum"] for e in told(events, "end") if e["call"] == "receive" and e["error"]}
    found = []
    for event in told(events, "failed"):
        cause = REASONS[("send", "receive", "torn", "few", "group").index(event["cause"])]
        if event["cause"] == "group":
            near = [e for e in struck if event.time - _BEFORE < e.time < event.time]
            if any(e.replica in event["members"] for e in near):
                cause = "a member of the group was struck"
            elif event["quorum"] in broken:
                cause = "a member's receive failed"
        found.append(cause)
    return found


def _longest(events: list[Event], settings: Settings) -> dict[str, Any]:
    longest: dict[str, float] = {}
    for event, seconds in call_times(events):
        longest[event["call"]] = max(seconds, longest.get(event["call"], 0.0))
    allowed = limits(settings)
    return {name: {"seconds": round(longest.get(name, 0.0), 3), "time-out": allowed[name]} for name in allowed}


def _spread(values: list[float]) -> dict[str, float | None]:
    if not values:
        return {"number": 0, "median": None, "p99": None, "longest": None}
    ordered = sorted(values)
    return {
        "number": len(ordered),
        "median": round(statistics.median(ordered), 3),
        "p99": round(ordered[math.ceil(0.99 * len(ordered)) - 1], 3),
        "longest": round(ordered[-1], 3),
    }
