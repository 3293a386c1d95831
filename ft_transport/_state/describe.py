"""A state dict becomes a manifest, and the memory behind it; no byte is copied.

Strategy: states of a hundred thousand small tensors are as common as those of a few large ones, and of these a call of
Python for each leaf is all that they cost. So what torch knows of plain tensors is taken in columns, by ``map`` over
functions of C, and only leaves that are something else are looked at one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, islice
from operator import add, attrgetter, itemgetter

import torch

from ft_transport._device import on_host, type_of
from ft_transport._process import let_others_run
from ft_transport._state.classes import ATOMIC
from ft_transport._state.geometry import Geometry, alone_in, geometry
from ft_transport._state.kinds.base import PLAIN, VALUE, Part, all_plain, flatten_leaf
from ft_transport._state.manifest import (
    ALIGNMENT,
    EMPTY,
    EMPTY_ON_DEVICE,
    Leaf,
    Leaves,
    Manifest,
    Storage,
    View,
    Views,
    made,
)
from ft_transport._state.tree import Flat, Node, flatten, format_path, paths_of
from ft_transport.errors import LocalProtocolError

__all__ = ["Tensors", "describe", "describe_flat", "lies_in"]


# What gives other threads a turn, at a source, whom destinations may ask meanwhile. Those of a destination can wait for
# the 5 ms after which Python gives them one; a turn that nobody takes costs 0.1 ms.
Turn = Callable[[], object] | None


class Tensors:
    """The plain tensors of a state, in the order of its leaves, and what torch knows of them, column by column.

    Attributes:
        tensors: One for each view of the manifest, but for those of leaves that are the same object as an earlier one.
        geometries: Of each.
        offsets: Of its first element in its storage, in elements.
        capacities: Bytes of its storage.
        alive: Its storage.
        storages: Identity of it.
        bases: Address of its storage.
        addresses: Of its first element.
        on_cpu: Whether all are on the CPU.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.tensors = tensors
        self.on_cpu = True
        self.geometries: list[Geometry] = []
        self.offsets: list[int] = []
        self.alive: list[torch.UntypedStorage] = []  # an identity is one as long as its owner lives
        self.capacities: list[int] = []
        self.bases: list[int] = []
        self.addresses: list[int] = []
        for first in range(0, len(tensors), _AT_ONCE):
            some = tensors[first : first + _AT_ONCE]
            self._note(some, map(attrgetter("dtype"), some), on_host(some))

    @classmethod
    def of_plain(cls, tensors: Sequence[torch.Tensor], between: Turn = None) -> Tensors | None:
        """Of such that are all plain, each a ``torch.Tensor``; None if one is something else.

        Args:
            tensors: Those.
            between: Called after some hundred of them, if it is given.
        """
        columns = cls(())
        columns.tensors = tensors
        for first in range(0, len(tensors), _AT_ONCE):
            some = tensors[first : first + _AT_ONCE]
            dtypes, on_cpu = list(map(attrgetter("dtype"), some)), on_host(some)
            if not all_plain(some, dtypes, on_cpu=on_cpu):
                return None
            columns._note(some, dtypes, on_cpu)
            if between is not None:
                between()
        return columns

    def _note(self, tensors: Sequence[torch.Tensor], dtypes: Iterable[torch.dtype], on_cpu: bool) -> None:
        self.on_cpu = self.on_cpu and on_cpu
        shapes = map(attrgetter("shape"), tensors)
        # ``geometry`` is a cache: a state has a few dozen shapes, and what follows from each is worked out once for the
        # process.
        self.geometries += map(geometry, dtypes, shapes, map(torch.Tensor.stride, tensors))
        self.offsets += map(torch.Tensor.storage_offset, tensors)  # type: ignore[arg-type]
        self.addresses += map(torch.Tensor.data_ptr, tensors)
        storages = list(map(torch.Tensor.untyped_storage, tensors))
        self.alive += storages
        self.capacities += map(torch.UntypedStorage.nbytes, storages)
        self.bases += _bases(storages)

    @functools.cached_property
    def storages(self) -> list[int]:
        # Where every tensor begins with its storage, and no two at the same address, no two have one storage.
        if not any(self.offsets) and len({*self.addresses}) == len(self.addresses):
            return self.addresses
        # The address of C++'s own object: two Python wrappers of one storage need not be one object.
        return list(map(attrgetter("_cdata"), self.alive))

    def view(self, index: int) -> View:
        """The view of a tensor in its own storage."""
        return View(EMPTY, self.geometries[index], self.offsets[index])

    @functools.cached_property
    def without_memory(self) -> list[int]:
        """The tensors whose elements do not lie in their storage, in order."""
        # As many distinct ones as there are shapes, in most states.
        rows = {*zip(self.geometries, self.offsets, self.capacities, strict=True)}
        # A tensor of no elements has address 0, so most states with one go on to the slow look; it finds nothing wrong
        # with them.
        if all(lies_in(*row) for row in rows) and all(self.addresses):
            return []
        columns = zip(self.geometries, self.offsets, self.capacities, self.addresses, strict=True)
        return [
            index
            for index, (shape, offset, capacity, address) in enumerate(columns)
            if shape.numel and not (address and lies_in(shape, offset, capacity))
        ]


def lies_in(shape: Geometry, offset: int, capacity: int) -> bool:
    """Whether a tensor lies in its storage.

    FSDP gives back what a module does not need just now by resizing its storage to nothing: the tensor still has its
    shape, and no memory. Moved as it is, that would be a read or a write of unmapped addresses.

    Args:
        shape: Of the tensor.
        offset: Of its first element, in elements.
        capacity: Bytes of its storage.
    """
    return offset * shape.itemsize + shape.span <= capacity


# What torch knows of so many tensors stays in a core's cache while one thing after the other is asked of them. That of
# twenty thousand does not, and asking takes nearly twice as long.
_AT_ONCE = 500


def _bases(storages: Sequence[torch.UntypedStorage]) -> list[int]:
    """The address of each storage; 0 for one that has none, and says so by an error (a functional tensor's)."""
    try:
        return list(map(torch.UntypedStorage.data_ptr, storages))
    except RuntimeError:
        return [_bases([storage])[0] for storage in storages] if len(storages) > 1 else [0]


def describe(state_dict: object) -> tuple[Manifest, Tensors]:
    """Describe ``state_dict``; no byte is copied.

    Returns:
        The manifest, and the state's own tensors behind its views.

    Raises:
        LocalProtocolError: A leaf cannot travel; the text names every such path and the reason.
    """
    return describe_flat(flatten(state_dict))


def describe_flat(flat: Flat, between: Turn = let_others_run) -> tuple[Manifest, Tensors]:
    """As :func:`describe`, of a state dict that is flattened already.

    Args:
        flat: That.
        between: Called after some hundred plain tensors: other threads of a source answer peers meanwhile.
    """
    # In four passes over columns, not one over leaves: the nesting, what each leaf is made of, where its tensors lie,
    # and leaves again from all three.
    nodes, values, shared = flat
    parts, same, columns = _take_all_apart(values, nodes, between)
    # Looked for before anything is said to anybody, and the path is told: which module is sharded away is the first
    # thing one wants to know.
    if columns.without_memory:
        bad = columns.without_memory[0]
        counts = [parts[index][1] if index in parts else 1 for index in range(len(values))]
        owner = next(leaf for leaf, end in enumerate(accumulate(counts)) if end > bad)
        path = format_path(paths_of(nodes)[owner])
        raise LocalProtocolError(f"{path}: a tensor of {columns.geometries[bad]} has no memory", phase="describe")
    storages: list[Storage] = []
    leaves = _leaves(len(values), _place_all(columns, storages), parts)
    return Manifest(nodes, leaves.with_same(same), storages, same=same, shared=shared), columns


def _leaves(count: int, views: Views, parts: dict[int, tuple[Part, int]]) -> Leaves:
    """So many leaves, of which all are plain tensors but those that are made of these parts and so many tensors."""
    others: dict[int, Leaf] = {}
    done = number = 0
    for index, (part, num_views) in parts.items():
        number += index - done
        done = index + 1
        own = tuple(map(views.__getitem__, range(number, number + num_views)))
        number += num_views
        others[index] = Leaf(part.kind, own, *part[1:])
    return Leaves(count, views, others)


def _take_all_apart(
    values: Sequence[object], nodes: list[Node], between: Turn
) -> tuple[dict[int, tuple[Part, int]], dict[int, int], Tensors]:
    """Take every leaf apart; of leaves that are one object only the first has tensors.

    Returns:
        A part for each leaf that is not one plain tensor, by index and in order, and how many tensors it has; for each
        leaf that is the same object as an earlier one the index of the first; the plain tensors of all leaves.
    """
    parts: dict[int, tuple[Part, int]] = {}
    same: dict[int, int] = {}
    tensors: list[torch.Tensor] = []
    refused: dict[int, str] = {}
    # Exactly this class: a Parameter has something to tell (``requires_grad``), and a subclass may be anything.
    plain = [value for value in values if type(value) is torch.Tensor]
    seen: dict[int, int] = {}
    again: set[int] = set()
    if len({*map(id, plain)}) < len(plain):
        for index, value in enumerate(values):
            if type(value) is torch.Tensor and seen.setdefault(id(value), index) != index:
                again.add(index)
        plain = [values[index] for index in seen.values()]  # type: ignore[misc]
    # Of most states they need no closer look.
    columns = Tensors.of_plain(plain, between)
    simple = torch.Tensor if columns is not None else None
    rest, done = iter(plain), 0
    for index in [index for index, value in enumerate(values) if type(value) is not simple or index in again]:
        tensors += islice(rest, index - done)
        done = index + 1
        value, part = values[index], PLAIN
        inner: Sequence[torch.Tensor] = ()
        if type(value) in ATOMIC:
            part = Part(VALUE, value)
        # Tied weights and a module that is registered twice. The values are kept by the list they are in, so an id
        # stays one object's.
        elif (first := seen.setdefault(id(value), index)) != index:
            same[index] = first
            part = Part(VALUE)
        else:
            try:
                part, inner = flatten_leaf(value)
            except Exception as exc:  # a kind's, or a class's own code when it is pickled, which may raise anything
                refused[index] = str(exc) if isinstance(exc, ValueError) else f"{type(exc).__name__}: {exc}"
        if part is not PLAIN:
            parts[index] = part, len(inner)
        tensors += inner
    if refused:
        paths = paths_of(nodes)
        # All of them at once: whoever has to change a state wants the whole list, not one path after each restart.
        text = "; ".join(f"{format_path(paths[index])}: {reason}" for index, reason in refused.items())
        raise LocalProtocolError(text, phase="describe")
    if columns is not None:
        tensors += rest
        if len(tensors) == len(plain):
            return parts, same, columns
    return parts, same, Tensors(tensors)


def _place_all(columns: Tensors, storages: list[Storage]) -> Views:
    """Give every tensor a view of the manifest's storages."""
    tensors, geometries, offsets = columns.tensors, columns.geometries, columns.offsets
    # Most storages have one view, one without gaps; what follows is what _place would do for each.
    alone = alone_in(columns.storages, geometries)
    memory, shapes, firsts = tensors, geometries, offsets
    if len(alone) < len(tensors):
        memory = [tensors[index] for index in alone]
        shapes = [geometries[index] for index in alone]
        firsts = [offsets[index] for index in alone]
    ends = list(map(attrgetter("span"), shapes))
    if any(firsts):
        begins = [first * shape.itemsize % ALIGNMENT for first, shape in zip(firsts, shapes, strict=True)]
        firsts = [begin // shape.itemsize for begin, shape in zip(begins, shapes, strict=True)]
        ends = list(map(add, begins, ends))
    if columns.on_cpu:
        # One tuple for all storages of a size. They are equal, and nobody asks which is which.
        of_size = {end: Storage(end, "cpu") for end in {*ends}}
        storages += map(of_size.__getitem__, ends)
    else:
        storages += made(Storage, zip(ends, map(type_of, memory), strict=True))
    if len(alone) == len(tensors):
        return Views(list(range(len(alone))), shapes, firsts)
    views = Views([EMPTY] * len(tensors), list(geometries), list(offsets))
    for storage, (index, first) in enumerate(zip(alone, firsts, strict=True)):
        views.storages[index], views.offsets[index] = storage, first
    groups: dict[int, list[int]] = {}
    for index in sorted({*range(len(tensors))}.difference(alone)):
        if geometries[index].numel:
            groups.setdefault(columns.storages[index], []).append(index)
        elif not columns.on_cpu and type_of(tensors[index]) != "cpu":
            views.storages[index] = EMPTY_ON_DEVICE
    # Views that share a storage. How they share it is the only thing that must survive: ties, rows of one buffer, a
    # flat parameter and what is cut out of it.
    for group in groups.values():
        _place(group, columns, views, storages)
    return views


def _clusters(group: list[int], columns: Tensors) -> list[tuple[int, int, list[int]]]:
    """The byte ranges that the views of one storage refer to, in order, each with the tensors in it."""
    clusters: list[tuple[int, int, list[int]]] = []
    extents = [(view.begin, view.end, index) for index in group for view in [columns.view(index)]]
    for begin, end, index in sorted(extents, key=itemgetter(0, 1)):
        # Touching is not overlapping: parameters side by side in a flat buffer are ranges of their own, each of which
        # can land somewhere else.
        if clusters and begin < clusters[-1][1]:
            first, reached, members = clusters[-1]
            members.append(index)
            clusters[-1] = first, max(reached, end), members
        else:
            clusters.append((begin, end, [index]))
    return clusters


def _place(group: list[int], columns: Tensors, views: Views, storages: list[Storage]) -> None:
    """Give the views of one storage one in the manifest, which holds only what they refer to."""
    first = columns.view(group[0])
    storage = len(storages)
    if first.geometry.closes_gaps and all(columns.view(index) == first for index in group):
        view = View(storage, _without_gaps(first.geometry), 0)
        nbytes = view.end
        for index in group:
            views[index] = view
    else:
        nbytes = last_end = 0
        for begin, end, members in _clusters(group, columns):
            # Gaps are closed by multiples of 64 bytes, so that a whole storage keeps its offsets and all stay aligned.
            new_begin = nbytes + (begin - last_end) % ALIGNMENT
            for index in members:
                shape = columns.geometries[index]
                views[index] = View(storage, shape, columns.offsets[index] + (new_begin - begin) // shape.itemsize)
            nbytes, last_end = new_begin + end - begin, end
    storages.append(Storage(nbytes, type_of(columns.tensors[group[0]])))


def _without_gaps(shape: Geometry) -> Geometry:
    """The same elements in the same order of memory, with no gaps between them."""
    stride = [0] * len(shape.shape)
    numel = 1
    for dim in reversed(shape.order or ()):
        stride[dim] = numel
        numel *= shape.shape[dim]
    return geometry(shape.dtype, shape.shape, tuple(stride))
