"""Where the elements of a strided tensor lie. Integers only."""

from __future__ import annotations

import functools
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence

import torch

__all__ = [
    "MAX_DIMS",
    "QUANTIZED",
    "Geometry",
    "Placed",
    "alone_in",
    "checked_geometry",
    "covered",
    "geometry",
    "geometry_of",
    "index_of",
    "merge",
    "range_index",
]

# Dtypes whose tensors are more than their bytes.
QUANTIZED = frozenset({torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4})


# One object for each distinct dtype, shape and strides, so that ``is`` compares two, and a dict of them is quick. Not a
# dataclass: what is derived is derived once, not asked again.
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
        self.dtype, self.shape, self.stride = dtype, tuple(shape), tuple(stride)
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


# What torch's own operations accept. The product of many sizes would take time by the square of their number.
MAX_DIMS = 64


def checked_geometry(dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]) -> Geometry:
    """The geometry of a tensor that a peer described.

    Raises:
        Exception: torch could not make such a tensor.
    """
    if len(shape) > MAX_DIMS:
        raise ValueError(f"{len(shape)} dimensions, at most {MAX_DIMS} are accepted")
    for number in (*shape, *stride):
        if type(number) is not int or number < 0:
            raise ValueError(f"shape {shape}, stride {stride}")
    # Even a view without elements is made by torch, whose sizes are 64 bits.
    reach = sum(max(size, 1) * step for size, step in zip(shape, stride, strict=True))
    if max(math.prod(max(size, 1) for size in shape), reach) * 16 > sys.maxsize:
        raise ValueError(f"out of range: shape {shape}, stride {stride}")
    # Not by way of the cache: what a peer sends would stay in it.
    return Geometry(dtype, shape, stride)


def _memory_order(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...] | None:
    dims = [dim for dim, size in enumerate(shape) if size > 1 and stride[dim] != 0]
    dims.sort(key=lambda dim: stride[dim], reverse=True)
    inner = 1  # elements from the first to behind the last of the dimensions so far
    for dim in reversed(dims):
        if stride[dim] < inner:
            return None
        inner += (shape[dim] - 1) * stride[dim]
    return tuple(dims)


def geometry_of(tensor: torch.Tensor) -> Geometry:
    """The geometry of a plain strided tensor."""
    return geometry(tensor.dtype, tensor.shape, tensor.stride())


def alone_in(storages: Sequence[int], shapes: Sequence[Geometry]) -> Sequence[int]:
    """Which views have elements, have no gaps, and are the only one of their storage, by index.

    Args:
        storages: What tells the storage of each.
        shapes: Of each.
    """
    # Asked of shapes, of which there are few, in place of views; and of most states it is all of them.
    distinct = {*shapes}
    dense = {shape for shape in distinct if shape.dense and shape.numel}
    if len(dense) == len(distinct) and len({*storages}) == len(storages):
        return range(len(storages))
    num_of = Counter(storages)
    rows = enumerate(zip(storages, shapes, strict=True))
    return [index for index, (storage, shape) in rows if shape in dense and num_of[storage] == 1]


# A view: what it looks like, and its first byte in the storage.
Placed = tuple[Geometry, int]


# The usual sweep; touching extents stay apart, because each may land in a tensor of its own.
def merge(extents: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Disjoint byte ranges, in order, that cover the extents; only overlapping ones are joined."""
    ranges: list[tuple[int, int]] = []
    for begin, end in sorted(extents):
        if ranges and begin < ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], max(end, ranges[-1][1]))
        else:
            ranges.append((begin, end))
    return ranges


def index_of(views: Iterable[Placed], begin: int, end: int) -> tuple[torch.Tensor, int] | None:
    """Which elements of a byte range some views refer to.

    Args:
        views: Geometry and first byte of each view; all lie in the range.
        begin: First byte of the range.
        end: Behind its last byte.

    Returns:
        Where they are, 1-D int64 in increasing order, in units of so many bytes; None if that is the whole range.
    """
    # Tied views are marked once.
    found = list(dict.fromkeys(views))
    # Views of one storage may have different dtypes. All item sizes are powers of two, so the least of them divides the
    # others, and all offsets: they are aligned.
    unit = min(shape.itemsize for shape, _ in found)
    taken = torch.zeros((end - begin) // unit, dtype=torch.bool)
    for shape, first in found:
        dims = [dim for dim, size in enumerate(shape.shape) if size > 1 and shape.stride[dim]]
        per_element = shape.itemsize // unit
        sizes = [shape.shape[dim] for dim in dims] + [per_element]
        steps = [shape.stride[dim] * per_element for dim in dims] + [1]
        taken.as_strided(sizes, steps, (first - begin) // unit).fill_(True)
    # Most often it is the whole range, and the places are eight times as large as the bytes.
    return None if taken.all() else (taken.nonzero().flatten(), unit)


def range_index(views: Sequence[Placed], begin: int, end: int) -> tuple[torch.Tensor, int] | None:
    """Which elements of a range its views refer to, None where that is all of it; see :func:`index_of`."""
    # First by extents alone, which nearly always answers, and needs no memory.
    return None if covered(views, begin, end) else index_of(views, begin, end)


def covered(views: Iterable[Placed], begin: int, end: int) -> bool:
    """Whether those of the views that have no gaps leave none of the range out."""
    # Only dense views count. Two with gaps may fill each other's (columns, interleaved), which ``index_of`` then finds
    # out.
    reached = begin
    for first, last in sorted((first, first + shape.span) for shape, first in views if shape.dense):
        if first > reached:
            return False
        reached = max(reached, last)
    return reached == end
