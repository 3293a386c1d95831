"""What a transfer costs in any case, for each leaf, and for each byte: fitted to states small and large. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ft_transport.bench.results import Row
from ft_transport.bench.states import parse_size

__all__ = ["Fit", "Growth", "Point", "fit", "growths", "points"]

# What any state is to have, and what a state's numbers grow by.
LEAST_LEAVES, LEAST_MEGABYTES, FACTOR = 10, 1, 10

# A state at either end, and what transports take beside it.
_ROOM = 1.25


def points(most: tuple[int, int], num_ranks: int, free_nbytes: int | None) -> tuple[list[str], list[str]]:
    """States that tell the three costs apart, as ``states.build`` takes them, and those that memory has no room for.

    Few leaves in all sizes, small ones in all numbers, and both growing together, which shows whether costs add up.

    Args:
        most: Leaves and bytes.
        num_ranks: On this machine.
        free_nbytes: Its memory, None where nobody knows.
    """
    most_leaves, most_nbytes = most
    numbers = _steps(LEAST_LEAVES, most_leaves)
    sizes = _steps(LEAST_MEGABYTES, most_nbytes // 10**6)
    pairs = [(numbers[0], size) for size in sizes] + [(number, sizes[0]) for number in numbers[1:]]
    # The largest of both together, and so on down.
    pairs += list(zip(numbers[:0:-1], sizes[:0:-1], strict=False))[::-1]
    room = float("inf") if free_nbytes is None else free_nbytes / num_ranks / _ROOM
    names = [_name(pair) for pair in pairs]
    too_large = [name for name in names if parse_size(name)[1] > room]
    return [name for name in names if name not in too_large], too_large


@dataclass(frozen=True)
class Point:
    """What a state took, in seconds, medians of its rounds.

    Attributes:
        state: Its name.
        num_leaves: How many.
        nbytes: Of all of them.
        costs: The destination's time, the source's CPU, the destination's.
    """

    state: str
    num_leaves: int
    nbytes: int
    costs: tuple[float, float, float]


@dataclass(frozen=True)
class Fit:
    """A cost as a sum.

    Attributes:
        costs: In ms whatever is moved, in microseconds for each leaf, in seconds for each GB.
        off: For each point, how much more the sum says than was measured, as a share of that.
    """

    costs: tuple[float, float, float]
    off: list[float]


@dataclass(frozen=True)
class Growth:
    """One transport in one mode.

    Attributes:
        fits: Of each of a point's costs, None where points are too few.
    """

    transport: str
    mode: str
    points: list[Point] = field(default_factory=list)
    fits: list[Fit | None] = field(default_factory=list)


def growths(rows: Sequence[Row]) -> list[Growth]:
    """What all that arrived says, by mode and transport."""
    found: dict[tuple[str, str], list[Point]] = {}
    for row in rows:
        if row.status == "equal" and row.cpu_seconds_source is not None and row.cpu_seconds_receiver is not None:
            costs = (row.median_seconds, row.cpu_seconds_source, row.cpu_seconds_receiver)
            point = Point(row.case.state, row.size.num_tensors, row.size.nbytes, costs)
            found.setdefault((row.case.mode, row.transport), []).append(point)
    return [
        Growth(transport, mode, of, [fit(of, number) for number in range(3)])
        for (mode, transport), of in sorted(found.items(), key=lambda each: each[0][0])
    ]


def fit(of: Sequence[Point], number: int) -> Fit | None:
    """The sum that is nearest to one of the costs, by least squares; None for fewer than four points."""
    if len(of) < 4:
        return None
    sizes = np.array([(1e-3, point.num_leaves * 1e-6, point.nbytes * 1e-9) for point in of])
    seconds = np.maximum([point.costs[number] for point in of], 1e-9)
    # Errors relative to what was measured: else the largest state, whose noise is a thousand times what the smallest
    # takes, would alone say what is fixed.
    costs, *_ = np.linalg.lstsq(sizes / seconds[:, None], np.ones(len(of)), rcond=None)
    fixed, leaf, gigabyte = costs.tolist()
    return Fit((fixed, leaf, gigabyte), (sizes @ costs / seconds - 1).tolist())


def _steps(least: int, most: int) -> list[int]:
    """Powers up to the most, and that."""
    steps = [least]
    while steps[-1] * FACTOR <= most:
        steps.append(steps[-1] * FACTOR)
    return steps if steps[-1] == most else [*steps, most]


def _name(pair: tuple[int, int]) -> str:
    number, megabytes = pair
    return f"{number}x{megabytes // 1000}GB" if megabytes % 1000 == 0 else f"{number}x{megabytes}MB"
