"""What each replica did when: stretches of time, from events. Pure."""

from __future__ import annotations

from collections import defaultdict

from .checks import frozen_times
from .events import Event

__all__ = ["Span", "spans"]

Span = tuple[float, float]

# Seconds between two commits up to which a replica has trained all the while.
_STEP_SECONDS = 0.8


def spans(events: list[Event], replica: int) -> dict[str, list[Span]]:
    """Stretches in which a replica was there (``"alive"``), ``"trains"``, ``"heals"``, or was ``"frozen"``."""
    own = [event for event in events if event.replica == replica]
    end = events[-1].time if events else 0.0
    found: dict[str, list[Span]] = defaultdict(list)
    begun: dict[str, float] = {}
    for event in own:
        if event.name == "joined":
            begun["alive"] = event.time
        elif event.name == "begin" and event["call"] == "receive":
            begun["heals"] = event.time
        elif event.name == "end" and event["call"] == "receive" and "heals" in begun:
            found["heals"].append((begun.pop("heals"), event.time))
        elif event.name == "gone":
            for name in list(begun):
                found[name].append((begun.pop(name), event.time))
    for name, begin in begun.items():
        found[name].append((begin, end))
    for life, times in frozen_times(events).items():
        if life[0] == replica:
            found["frozen"] += [(begin, min(until, end)) for begin, until in times]
    found["trains"] = _runs([event.time for event in own if event.name == "commit"])
    return dict(found)


def _runs(times: list[float]) -> list[Span]:
    """Times that follow each other closely, from the first to the last."""
    found: list[Span] = []
    for time in times:
        if found and time - found[-1][1] <= _STEP_SECONDS:
            found[-1] = found[-1][0], time
        else:
            found.append((time, time))
    return [(begin, end) for begin, end in found if end > begin]
