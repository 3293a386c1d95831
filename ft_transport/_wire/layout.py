"""Which byte ranges travel in which message. No bytes here; both sides derive the same from the manifest.

Strategy: a range is the bytes of a storage that overlapping views refer to. A large range travels by itself,
cut into messages; many small ones are packed into buckets, because a message costs as much as some 256 KiB.
Messages are grouped into *flights*: what is under way before the receiver is heard of again.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, repeat
from operator import attrgetter, itemgetter
from typing import NamedTuple

import torch

from ft_transport._state.geometry import alone_in, merge, range_index
from ft_transport._state.manifest import Manifest, View

__all__ = ["SMALL_BYTES", "Gaps", "Layout", "Limits", "Piece", "Ranges", "lay_out"]

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


class Ranges:
    """The distinct byte ranges of a state, by storage and begin, in columns.

    Args:
        storages: Of each.
        begins: The first byte of each there.
        nbytes: Of each.
        lone: For each that is one dense view, as most are, the number of that view among the manifest's; else -1.
    """

    def __init__(
        self, storages: Sequence[int], begins: Sequence[int], nbytes: Sequence[int], lone: Sequence[int]
    ) -> None:
        self.storages = storages
        self.begins = begins
        self.nbytes = nbytes
        self.lone = lone

    def __len__(self) -> int:
        return len(self.nbytes)

    def __getitem__(self, which: int) -> Piece:
        begin = self.begins[which]
        return Piece(self.storages[which], begin, begin + self.nbytes[which])

    def __iter__(self) -> Iterator[Piece]:
        return map(self.__getitem__, range(len(self.nbytes)))

    def at(self, storage: int, begin: int) -> int:
        """Index of the range that holds byte ``begin`` of ``storage``."""
        first, end = bisect_left(self.storages, storage), bisect_right(self.storages, storage)
        return bisect_right(self.begins, begin, first, end) - 1


@dataclass(frozen=True)
class Layout:
    """How a state travels.

    Attributes:
        ranges: The distinct byte ranges of the state, by storage and begin.
        owners: For each message the index of the range that each of its pieces is of, in order.
        begins: For each message, of one piece, where that begins in its range; 0 for one of several, which are whole
            ranges.
        sizes: Bytes of each message.
        flights: Consecutive messages that are under way together.
        nbytes: Payload bytes of all messages.
        stage_below: Messages smaller than this are staged on both sides, packed or not.
        gaps: For each range whose views leave gaps that do not travel, by its index: where they are. Such a range
            counts only the bytes that travel, from its begin on.
        large: Indices of the ranges of ``stage_below`` and more.
    """

    ranges: Ranges
    owners: list[Sequence[int]]
    begins: list[int]
    sizes: list[int]
    flights: list[range]
    nbytes: int
    stage_below: int
    gaps: dict[int, Gaps]
    large: Sequence[int]

    @cached_property
    def messages(self) -> list[tuple[Piece, ...]]:
        """The pieces in each message, in order."""
        return [self._pieces(message) for message in range(len(self.sizes))]

    def _pieces(self, message: int) -> tuple[Piece, ...]:
        pieces = tuple(map(self.ranges.__getitem__, self.owners[message]))
        if len(pieces) > 1:
            return pieces
        ((storage, begin, _),) = pieces
        begin += self.begins[message]
        return (Piece(storage, begin, begin + self.sizes[message]),)

    def is_small(self, message: int) -> bool:
        """Whether a message is staged on both sides, because forward may change small tensors meanwhile."""
        return len(self.owners[message]) > 1 or self.sizes[message] < self.stage_below

    def range_of(self, storage: int, begin: int) -> int:
        """Index of the range that holds byte ``begin`` of ``storage``."""
        return self.ranges.at(storage, begin)


def lay_out(manifest: Manifest, limits: Limits) -> Layout:
    """Derive from a manifest what travels in which message.

    Raises:
        ValueError: With these limits a range could be larger than a message and never be cut.
    """
    # A peer's are refused as they are read. Whoever makes them here would wait for ever: a bucket would have no range,
    # or a part no byte.
    if not max(64, limits.pack_below) <= limits.message_bytes:
        raise ValueError(f"limits: expected message_bytes of 64 and of pack_below at least, got {limits}")
    # Whatever follows must come out the same on both sides, from the manifest alone: no address, no device, no option
    # of one side may decide anything here.
    ranges, gaps = _ranges(manifest)
    nbytes = ranges.nbytes
    small: Sequence[int] = range(len(nbytes))
    large: Sequence[int] = ()
    if max(nbytes, default=0) >= limits.pack_below:
        small = [which for which, each in enumerate(nbytes) if each < limits.pack_below]
        large = [which for which, each in enumerate(nbytes) if each >= limits.pack_below]
    pack_below = limits.pack_below if len(small) >= limits.pack_from else 0
    # A part ends on a multiple of 64 bytes of its storage, so that no element is cut in two.
    # An element that is cut in two could not be scattered by torch where strides differ.
    step = limits.message_bytes - limits.message_bytes % 64
    owners: list[Sequence[int]] = []
    begins: list[int] = []
    sizes: list[int] = []
    for which in large if pack_below else range(len(nbytes)):
        first, last, begin = ranges.begins[which], nbytes[which], 0
        while begin < last:
            # The first part makes up for a range that begins in the middle of 64 bytes, so that all others begin at a
            # multiple.
            end = min(begin - (first + begin) % 64 + step, last)
            owners.append((which,))
            begins.append(begin)
            sizes.append(end - begin)
            begin = end
    for bucket, size in _buckets(nbytes, small, limits.message_bytes) if pack_below else ():
        owners.append(bucket)
        begins.append(0)
        sizes.append(size)
    flights = _flights(sizes, limits.flight_bytes)
    return Layout(ranges, owners, begins, sizes, flights, sum(sizes), limits.pack_below, gaps, large)


def _ranges(manifest: Manifest) -> tuple[Ranges, dict[int, Gaps]]:
    views = manifest.views
    # Nearly every storage has one view, a dense one, which is its range: these in columns.
    storages, shapes, offsets = views.storages, views.geometries, views.offsets
    alone = alone_in(storages, shapes)
    found: dict[int, list[tuple[int, View]]] = {}
    if len(alone) < len(views):
        for number in sorted({*range(len(views))}.difference(alone)):
            if storages[number] >= 0:
                found.setdefault(storages[number], []).append((number, views[number]))
        storages, offsets = [storages[number] for number in alone], [offsets[number] for number in alone]
        shapes = [shapes[number] for number in alone]
    begins, nbytes = offsets, list(map(attrgetter("span"), shapes))
    if any(offsets):
        begins = [offset * shape.itemsize for offset, shape in zip(offsets, shapes, strict=True)]
    if not found and storages == sorted(storages):
        return Ranges(storages, begins, nbytes, alone), {}
    rows: list[tuple[int, int, int, int, Gaps | None]]
    rows = list(zip(storages, begins, nbytes, alone, repeat(None), strict=False))
    rows += [row for storage, members in found.items() for row in _ranges_of(storage, members)]
    rows.sort(key=itemgetter(0, 1))
    gaps = {which: gap for which, (*_, gap) in enumerate(rows) if gap is not None}
    lone: Sequence[int]
    storages, begins, nbytes, lone = (list(map(itemgetter(column), rows)) for column in range(4))
    # Whoever finds a range(n) here need not look at each.
    return Ranges(storages, begins, nbytes, range(len(lone)) if lone == list(range(len(lone))) else lone), gaps


def _ranges_of(storage: int, members: list[tuple[int, View]]) -> Iterator[tuple[int, int, int, int, Gaps | None]]:
    """The ranges of a storage that several views share, or one with gaps, as rows of :func:`_ranges`.

    Args:
        members: The views, with their numbers.
    """
    members.sort(key=_begin)
    begins = list(map(_begin, members))
    for begin, end in merge((view.begin, view.end) for _, view in members):
        inside = members[bisect_left(begins, begin) : bisect_left(begins, end)]
        if len(inside) == 1 and inside[0][1].geometry.dense:
            yield storage, begin, end - begin, inside[0][0], None
            continue
        index = range_index([view.placed for _, view in inside], begin, end)
        # From here on the range counts what travels. Its real end is in ``gaps``.
        if index is None:
            yield storage, begin, end - begin, -1, None
        else:
            yield storage, begin, index[0].numel() * index[1], -1, Gaps(end, *index)


def _begin(member: tuple[int, View]) -> int:
    return member[1].begin


def _buckets(nbytes: Sequence[int], small: Sequence[int], limit: int) -> Iterator[tuple[Sequence[int], int]]:
    """The small ranges, by index, in the order in which they fill one message after the other, each with its size."""
    # Next fit: in order, and never back. A better packing would save a message in a hundred, and be harder to derive
    # alike in another language.
    ends = list(accumulate(map(nbytes.__getitem__, small), initial=0))
    begin = 0
    while begin < len(small):
        end = bisect_right(ends, ends[begin] + limit) - 1
        yield small[begin:end], ends[end] - ends[begin]
        begin = end


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
