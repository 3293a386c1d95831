"""What a state dict is: its nesting, its leaves, the views they hold, the storages behind these, the ties.

Strategy: describe first, move bytes later. A manifest is integers, names and plain values, all that crosses to the peer
before the first byte does; no tensor and no address is in it. A storage holds only bytes that some view refers to: ten
rows of a huge storage are a storage of ten rows. Views that share a storage still share it, so ties survive.

Not here: how a manifest comes from a state (``_state.describe``), what travels in which message (``_wire.layout``), how
it is written (``_wire.encode``).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate, chain, repeat
from typing import Any, NamedTuple, TypeVar

import torch

from ft_transport._state.geometry import Geometry, Placed
from ft_transport._state.kinds.base import Part
from ft_transport._state.tree import Node, Path, paths_of, unflatten

__all__ = [
    "ALIGNMENT",
    "EMPTY",
    "EMPTY_ON_DEVICE",
    "Leaf",
    "Leaves",
    "Manifest",
    "Storage",
    "View",
    "Views",
    "disjoint",
    "made",
]

_T = TypeVar("_T")

# Storages start their byte ranges at multiples of this, so that every dtype is aligned and a vector load is.
ALIGNMENT = 64


# Tuples, for all of these: a state of 100,000 tensors has as many views and leaves, and they are made, compared and
# hashed by C.
# Of views without elements, in the place of a storage. They have no bytes, but a device: what is appended to an empty
# tensor must be where it is.
EMPTY, EMPTY_ON_DEVICE = -1, -2


class View(NamedTuple):
    """One strided view of a storage.

    Attributes:
        storage: Index into the manifest's storages; of a view without elements :data:`EMPTY`, or
            :data:`EMPTY_ON_DEVICE`.
        geometry: Dtype, shape and strides.
        offset: Of the first element, in elements.
    """

    storage: int
    geometry: Geometry
    offset: int

    @property
    def begin(self) -> int:
        """First byte in the storage."""
        return self.offset * self.geometry.itemsize

    @property
    def placed(self) -> Placed:
        """What the view looks like, and its first byte in the storage."""
        return self.geometry, self.offset * self.geometry.itemsize

    @property
    def end(self) -> int:
        """Behind the last byte in the storage."""
        return self.offset * self.geometry.itemsize + self.geometry.span


class Storage(NamedTuple):
    """Memory behind views: its size in bytes and the type of the device it is on at the source."""

    nbytes: int
    device_type: str


class Leaf(NamedTuple):
    """One leaf: what :class:`Part` says, and the views of its plain tensors; a plain value is in ``context``."""

    kind: str
    views: tuple[View, ...]
    context: Any = None
    parts: tuple[Part, ...] = ()

    @property
    def part(self) -> Part:
        """The leaf without its bytes."""
        return Part(self.kind, self.context, self.parts)


# Columns, for what there may be 100,000 of: a tuple for each view, and one for its leaf, would take longer to make,
# to go through and to free than all that is asked of them. Who asks of one gets its tuple.
class Views:
    """Views in the order of their leaves: a view's *number* is its place here.

    Args:
        storages: Of each, as in :class:`View`; so are the others.
        geometries: Of each.
        offsets: Of each.
    """

    def __init__(self, storages: list[int], geometries: list[Geometry], offsets: list[int]) -> None:
        self.storages = storages
        self.geometries = geometries
        self.offsets = offsets

    def __len__(self) -> int:
        return len(self.storages)

    def __getitem__(self, number: int) -> View:
        return View(self.storages[number], self.geometries[number], self.offsets[number])

    def __iter__(self) -> Iterator[View]:
        return iter(made(View, zip(self.storages, self.geometries, self.offsets, strict=True)))

    def __setitem__(self, number: int, view: View) -> None:
        self.storages[number], self.geometries[number], self.offsets[number] = view

    def add(self, storages: Iterable[int], geometries: Iterable[Geometry], offsets: Iterable[int]) -> None:
        """Append some, by columns."""
        self.storages += storages
        self.geometries += geometries
        self.offsets += offsets

    def append(self, views: Iterable[View]) -> None:
        """Append some, one by one."""
        for storage, geometry, offset in views:
            self.add((storage,), (geometry,), (offset,))

    def part(self, begin: int, end: int | None) -> tuple[list[int], list[Geometry], list[int]]:
        """Some of them, in columns."""
        return self.storages[begin:end], self.geometries[begin:end], self.offsets[begin:end]


class Leaves:
    """The leaves of a state: nearly all of them plain tensors, of which all is said by their views.

    Args:
        count: How many.
        views: Of all of them.
        others: By index: each that is not one plain tensor without a context, and each that is the same as an earlier
            one.
    """

    def __init__(self, count: int, views: Views, others: dict[int, Leaf]) -> None:
        self.views = views
        self.others = others
        self._count = count

    @classmethod
    def of(cls, leaves: Sequence[Leaf], same: Container[int] = ()) -> Leaves:
        """Of these, of which those at some indices are the same as an earlier one."""
        views = Views([], [], [])
        views.append(chain.from_iterable([leaf.views for leaf in leaves]))
        others = {
            index: leaf
            for index, leaf in enumerate(leaves)
            if leaf.kind != "tensor" or leaf.context is not None or index in same
        }
        return cls(len(leaves), views, others)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Leaf:
        leaf = self.others.get(index)
        return Leaf("tensor", (self.views[self.firsts[index]],)) if leaf is None else leaf

    def __iter__(self) -> Iterator[Leaf]:
        return map(self.__getitem__, range(self._count))

    @cached_property
    def firsts(self) -> Sequence[int]:
        """The number of each leaf's first view, and behind the last one how many there are."""
        return list(accumulate(self._counts(), initial=0)) if self.others else range(self._count + 1)

    @cached_property
    def owners(self) -> Sequence[int]:
        """The leaf of each view."""
        if not self.others:
            return range(self._count)
        return list(chain.from_iterable(map(repeat, range(self._count), self._counts())))

    def own_views(self, same: dict[int, int]) -> Views:
        """The views without those of the leaves that are the same as an earlier one."""
        if not same:
            return self.views
        views, done = Views([], [], []), 0
        for index in self.others:
            if index in same:
                views.add(*self.views.part(done, self.firsts[index]))
                done = self.firsts[index + 1]
        views.add(*self.views.part(done, None))
        return views

    def with_same(self, same: dict[int, int]) -> Leaves:
        """The leaves, of which some are the same object as an earlier one, and have no views of their own so far.

        Args:
            same: Of each of these, in order, the index of the first.
        """
        if not same:
            return self
        views, others, done = Views([], [], []), dict(self.others), 0
        for index, first in same.items():
            begin = self.firsts[index]
            views.add(*self.views.part(done, begin))
            others[index] = self[first]
            views.append(others[index].views)
            done = begin
        views.add(*self.views.part(done, None))
        return Leaves(len(self), views, others)

    def _counts(self) -> list[int]:
        counts = [1] * self._count
        for index, leaf in self.others.items():
            counts[index] = len(leaf.views)
        return counts

    @property
    def plain(self) -> Sequence[int]:
        """Those that are one plain tensor, by index."""
        if not self.others:
            return range(self._count)
        return [index for index in range(self._count) if index not in self.others]


class Manifest:
    """The description sent ahead.

    Args:
        nodes: The nesting in preorder.
        leaves: The leaves, in the order of ``nodes``.
        storages: The storages that the leaves' views refer to.
        same: For each leaf that is the same object as an earlier one, the index of the first.
        shared: The same for containers, by index of their nodes.
        paths: Path of each leaf; None to derive them from ``nodes`` when they are asked for.
        treespec: Set instead of ``nodes`` where the peer describes its nesting by torch's own pytree.
    """

    def __init__(
        self,
        nodes: list[Node],
        leaves: Leaves,
        storages: list[Storage],
        *,
        same: dict[int, int] | None = None,
        shared: dict[int, int] | None = None,
        paths: list[Path] | None = None,
        treespec: Any = None,
    ) -> None:
        self.nodes = nodes
        self.leaves = leaves
        self.storages = storages
        # Two kinds of sharing, kept apart. ``same`` and ``shared`` are of objects, which Python tells by ``is``; that
        # views share a storage is of memory, and follows from the views themselves.
        self.same = same or {}
        self.shared = shared or {}
        self.treespec = treespec
        self._paths = paths

    @property
    def paths(self) -> list[Path]:
        """Path of each leaf."""
        # For errors and reports mostly: a transfer that goes well needs none, and they cost as much as describing does.
        if self._paths is None:
            self._paths = paths_of(self.nodes)
        return self._paths

    @property
    def views(self) -> Views:
        """The views of all leaves."""
        return self.leaves.views

    def build(self, leaves: Sequence[object]) -> object:
        """The state dict with these leaves in place of the described ones."""
        # Upstream's own code, over a plain group, sends torch's TreeSpec.
        if self.treespec is not None:
            return torch.utils._pytree.tree_unflatten(leaves, self.treespec)
        return unflatten(self.nodes, leaves, self.shared)


def disjoint(views: Sequence[View]) -> bool:
    """Whether no two of these views of one storage, whose extents may overlap, have an element in common."""
    itemsize = views[0].geometry.itemsize
    if len(views) == 1:
        return True
    # Not known, rather than known to share: whoever asks then takes the safe way.
    if any(view.geometry.itemsize != itemsize or view.geometry.order is None for view in views):
        return False
    first = min(view.offset for view in views)
    # A map of the elements, one byte for each. Strides could be compared by number theory (do two lattices meet?);
    # columns of one matrix, the usual case, are marked faster than that is thought through.
    taken = torch.zeros(max(view.end for view in views) // itemsize - first, dtype=torch.uint8)
    for view in views:
        order = view.geometry.order or ()
        shape = [view.geometry.shape[dim] for dim in order]
        places = taken.as_strided(shape, [view.geometry.stride[dim] for dim in order], view.offset - first)
        if places.any():
            return False
        places.fill_(1)
    return True


def made(cls: type[_T], rows: Iterable[tuple[Any, ...]]) -> list[_T]:
    """Many tuples of a class at once, in a loop that is not Python's."""
    return list(map(tuple.__new__, repeat(cls), rows))  # type: ignore[arg-type]
