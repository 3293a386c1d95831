"""What a state dict is: its nesting, its leaves, the views they hold, the storages behind these, the ties.

Strategy: describe first, move bytes later. :func:`describe` turns a state dict into a :class:`Manifest`
(integers, names and plain values: all that crosses to the peer) and the *blocks* of memory from which the bytes are
taken. In the manifest a storage holds only bytes that some view refers to: ten rows of a huge storage become a
storage of ten rows, and a lone view with gaps becomes a dense one. Views that share a storage still share it, so
ties survive.

Not here: which bytes travel in which message (``_layout``), how a manifest is encoded (``_codec``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ft_transport._leaves import KINDS, Meshes, kind_of
from ft_transport._memory import Block
from ft_transport._tree import Node, Path, flatten, format_path, unflatten
from ft_transport.errors import LocalProtocolError

__all__ = [
    "Blocks",
    "Geometry",
    "Leaf",
    "Manifest",
    "Storage",
    "View",
    "describe",
    "disjoint",
    "geometry",
    "merge",
    "rebuild",
]

# Storages start their byte ranges at multiples of this, so that every dtype is aligned and a vector load is.
ALIGNMENT = 64


class Geometry:
    """Dtype, shape and strides, and what follows from them. Made by :func:`geometry`, which keeps one of each.

    Attributes:
        dtype: Of the elements.
        shape: Sizes in elements.
        stride: Steps in elements, none negative.
        itemsize: Bytes of an element.
        numel: Number of elements.
        span: Bytes from the first to behind the last element, 0 without elements.
        order: Dimensions that hold distinct elements, outermost in memory first (without those of size one and
            expanded ones); None if elements overlap in another way.
        dense: Whether every element has a place of its own and there are no gaps between them.
        distinct_bytes: Bytes of the elements, expanded ones counted once.
        closes_gaps: Whether there are gaps that can be left out.
        expanded: Whether elements are repeated by a stride of zero.
    """

    __slots__ = (
        "closes_gaps",
        "dense",
        "distinct_bytes",
        "dtype",
        "expanded",
        "itemsize",
        "numel",
        "order",
        "shape",
        "span",
        "stride",
    )

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.dtype, self.shape, self.stride = dtype, shape, stride
        self.itemsize = dtype.itemsize
        self.numel = math.prod(shape)
        steps = [(step, size) for step, size in zip(stride, shape, strict=True) if size > 1]
        self.span = self.itemsize * (1 + sum((size - 1) * step for step, size in steps)) if self.numel else 0
        self.expanded = any(step == 0 for step, _ in steps)
        self.order = _memory_order(shape, stride)
        self.dense = self.order is not None and not self.expanded and self.span == self.numel * self.itemsize
        # Meaningless where elements overlap in another way than by a stride of zero.
        self.distinct_bytes = math.prod(shape[dim] for dim in self.order or ()) * self.itemsize if self.numel else 0
        self.closes_gaps = self.order is not None and self.distinct_bytes < self.span

    def __repr__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.shape}"


@functools.lru_cache(maxsize=16_384)
def geometry(dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]) -> Geometry:
    """The geometry of a tensor; equal ones are the same object as long as the cache holds them."""
    return Geometry(dtype, shape, stride)


def _memory_order(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...] | None:
    dims = [dim for dim, size in enumerate(shape) if size > 1 and stride[dim] != 0]
    dims.sort(key=lambda dim: stride[dim], reverse=True)
    inner = 1
    for dim in reversed(dims):
        if stride[dim] < inner:
            return None
        inner = stride[dim] * shape[dim]
    return tuple(dims)


class View(NamedTuple):
    """One strided view of a storage.

    Attributes:
        storage: Index into the manifest's storages, -1 for a view without elements.
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
    def end(self) -> int:
        """Behind the last byte in the storage."""
        return self.offset * self.geometry.itemsize + self.geometry.span


class Storage(NamedTuple):
    """Memory behind views: its size in bytes and the type of the device it is on at the source."""

    nbytes: int
    device_type: str


class Leaf(NamedTuple):
    """One leaf: of a kind with views and context, or (``kind == "value"``) a plain value in ``context``."""

    kind: str
    views: tuple[View, ...]
    context: Any


@dataclass
class Manifest:
    """The description sent ahead.

    Attributes:
        nodes: The nesting in preorder.
        paths: Path of each leaf.
        leaves: The leaves, in the order of ``nodes``.
        storages: The storages that the leaves' views refer to.
        treespec: Set instead of ``nodes`` where the peer describes its nesting by torch's own pytree.
    """

    nodes: list[Node]
    paths: list[Path]
    leaves: list[Leaf]
    storages: list[Storage]
    treespec: Any = field(default=None)

    def build(self, leaves: Sequence[object]) -> object:
        """The state dict with these leaves in place of the described ones."""
        if self.treespec is not None:
            return torch.utils._pytree.tree_unflatten(leaves, self.treespec)
        return unflatten(self.nodes, leaves)


# The memory that the byte range at (storage, begin) is taken from.
Blocks = dict[tuple[int, int], Block]


def merge(extents: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Disjoint byte ranges, in order, that cover the extents; only overlapping ones are joined."""
    ranges: list[tuple[int, int]] = []
    for begin, end in sorted(extents):
        if ranges and begin < ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], max(end, ranges[-1][1]))
        else:
            ranges.append((begin, end))
    return ranges


def disjoint(views: Sequence[View]) -> bool:
    """Whether no two of these views of one storage, whose extents may overlap, have an element in common."""
    itemsize = views[0].geometry.itemsize
    if len(views) == 1:
        return True
    if any(view.geometry.itemsize != itemsize or view.geometry.order is None for view in views):
        return False
    first = min(view.offset for view in views)
    taken = torch.zeros(max(view.end for view in views) // itemsize - first, dtype=torch.uint8)
    for view in views:
        order = view.geometry.order or ()
        shape = [view.geometry.shape[dim] for dim in order]
        places = taken.as_strided(shape, [view.geometry.stride[dim] for dim in order], view.offset - first)
        if places.any():
            return False
        places.fill_(1)
    return True


# ------------------------------------------------------------------------------------------- describe


class _Slot(NamedTuple):
    """A view before it has its storage in the manifest: which leaf and which of its inner tensors."""

    leaf: int
    position: int
    tensor: torch.Tensor
    view: View


def describe(state_dict: object) -> tuple[Manifest, Blocks]:
    """Describe ``state_dict``; no byte is copied.

    Returns:
        The manifest, and for each byte range in it the memory to take it from, which is the state's own.

    Raises:
        LocalProtocolError: A leaf cannot travel; the text names every such path and the reason.
    """
    nodes, paths, values = flatten(state_dict)
    manifest = Manifest(nodes, paths, [], [])
    groups: dict[int, list[_Slot]] = {}
    refused: list[str] = []
    for index, value in enumerate(values):
        try:
            manifest.leaves.append(_describe_leaf(index, value, groups))
        except ValueError as exc:
            refused.append(f"{format_path(paths[index])}: {exc}")
    if refused:
        raise LocalProtocolError("; ".join(refused), phase="describe")
    blocks: Blocks = {}
    placed: dict[int, dict[int, View]] = {}
    for group in groups.values():
        for part in [group] if len(group) == 1 else _separate(group):
            _place(part, manifest.storages, blocks, placed)
    for index, views in placed.items():
        leaf = manifest.leaves[index]
        manifest.leaves[index] = Leaf(
            leaf.kind, tuple([views.get(i, view) for i, view in enumerate(leaf.views)]), leaf.context
        )
    return manifest, blocks


def _describe_leaf(index: int, value: object, groups: dict[int, list[_Slot]]) -> Leaf:
    kind = kind_of(value)
    if kind is None:
        return Leaf("value", (), value)
    views = []
    for position, tensor in enumerate(kind.inner(value)):
        shape = geometry(tensor.dtype, tuple(tensor.shape), tensor.stride())
        view = View(-1, shape, int(tensor.storage_offset()))
        views.append(view)
        if shape.numel:
            groups.setdefault(tensor.untyped_storage()._cdata, []).append(_Slot(index, position, tensor, view))
    return Leaf(kind.name, tuple(views), kind.context(value))


def _separate(group: list[_Slot]) -> list[list[_Slot]]:
    """Split one storage's views: what can be sent without its gaps goes by itself, the rest together."""
    rest: list[_Slot] = []
    alone: list[list[_Slot]] = []
    for begin, end in merge((slot.view.begin, slot.view.end) for slot in group):
        members = [slot for slot in group if begin <= slot.view.begin < end]
        same: dict[View, list[_Slot]] = {}
        for slot in members:
            same.setdefault(slot.view, []).append(slot)
        distinct = sum(view.geometry.distinct_bytes for view in same)
        if all(view.geometry.closes_gaps for view in same) and distinct < end - begin and disjoint(list(same)):
            alone.extend(same.values())
        else:
            rest.extend(members)
    return [rest, *alone] if rest else alone


def _place(
    group: list[_Slot],
    storages: list[Storage],
    blocks: Blocks,
    placed: dict[int, dict[int, View]],
) -> None:
    """Give the views of ``group`` one storage in the manifest, which holds only what they refer to."""
    first = group[0]
    storage = len(storages)
    if first.view.geometry.closes_gaps and all(slot.view == first.view for slot in group):
        view, blocks[storage, 0] = _without_gaps(first, storage)
        nbytes = view.end
        for slot in group:
            placed.setdefault(slot.leaf, {})[slot.position] = view
    else:
        nbytes = 0
        extents = [(slot.view.begin, slot.view.end) for slot in group]
        for begin, end in merge(extents) if len(group) > 1 else extents:
            # Less than a cache line of gap is kept, so that a whole storage keeps its offsets.
            new_begin = begin if begin - nbytes < ALIGNMENT else nbytes + -nbytes % ALIGNMENT + begin % ALIGNMENT
            members = group if len(group) == 1 else [slot for slot in group if begin <= slot.view.begin < end]
            blocks[storage, new_begin] = _block(members, begin, end)
            for slot in members:
                view = slot.view
                shift = (new_begin - begin) // view.geometry.itemsize
                placed.setdefault(slot.leaf, {})[slot.position] = View(storage, view.geometry, view.offset + shift)
            nbytes = new_begin + end - begin
    storages.append(Storage(nbytes, first.tensor.device.type))


def _block(members: list[_Slot], begin: int, end: int) -> Block:
    for slot in members:
        if slot.view.geometry.dense and slot.view.begin == begin and slot.view.end == end:
            return Block(slot.tensor)
    tensor = members[0].tensor
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return Block(flat.set_(tensor.untyped_storage(), begin, (end - begin,), (1,)))


def _without_gaps(slot: _Slot, storage: int) -> tuple[View, Block]:
    """The dense view, and the memory, of a view whose gaps do not travel."""
    shape = slot.view.geometry
    dims = shape.order or ()
    stride = [0] * len(shape.shape)
    numel = 1
    for dim in reversed(dims):
        stride[dim] = numel
        numel *= shape.shape[dim]
    block = slot.tensor.detach().as_strided(
        [shape.shape[dim] for dim in dims], [shape.stride[dim] for dim in dims], slot.view.offset
    )
    return View(storage, geometry(shape.dtype, shape.shape, tuple(stride)), 0), Block(block, dense=False)


# -------------------------------------------------------------------------------------------- rebuild


def rebuild(leaf: Leaf, tensors: Sequence[torch.Tensor], meshes: Meshes) -> object:
    """The leaf that ``leaf`` describes, holding ``tensors``; a plain value is returned as it is."""
    if leaf.kind == "value":
        return leaf.context
    return KINDS[leaf.kind].rebuild(tensors, leaf.context, meshes)
