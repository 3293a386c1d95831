"""Which fault comes when, to whom, at which share of a heal's bytes. Pure: a seed gives the same schedule everywhere.

Faults come in bursts: the job trains, a replica is killed, and while it heals the burst strikes, so that each fault but
the last makes the heal that the next one strikes. Then there is time for all to heal.

What a schedule does not fix is what the operating system then makes of it: which heal is under way when a fault is
due, and who is its source. So a fault names a role in the next heal, and the replica that is killed to have a heal if
there is none.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Fault", "Plan", "draw", "spared"]

Kind = Literal["kill", "stop", "stop and kill", "cut one", "cut all"]
Role = Literal["destination", "source", "bystander"]
Phase = Literal["train", "agree", "move", "done"]

# How often each comes, in 100. Most faults hit a heal while bytes move; a destination is the only one that may be
# torn, and the source is who its state depends on.
_KINDS: dict[Kind, int] = {"kill": 58, "stop": 17, "stop and kill": 8, "cut one": 8, "cut all": 9}
_ROLES: dict[Role, int] = {"destination": 50, "source": 36, "bystander": 14}
_PHASES: dict[Phase, int] = {"move": 84, "agree": 6, "done": 6, "train": 4}
# Faults in a burst: 1, or with this probability one more, and so on, up to the limit.
_ONE_MORE = 0.72
_MAX_BURST = 6
# Seconds between two faults of a burst, at most: they may meet in one heal.
_BURST_GAP = 0.3
# Seconds that a stopped replica stays so: from less than any time-out of the job to more than all of them.
_FROZEN = (0.2, 5.0)
# Each replica in turn is not killed for so long a part of the run: leaks show in processes that live long.
_MIN_SPARED_SECONDS = 120.0


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        number: Place in the schedule, from 0.
        at: Seconds after the start from which on it strikes the first heal that fits.
        kind: ``"kill"`` is SIGKILL, ``"stop"`` SIGSTOP and SIGCONT, ``"stop and kill"`` SIGSTOP and SIGKILL,
            ``"cut one"`` and ``"cut all"`` end one or all of the heal's connections.
        role: Who in the heal is struck; a bystander is neither its source nor its destination.
        phase: Before the receive begins to move bytes, while it does, when it has returned, or, without any heal,
            while the job trains.
        share: Share of the state's bytes that have moved, for ``"move"``.
        replica: Who is struck in phase ``"train"``; for the other phases, who is killed first if no heal is to be
            expected, and the first choice for a bystander.
        frozen: Seconds from SIGSTOP to what follows it.
    """

    number: int
    at: float
    kind: Kind
    role: Role
    phase: Phase
    share: float
    replica: int
    frozen: float


@dataclass(frozen=True)
class Plan:
    """What a schedule is drawn from.

    Attributes:
        seed: Any integer.
        seconds: How long faults come.
        replicas: How many there are.
        gap: Mean seconds for each fault.
        cuts: Whether the transport has connections of its own, which can be cut.
    """

    seed: int
    seconds: float
    replicas: int = 4
    gap: float = 4.0
    cuts: bool = True


def draw(plan: Plan) -> list[Fault]:
    """The schedule, in the order of time."""
    numbers = random.Random(plan.seed)
    faults: list[Fault] = []
    at = 0.0
    while True:
        size = 1
        while size < _MAX_BURST and numbers.random() < _ONE_MORE:
            size += 1
        # Never even: from half to one and a half times what so many faults take on average.
        begin = at + plan.gap
        at += plan.gap * size * (0.5 + numbers.random())
        for _ in range(size):
            begin += _BURST_GAP * numbers.random()
            if begin >= plan.seconds:
                return faults
            faults.append(_fault(numbers, plan, len(faults), begin))


def _fault(numbers: random.Random, plan: Plan, number: int, at: float) -> Fault:
    kind = _choose(numbers, {k: weight for k, weight in _KINDS.items() if plan.cuts or not k.startswith("cut")})
    role = _choose(numbers, _ROLES)
    phase = _choose(numbers, _PHASES)
    share = round(0.02 + 0.96 * numbers.random(), 3)
    replica = int(plan.replicas * numbers.random())
    frozen = round(_FROZEN[0] + (_FROZEN[1] - _FROZEN[0]) * numbers.random(), 3)
    if kind.startswith("cut"):
        # There is nothing to cut otherwise.
        phase, role = "move", "source" if role == "bystander" else role
    return Fault(number, round(at, 3), kind, role, phase, share, replica, frozen)


def spared(plan: Plan, at: float) -> int:
    """The replica that is stopped and cut at that time, but not killed."""
    turns = max(1, min(plan.replicas, int(plan.seconds / _MIN_SPARED_SECONDS)))
    turn = min(turns - 1, int(at / plan.seconds * turns))
    return (turn + plan.seed) % plan.replicas


def _choose(numbers: random.Random, weights: dict[Any, int]) -> Any:
    """One of the keys, by their weights. Only ``random()`` is used, which Python keeps the same in all versions."""
    left = numbers.random() * sum(weights.values())
    for name, weight in weights.items():
        left -= weight
        if left < 0:
            return name
    return name
