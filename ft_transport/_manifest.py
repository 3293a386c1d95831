"""What a state dict is: its nesting, its leaves, the views they hold, the storages behind these, the ties.

Strategy: describe first, move bytes later. :func:`describe` turns a state dict into a :class:`Manifest`
(integers, names and plain values: all that crosses to the peer) and the *blocks* of memory from which the bytes are
taken. In the manifest a storage holds only bytes that some view refers to: ten rows of a huge storage become a
storage of ten rows, and a lone view with gaps becomes a dense one. Views that share a storage still share it, so
ties survive.

Not here: which bytes travel in which message (``_layout``), how a manifest is encoded (``_codec``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ft_transport import _kinds, _kinds_distributed
from ft_transport._geometry import Geometry, geometry, index_of
from ft_transport._leaves import PLAIN, VALUE, Part, take_apart
from ft_transport._memory import Block, indexed
from ft_transport._tree import Node, Path, flatten, format_path, paths_of, unflatten
from ft_transport._values import ATOMIC
from ft_transport.errors import LocalProtocolError

__all__ = [
    "ALIGNMENT",
    "Blocks",
    "Leaf",
    "Manifest",
    "Storage",
    "View",
    "covered",
    "describe",
    "disjoint",
    "range_index",
]

# Whoever describes a state needs every kind of leaf that the package brings.
_ = _kinds, _kinds_distributed

# Storages start their byte ranges at multiples of this, so that every dtype is aligned and a vector load is.
ALIGNMENT = 64


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
    """One leaf: what :class:`Part` says, and the views of its plain tensors; a plain value is in ``context``."""

    kind: str
    views: tuple[View, ...]
    context: Any = None
    parts: tuple[Part, ...] = ()

    @property
    def part(self) -> Part:
        """The leaf without its bytes."""
        return Part(self.kind, self.context, self.parts)


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
        leaves: list[Leaf],
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
        self.same = same or {}
        self.shared = shared or {}
        self.treespec = treespec
        self._paths = paths

    @property
    def paths(self) -> list[Path]:
        """Path of each leaf."""
        if self._paths is None:
            self._paths = paths_of(self.nodes)
        return self._paths

    def build(self, leaves: Sequence[object]) -> object:
        """The state dict with these leaves in place of the described ones."""
        if self.treespec is not None:
            return torch.utils._pytree.tree_unflatten(leaves, self.treespec)
        return unflatten(self.nodes, leaves, self.shared)


# The memory that the byte range at (storage, begin) is taken from.
Blocks = dict[tuple[int, int], Block]


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


# A plain tensor before it has its storage in the manifest: which leaf, which of its tensors, the tensor, its view of
# the storage that it is in.
_Slot = tuple[int, int, torch.Tensor, View]


def describe(state_dict: object) -> tuple[Manifest, Blocks]:
    """Describe ``state_dict``; no byte is copied.

    Returns:
        The manifest, and for each byte range in it the memory to take it from, which is the state's own.

    Raises:
        LocalProtocolError: A leaf cannot travel; the text names every such path and the reason.
    """
    nodes, values, shared = flatten(state_dict)
    manifest = Manifest(nodes, [], [], shared=shared)
    described = _take_all_apart(values, manifest)
    # Most storages have one view, which is placed at once; the others wait until all their views are known.
    storages = [tensor.untyped_storage() for _, tensors in described for tensor in tensors if tensor.numel()]
    keys = [storage._cdata for storage in storages]
    several = {key for key, count in Counter(keys).items() if count > 1} if len(set(keys)) < len(keys) else ()
    groups: dict[int, list[_Slot]] = {}
    blocks: Blocks = {}
    next_storage = iter(storages)
    leaves = manifest.leaves
    for index, (part, tensors) in enumerate(described):
        views = []
        for position, tensor in enumerate(tensors):
            shape = geometry(tensor.dtype, tensor.shape, tensor.stride())
            offset: Any = tensor.storage_offset()
            if shape.numel:
                found = next(next_storage)
                key = found._cdata
                if offset * shape.itemsize + shape.span > found.nbytes() or not tensor.data_ptr():
                    path = format_path(manifest.paths[index])
                    raise LocalProtocolError(f"{path}: a tensor of {shape} has no memory", phase="describe")
            if shape.numel and key not in several and shape.dense:
                views.append(_place_alone(tensor, shape, offset, manifest.storages, blocks))
                continue
            view = View(-1, shape, offset)
            views.append(view)
            if shape.numel:
                groups.setdefault(key, []).append((index, position, tensor, view))
        leaves.append(Leaf("tensor", (views[0],)) if part is PLAIN else Leaf(part.kind, tuple(views), *part[1:]))
    for group in groups.values():
        _place(group, manifest, blocks)
    for index, first in manifest.same.items():
        leaves[index] = leaves[first]
    return manifest, blocks


def _take_all_apart(values: Sequence[object], manifest: Manifest) -> list[tuple[Part, Sequence[torch.Tensor]]]:
    """Take every leaf apart; of leaves that are one object only the first has tensors."""
    described: list[tuple[Part, Sequence[torch.Tensor]]] = []
    refused: dict[int, str] = {}
    seen: dict[int, int] = {}
    for index, value in enumerate(values):
        if type(value) in ATOMIC:
            described.append((Part(VALUE, value), ()))
        elif (first := seen.setdefault(id(value), index)) != index:
            manifest.same[index] = first
            described.append((Part(VALUE), ()))
        else:
            try:
                described.append(take_apart(value))
            except Exception as exc:  # a kind's, or a class's own code when it is pickled, which may raise anything
                refused[index] = str(exc) if isinstance(exc, ValueError) else f"{type(exc).__name__}: {exc}"
    if refused:
        paths = manifest.paths
        text = "; ".join(f"{format_path(paths[index])}: {reason}" for index, reason in refused.items())
        raise LocalProtocolError(text, phase="describe")
    return described


def _place_alone(
    tensor: torch.Tensor, shape: Geometry, offset: int, storages: list[Storage], blocks: Blocks
) -> View:
    """Give the only view of a storage, one without gaps, a storage in the manifest; as :func:`_place` would."""
    storage = len(storages)
    begin = offset * shape.itemsize % ALIGNMENT if offset else 0
    blocks[storage, begin] = Block(tensor)
    storages.append(Storage(begin + shape.span, "cpu" if tensor.is_cpu else tensor.device.type))
    return View(storage, shape, begin // shape.itemsize)


def _clusters(group: list[_Slot]) -> list[tuple[int, int, list[_Slot]]]:
    """The byte ranges that the views of one storage refer to, in order, each with the views in it."""
    clusters: list[tuple[int, int, list[_Slot]]] = []
    for begin, end, slot in sorted([(slot[3].begin, slot[3].end, slot) for slot in group], key=lambda found: found[:2]):
        if clusters and begin < clusters[-1][1]:
            first, reached, members = clusters[-1]
            members.append(slot)
            clusters[-1] = first, max(reached, end), members
        else:
            clusters.append((begin, end, [slot]))
    return clusters


def _set_view(manifest: Manifest, slot: _Slot, view: View) -> None:
    index, position, _, _ = slot
    leaf = manifest.leaves[index]
    views = (view,) if len(leaf.views) == 1 else (*leaf.views[:position], view, *leaf.views[position + 1 :])
    manifest.leaves[index] = Leaf(leaf.kind, views, leaf.context, leaf.parts)


def _place(group: list[_Slot], manifest: Manifest, blocks: Blocks) -> None:
    """Give the views of ``group`` one storage in the manifest, which holds only what they refer to."""
    _, _, tensor, first = group[0]
    storage = len(manifest.storages)
    if first.geometry.closes_gaps and all(view == first for _, _, _, view in group):
        view, blocks[storage, 0] = _without_gaps(tensor, first, storage)
        nbytes = view.end
        for slot in group:
            _set_view(manifest, slot, view)
    else:
        nbytes = last_end = 0
        for begin, end, members in _clusters(group):
            # Gaps are closed by multiples of 64 bytes, so that a whole storage keeps its offsets and all stay aligned.
            new_begin = nbytes + (begin - last_end) % ALIGNMENT
            blocks[storage, new_begin] = _block(members, begin, end)
            for slot in members:
                view = slot[3]
                shift = (new_begin - begin) // view.geometry.itemsize
                _set_view(manifest, slot, View(storage, view.geometry, view.offset + shift))
            nbytes, last_end = new_begin + end - begin, end
    manifest.storages.append(Storage(nbytes, tensor.device.type))


def _block(members: list[_Slot], begin: int, end: int) -> Block:
    for _, _, tensor, view in members:
        if view.geometry.dense and view.begin == begin and view.end == end:
            return Block(tensor)
    tensor = members[0][2]
    found = range_index([view for _, _, _, view in members], begin, end)
    if found is not None:
        return indexed(tensor.detach(), begin, end, *found)
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return Block(flat.set_(tensor.untyped_storage(), begin, (end - begin,), (1,)))


def range_index(views: Sequence[View], begin: int, end: int) -> tuple[torch.Tensor, int] | None:
    """Which elements of a range its views refer to, None where that is all of it; see ``_geometry.index_of``."""
    if covered(views, begin, end):
        return None
    return index_of([(view.geometry, view.begin) for view in views], begin, end)


def covered(views: Sequence[View], begin: int, end: int) -> bool:
    """Whether those of the views that have no gaps leave none of the range out."""
    reached = begin
    for first, last in sorted((view.begin, view.end) for view in views if view.geometry.dense):
        if first > reached:
            return False
        reached = max(reached, last)
    return reached == end


def _without_gaps(tensor: torch.Tensor, view: View, storage: int) -> tuple[View, Block]:
    """The dense view, and the memory, of a view whose gaps do not travel."""
    shape = view.geometry
    dims = shape.order or ()
    stride = [0] * len(shape.shape)
    numel = 1
    for dim in reversed(dims):
        stride[dim] = numel
        numel *= shape.shape[dim]
    block = tensor.detach().as_strided(
        [shape.shape[dim] for dim in dims], [shape.stride[dim] for dim in dims], view.offset
    )
    return View(storage, geometry(shape.dtype, shape.shape, tuple(stride)), 0), Block(block, dense=False)
