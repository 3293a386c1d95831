"""What a state dict is: its nesting, its leaves, the views they hold, the storages behind these, the ties.

Strategy: describe first, move bytes later. :func:`describe` turns a state dict into a :class:`Manifest`
(integers, names and plain values: all that crosses to the peer) and the *regions*, the memory from which the
bytes are taken. In the manifest a storage holds only bytes that some view refers to: ten rows of a huge
storage become a storage of ten rows, and a lone view with gaps becomes a dense one. Views that share a
storage still share it, so ties survive.

Not here: which bytes travel in which message (``_layout``), how a manifest is encoded (``_codec``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ft_transport._leaves import KINDS, Meshes, kind_of
from ft_transport._tree import Node, Path, flatten, format_path, unflatten
from ft_transport.errors import LocalProtocolError

__all__ = [
    "Leaf",
    "Manifest",
    "Regions",
    "Storage",
    "View",
    "describe",
    "extent",
    "is_dense",
    "memory_order",
    "merge",
    "rebuild",
    "storage_as",
]

# Storages start their byte ranges at multiples of this, so that every dtype is aligned and a vector load is.
ALIGNMENT = 64


class View(NamedTuple):
    """One strided view of a storage. Sizes and strides in elements, as torch has them.

    ``storage`` is an index into the manifest's storages, -1 for a view without elements.
    """

    storage: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


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


# Memory that byte range (storage, begin) is taken from: uint8 and flat, or a strided tensor whose elements
# in order of their dimensions are the range.
Regions = dict[tuple[int, int], torch.Tensor]


def storage_as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The whole storage of ``tensor`` as a flat tensor of ``dtype``; it shares the memory.

    The result has ``storage.nbytes() // dtype.itemsize`` elements, more than the tensor's own where its
    strides leave gaps.

    Raises:
        TypeError: ``tensor`` is a subclass, whose storage need not be what it shows.
    """
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise TypeError(f"expected a plain tensor, got {type(tensor).__qualname__}")
    storage = tensor.untyped_storage()
    flat = torch.empty(0, dtype=dtype, device=tensor.device)
    return flat.set_(storage, 0, (storage.nbytes() // dtype.itemsize,), (1,))  # type: ignore[call-overload, no-any-return]


def extent(view: View) -> tuple[int, int]:
    """Byte range (begin, end) in the storage from the view's first to its last element."""
    last = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride, strict=True))
    itemsize = view.dtype.itemsize
    return view.offset * itemsize, (view.offset + last + 1) * itemsize


def memory_order(shape: Sequence[int], stride: Sequence[int]) -> list[int] | None:
    """Dimensions that hold distinct elements, outermost in memory first; None if elements overlap.

    Dimensions of size one and expanded ones (stride 0) are left out.
    """
    dims = [dim for dim, size in enumerate(shape) if size > 1 and stride[dim] != 0]
    dims.sort(key=lambda dim: stride[dim], reverse=True)
    inner = 1
    for dim in reversed(dims):
        if stride[dim] < inner:
            return None
        inner = stride[dim] * shape[dim]
    return dims


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether every element has a place of its own and there are no gaps between them."""
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size > 1):
        if step != expected:
            return False
        expected *= size
    return True


def merge(extents: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Disjoint byte ranges, in order, that cover the extents; only overlapping ones are joined."""
    ranges: list[tuple[int, int]] = []
    for begin, end in sorted(extents):
        if ranges and begin < ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], max(end, ranges[-1][1]))
        else:
            ranges.append((begin, end))
    return ranges


# ------------------------------------------------------------------------------------------- describe


class _Slot(NamedTuple):
    """A view before it is renumbered: which leaf and which of its inner tensors."""

    leaf: int
    position: int
    tensor: torch.Tensor
    view: View


def describe(state_dict: object) -> tuple[Manifest, Regions]:
    """Describe ``state_dict``; no byte is copied.

    Returns:
        The manifest, and for each byte range in it the memory to take it from. The regions alias the
        state's tensors.

    Raises:
        LocalProtocolError: A leaf cannot travel; the text names every such path and the reason.
    """
    nodes, paths, values = flatten(state_dict)
    leaves: list[Leaf] = []
    slots: dict[int, list[_Slot]] = {}
    refused: list[str] = []
    for index, value in enumerate(values):
        try:
            leaves.append(_describe_leaf(index, value, slots))
        except ValueError as exc:
            refused.append(f"{format_path(paths[index])}: {exc}")
    if refused:
        raise LocalProtocolError("; ".join(refused), phase="describe")
    manifest = Manifest(nodes, paths, leaves, [])
    regions: Regions = {}
    views: dict[tuple[int, int], View] = {}
    for group in slots.values():
        for part in _separate(group):
            _place(part, manifest.storages, regions, views)
    for index, leaf in enumerate(leaves):
        if leaf.views:
            placed = tuple(views.get((index, i), view) for i, view in enumerate(leaf.views))
            leaves[index] = leaf._replace(views=placed)
    return manifest, regions


def _describe_leaf(index: int, value: object, slots: dict[int, list[_Slot]]) -> Leaf:
    kind = kind_of(value)
    if kind is None:
        return Leaf("value", (), value)
    views = []
    for position, tensor in enumerate(kind.inner(value)):
        shape, stride = tuple(tensor.shape), tensor.stride()
        view = View(-1, tensor.dtype, shape, stride, int(tensor.storage_offset()))
        views.append(view)
        if 0 not in shape:
            slots.setdefault(tensor.untyped_storage()._cdata, []).append(_Slot(index, position, tensor, view))
    return Leaf(kind.name, tuple(views), kind.context(value))


def _separate(group: list[_Slot]) -> list[list[_Slot]]:
    """Split one storage's views: what can be sent without its gaps goes by itself, the rest together."""
    if len(group) == 1:
        return [group]
    rest: list[_Slot] = []
    alone: list[list[_Slot]] = []
    for begin, end in merge(extent(slot.view) for slot in group):
        members = [slot for slot in group if begin <= extent(slot.view)[0] < end]
        if all(slot.view == members[0].view for slot in members) and _closes_gaps(members[0].view):
            alone.append(members)
        else:
            rest.extend(members)
    return [rest, *alone] if rest else alone


def _closes_gaps(view: View) -> bool:
    """Whether the view has gaps between its elements that can be left out."""
    dims = memory_order(view.shape, view.stride)
    if dims is None:
        return False
    begin, end = extent(view)
    return _numel(view.shape, dims) * view.dtype.itemsize < end - begin


def _numel(shape: Sequence[int], dims: Iterable[int]) -> int:
    numel = 1
    for dim in dims:
        numel *= shape[dim]
    return numel


def _place(
    group: list[_Slot],
    storages: list[Storage],
    regions: Regions,
    views: dict[tuple[int, int], View],
) -> None:
    """Give the views of ``group`` one storage in the manifest, which holds only what they refer to."""
    storage = len(storages)
    first = group[0]
    if _closes_gaps(first.view) and all(slot.view == first.view for slot in group):
        nbytes, placed, region = _without_gaps(first, storage)
        regions[storage, 0] = region
        for slot in group:
            views[slot.leaf, slot.position] = placed
    else:
        nbytes = 0
        flat = storage_as(_plain(first.tensor), torch.uint8)
        for begin, end in merge(extent(slot.view) for slot in group):
            # Less than a cache line of gap is kept, so that a whole storage keeps its offsets.
            new_begin = begin if begin - nbytes < ALIGNMENT else nbytes + -nbytes % ALIGNMENT + begin % ALIGNMENT
            regions[storage, new_begin] = flat[begin:end]
            for slot in group:
                if begin <= extent(slot.view)[0] < end:
                    shift = (new_begin - begin) // slot.view.dtype.itemsize
                    moved = slot.view._replace(storage=storage, offset=slot.view.offset + shift)
                    views[slot.leaf, slot.position] = moved
            nbytes = new_begin + end - begin
    storages.append(Storage(nbytes, first.tensor.device.type))


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if type(tensor) is torch.Tensor else tensor.detach()


def _without_gaps(slot: _Slot, storage: int) -> tuple[int, View, torch.Tensor]:
    """Size, dense view and strided region of a view whose gaps do not travel."""
    view = slot.view
    dims = memory_order(view.shape, view.stride) or []
    stride = [0] * len(view.shape)
    numel = 1
    for dim in reversed(dims):
        stride[dim] = numel
        numel *= view.shape[dim]
    region = slot.tensor.detach().as_strided(
        [view.shape[dim] for dim in dims], [view.stride[dim] for dim in dims], view.offset
    )
    return numel * view.dtype.itemsize, View(storage, view.dtype, view.shape, tuple(stride), 0), region


# -------------------------------------------------------------------------------------------- rebuild


def rebuild(leaf: Leaf, tensors: Sequence[torch.Tensor], meshes: Meshes) -> object:
    """The leaf that ``leaf`` describes, holding ``tensors``; a plain value is returned as it is."""
    if leaf.kind == "value":
        return leaf.context
    return KINDS[leaf.kind].rebuild(tensors, leaf.context, meshes)
