"""Which byte ranges travel in which message. No bytes here; both sides derive the same from the manifest.

Strategy: a range is the bytes of a storage that overlapping views refer to. A large range travels by itself,
cut into messages; many small ones are packed into buckets, because a message costs as much as some 256 KiB.
Messages are grouped into *flights*: what is under way before the receiver is heard of again.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, repeat
from operator import add, attrgetter, itemgetter, sub
from typing import NamedTuple

import torch

from ft_transport._state.geometry import alone_in, merge, range_index
from ft_transport._state.manifest import Manifest, View, made

__all__ = ["SMALL_BYTES", "Gaps", "Layout", "Limits", "Piece", "lay_out"]

# Bounds what a side copies of the small messages that forward may change (see ``docs/design.md``): one bucket.
SMALL_BYTES = 64 << 20


class Limits(NamedTuple):
    """Sizes in bytes that both sides must agree on; the source chooses and the manifest carries them.

    Attributes:
        message_bytes: Upper bound of a message. Over loopback Gloo is fastest with 2 to 8 MiB.
        flight_bytes: Upper bound of a flight and of a bucket. A thread that posts or waits competes with Gloo's own for
            the pair's lock, so fewer and larger flights cost less.
        pack_below: Ranges smaller than this are packed into buckets: a message costs gloo about 60 us on
            each side, in which memory is copied at some 4 GB/s.
        pack_from: Number of small ranges from which packing starts; fewer travel one by one.
        window: Flights that are under way at once: enough that neither side ever waits for the other's Python, nor,
            to post the next one, for the thread that reads or writes. Those that are staged are bounded by the buckets.
    """

    # A manifest carries these as an array in this order: it is part of the wire.
    message_bytes: int = 4 << 20
    flight_bytes: int = 64 << 20
    pack_below: int = 256 << 10
    pack_from: int = 16
    window: int = 32


class Piece(NamedTuple):
    """Half-open byte range of one storage."""

    storage: int
    begin: int
    end: int


class Gaps(NamedTuple):
    """A range with gaps: its real end in the storage, and the places of its elements of ``unit`` bytes that travel."""

    end: int
    places: torch.Tensor
    unit: int


@dataclass(frozen=True)
class Layout:
    """How a state travels.

    Attributes:
        ranges: The distinct byte ranges of the state, by storage and begin.
        messages: The pieces in each message, in order.
        owners: For each message the index of the range that each of its pieces is of.
        sizes: Bytes of each message.
        flights: Consecutive messages that are under way together.
        nbytes: Payload bytes of all messages.
        stage_below: Messages smaller than this are staged on both sides, packed or not.
        gaps: For each range whose views leave gaps that do not travel, by its index: where they are. Such a range
            counts only the bytes that travel, from its begin on.
        lone: For each range that is one dense view, and the only one of its storage, as most are: the number of that
            view among the manifest's. For any other -1.
        large: Indices of the ranges of ``stage_below`` and more.
    """

    ranges: list[Piece]
    messages: list[tuple[Piece, ...]]
    owners: list[tuple[int, ...]]
    sizes: list[int]
    flights: list[range]
    nbytes: int
    stage_below: int
    gaps: dict[int, Gaps]
    lone: list[int] = field(default_factory=list)
    large: list[int] = field(default_factory=list)

    def is_small(self, message: int) -> bool:
        """Whether a message is staged on both sides, because forward may change small tensors meanwhile."""
        return len(self.messages[message]) > 1 or self.sizes[message] < self.stage_below

    def range_of(self, storage: int, begin: int) -> int:
        """Index of the range that holds byte ``begin`` of ``storage``."""
        return bisect_right(self.ranges, (storage, begin, math.inf)) - 1


def lay_out(manifest: Manifest, limits: Limits) -> Layout:
    """Derive from a manifest what travels in which message."""
    # Whatever follows must come out the same on both sides, from the manifest alone: no address, no device, no option
    # of one side may decide anything here.
    ranges, gaps, lone = _ranges(manifest)
    nbytes = list(map(sub, map(itemgetter(2), ranges), map(itemgetter(1), ranges)))
    small = [which for which, each in enumerate(nbytes) if each < limits.pack_below]
    large = [which for which, each in enumerate(nbytes) if each >= limits.pack_below]
    pack_below = limits.pack_below if len(small) >= limits.pack_from else 0
    # A part ends on a multiple of 64 bytes of its storage, so that no element is cut in two.
    # An element that is cut in two could not be scattered by torch where strides differ.
    step = limits.message_bytes - limits.message_bytes % 64
    messages: list[tuple[Piece, ...]] = []
    owners: list[tuple[int, ...]] = []
    for which in large if pack_below else range(len(ranges)):
        storage, begin, last = ranges[which]
        while begin < last:
            # The first part makes up for a range that begins in the middle of 64 bytes, so that all others begin at a
            # multiple.
            end = min(begin - begin % 64 + step, last)
            messages.append((Piece(storage, begin, end),))
            owners.append((which,))
            begin = end
    sizes = [end - begin for ((_, begin, end),) in messages]
    buckets = _buckets(nbytes, small if pack_below else [], limits.message_bytes)
    sizes += [sum(map(nbytes.__getitem__, bucket)) for bucket in buckets]
    messages.extend(tuple(map(ranges.__getitem__, bucket)) for bucket in buckets)
    owners.extend(map(tuple, buckets))
    flights = _flights(sizes, limits.flight_bytes)
    return Layout(ranges, messages, owners, sizes, flights, sum(sizes), limits.pack_below, gaps, lone, large)


def _ranges(manifest: Manifest) -> tuple[list[Piece], dict[int, Gaps], list[int]]:
    """The ranges, their gaps, and the numbers of the views that are one; see :class:`Layout`."""
    views = manifest.views()
    # Nearly every storage has one view, a dense one, which is its range: these in columns.
    storages, shapes = list(map(itemgetter(0), views)), list(map(itemgetter(1), views))
    alone = alone_in(storages, shapes)
    found: dict[int, list[View]] = {}
    if len(alone) < len(views):
        for number in sorted({*range(len(views))}.difference(alone)):
            if storages[number] >= 0:
                found.setdefault(storages[number], []).append(views[number])
        views = [views[number] for number in alone]
        storages, shapes = list(map(itemgetter(0), views)), list(map(itemgetter(1), views))
    begins: list[int] = list(map(itemgetter(2), views))
    ends = list(map(attrgetter("span"), shapes))
    if any(begins):
        begins = [offset * shape.itemsize for offset, shape in zip(begins, shapes, strict=True)]
        ends = list(map(add, begins, ends))
    if not found and storages == sorted(storages):
        return made(Piece, zip(storages, begins, ends, strict=True)), {}, alone
    rows: list[tuple[int, int, int, int, Gaps | None]]
    rows = list(zip(storages, begins, ends, alone, repeat(None), strict=False))
    rows += [row for storage, members in found.items() for row in _ranges_of(storage, members)]
    rows.sort(key=_WHERE)
    gaps = {which: gap for which, (*_, gap) in enumerate(rows) if gap is not None} if found else {}
    return made(Piece, map(_PIECE, rows)), gaps, list(map(itemgetter(3), rows))


_WHERE, _PIECE = itemgetter(0, 1), itemgetter(0, 1, 2)


def _ranges_of(storage: int, found: list[View]) -> Iterator[tuple[int, int, int, int, Gaps | None]]:
    """The ranges of a storage that several views share, or one with gaps, as rows of :func:`_ranges`."""
    found.sort(key=_begin)
    for begin, end in merge((view.begin, view.end) for view in found):
        inside = found[bisect_left(found, begin, key=_begin) : bisect_left(found, end, key=_begin)]
        index = range_index([view.placed for view in inside], begin, end)
        gaps = None
        # From here on the range counts what travels. Its real end is in ``gaps``.
        if index is not None:
            gaps = Gaps(end, *index)
            end = begin + index[0].numel() * index[1]
        yield storage, begin, end, -1, gaps


def _begin(view: View) -> int:
    return view.begin


def _buckets(nbytes: Sequence[int], small: Sequence[int], limit: int) -> list[Sequence[int]]:
    """The small ranges, by index, in the order in which they fill one message after the other."""
    begins: list[int] = []
    room = 0
    for at, which in enumerate(small):
        # Next fit: in order, and never back. A better packing would save a message in a hundred, and be harder to
        # derive alike in another language.
        if nbytes[which] > room:
            begins.append(at)
            room = limit
        room -= nbytes[which]
    return [small[begin:end] for begin, end in pairwise([*begins, len(small)])]


def _flights(sizes: Sequence[int], limit: int) -> list[range]:
    flights: list[range] = []
    room = 0
    for message, nbytes in enumerate(sizes):
        # Whole messages only. A flight is what is confirmed at once, and a message is what is moved at once.
        if nbytes > room or not flights:
            flights.append(range(message, message))
            room = limit
        flights[-1] = range(flights[-1].start, message + 1)
        room -= nbytes
    return flights
