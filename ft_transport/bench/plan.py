"""What is to be run: options, cases and turns. Plain values, no I/O."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

__all__ = ["MODES", "Case", "Job", "Options", "Turn", "turns"]

# Two modes since they cost different things: into fresh memory, page faults are the most of it (0.4 to 1.6 GB/s with
# gloo, whoever sends), in place it is the wire (4 to 5). One figure for both would compare allocators.
MODES = ("fresh", "in-place")


@dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Attributes:
        states: Names as ``states.build`` takes them.
        modes: Names from ``MODES``.
        transports: Names from ``subjects.SUBJECTS``.
        rounds: Rounds that count; one more warms up, unless they are cold.
        receivers: Ranks that receive at once.
        scale: Shrinks the states, 0 to 1.
        seed: Seed of the states' values.
        timeout_seconds: Bound of one transfer, as each transport understands it.
        device: Type of the device that the states are on; each rank has one of those of its machine.
        cold: New processes for each turn, which begin so many seconds after the last ones; None for the same ones.
        limits: Whether what bounds the transports takes turns, too.
    """

    states: list[str]
    modes: list[str]
    transports: list[str]
    rounds: int
    receivers: int
    scale: float
    seed: int
    timeout_seconds: float
    device: str = "cpu"
    cold: float | None = None
    limits: bool = True

    @property
    def cases(self) -> list[Case]:
        """Every state in every mode, in the order of the command line."""
        return [Case(state, mode) for state in self.states for mode in self.modes]


@dataclass(frozen=True)
class Case:
    """One state in one mode: what the transports compete on."""

    state: str
    mode: str

    def __str__(self) -> str:
        return f"{self.state} {self.mode}"


@dataclass(frozen=True)
class Turn:
    """One transport moving the state once. ``round`` 0 is the warm-up."""

    index: int
    round: int
    transport: str


@dataclass(frozen=True)
class Job:
    """What every rank must know to take the turns of one case.

    Attributes:
        attempt: Counts the jobs of a run. A case is attempted anew, without the culprit, after a transport failed.
        transports: Those that take turns, limits too.
        one_machine: Whether all ranks share a loopback interface, whose counters then tell the bytes on the wire.
        device: As in ``Options``.
        cold: Whether receivers take memory as they find it.
    """

    attempt: int
    case: Case
    transports: list[str]
    rounds: int
    receivers: int
    scale: float
    seed: int
    timeout_seconds: float
    one_machine: bool
    device: str = "cpu"
    cold: bool = False

    @property
    def world_size(self) -> int:
        """The source and its receivers."""
        return 1 + self.receivers

    @property
    def patience_seconds(self) -> float:
        """How long a turn may take before its transport counts as hung.

        Twice the time-out, since the call on one side may begin to wait when the other's has ended, and a minute
        to make and check a state.
        """
        # A hang is what some transports do where others raise, so the time-out of the call alone is no bound.
        return 2 * self.timeout_seconds + 60.0

    @property
    def turns(self) -> list[Turn]:
        """What all ranks do, in this order."""
        return turns(self.transports, self.rounds)

    def to_json(self) -> str:
        """The job as text, for another machine."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Job:
        """The inverse of :meth:`to_json`."""
        fields = json.loads(text)
        return Job(**{**fields, "case": Case(**fields["case"])})


def turns(transports: list[str], rounds: int) -> list[Turn]:
    """Each transport once in each round, the warm-up and ``rounds`` more, in a balanced (Williams) order.

    What a transport leaves behind, warm caches or memory just freed, is met by whichever follows it. So every round
    begins with another one, and in as many rounds as there are transports, twice as many where they are odd in number,
    each follows each other one equally often.
    """
    count = len(transports)
    # 0, 1, -1, 2, -2, …: neighbours differ by each distance once, so shifting the row by one for each round has every
    # transport follow every other one. In a fixed order the same one would always come after the slowest, into its
    # memory.
    zigzag = [(place + 1) // 2 * (1 if place % 2 else -1) for place in range(count)]
    order: list[Turn] = []
    for number in range(rounds + 1):
        places = [(number + step) % count for step in zigzag]
        # With an odd number some distances come twice and others never; the same rows backwards make up for it.
        for place in reversed(places) if count and number // count % 2 else places:
            order.append(Turn(len(order), number, transports[place]))
    return order
