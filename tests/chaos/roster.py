"""What the director knows of each replica, from what they tell. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from .events import Event

__all__ = ["Roster", "Row"]


@dataclass
class Row:
    """One replica, as far as is known.

    Attributes:
        alive: Whether a process of it runs that has joined the job.
        frozen: Whether it is stopped.
        step: That it has committed last, -1 if none since it joined or was frozen.
        heard: When it last did something that shows that it goes on.
        calls: When each call that has not ended began, by its number.
    """

    alive: bool = False
    frozen: bool = False
    step: int = -1
    heard: float = 0.0

    def __post_init__(self) -> None:
        self.calls: dict[int, Event] = {}

    @property
    def current(self) -> bool:
        """Whether it trains."""
        return self.alive and not self.frozen and self.step >= 0


class Roster:
    """All replicas."""

    def __init__(self, replicas: int) -> None:
        self.rows = [Row() for _ in range(replicas)]

    @property
    def step(self) -> int:
        """The newest step of a replica that trains, -1 if none does."""
        return max((row.step for row in self.rows if row.current), default=-1)

    def keepers(self) -> list[int]:
        """The replicas that hold the newest state."""
        return [i for i, row in enumerate(self.rows) if row.current and row.step >= self.step - 1]

    def hear(self, event: Event) -> None:
        """Note what a replica, or the director, tells."""
        if event.replica < 0:
            return
        row = self.rows[event.replica]
        row.heard = event.time
        if event.name == "joined":
            row.alive = True
        elif event.name == "commit":
            row.step = event["step"]
        elif event.name == "begin":
            row.calls[event["number"]] = event
        elif event.name == "end":
            row.calls.pop(event["number"], None)
        elif event.name == "stopped":
            row.frozen, row.step = True, -1
        elif event.name == "continued":
            row.frozen = False
            # Its time begins anew.
            again = [Event(event.time, *call.life, "begin", call.fields) for call in row.calls.values()]
            row.calls = {call["number"]: call for call in again}
        elif event.name == "gone":
            self.rows[event.replica] = Row(heard=event.time)

    def last_copy(self, victim: int) -> bool:
        """Whether nobody else holds the newest state for certain."""
        return not [i for i in self.keepers() if i != victim]
