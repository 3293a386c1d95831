"""What a run is told by: events, one JSON object a line."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Event", "decode", "encode", "read", "told"]


@dataclass(frozen=True)
class Event:
    """Something that happened to one incarnation of a replica, or to the job (replica -1).

    Attributes:
        time: Seconds since the start of the run, on the clock that all processes of a machine share.
        replica: Index of the replica.
        incarnation: How often it had been started before.
        name: What happened.
        fields: What belongs to it.
    """

    time: float
    replica: int
    incarnation: int
    name: str
    fields: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Any:
        return self.fields[key]

    @property
    def life(self) -> tuple[int, int]:
        """Which process it was."""
        return self.replica, self.incarnation


def encode(event: Event) -> str:
    """The event as a line."""
    head = {"time": round(event.time, 4), "replica": event.replica, "incarnation": event.incarnation}
    return json.dumps({**head, "event": event.name, **event.fields}) + "\n"


def decode(line: str) -> Event:
    """The event of a line."""
    fields = json.loads(line)
    time, replica, incarnation, name = (fields.pop(key) for key in ("time", "replica", "incarnation", "event"))
    return Event(time, replica, incarnation, name, fields)


def read(path: Path) -> list[Event]:
    """The events of a file, in the order of time."""
    return sorted(map(decode, path.read_text().splitlines()), key=lambda event: event.time)


def told(events: list[Event], name: str) -> list[Event]:
    """Those of one name."""
    return [event for event in events if event.name == name]
