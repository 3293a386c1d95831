"""The kinds of tensor whose layout is not strided: sparse, and nested of the old layout.

Each travels as the strided tensors that it is made of; whether they make one is checked before any is built, since
torch's own check, where it has one, comes after it has read what the indices point at.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ft_transport._state.geometry import Geometry, checked_geometry
from ft_transport._state.kinds.base import Surroundings, bools, check_grad, grad_of, with_grad
from ft_transport._state.kinds.python import KeepsAttributes, shape_of, sizes

__all__ = ["NestedTensor", "SparseTensor"]

_COMPRESSED = {
    torch.sparse_csr: ("crow_indices", "col_indices"),
    torch.sparse_bsr: ("crow_indices", "col_indices"),
    torch.sparse_csc: ("ccol_indices", "row_indices"),
    torch.sparse_bsc: ("ccol_indices", "row_indices"),
}
_LAYOUTS = {str(layout): layout for layout in (torch.sparse_coo, *_COMPRESSED)}


# COO and the compressed four. How many values there are is part of the content, so none lands in place: another step
# has others.
class SparseTensor(KeepsAttributes):
    """Sparse COO, CSR, CSC, BSR, BSC: indices and values travel.

    Context: (layout, shape, is coalesced, is parameter, requires grad).
    """

    name = "sparse"
    not_compared = (3, 4)
    not_in_place = "the template's tensor is sparse: how many values it holds may differ"

    def claims(self, leaf: torch.Tensor) -> bool:
        return str(leaf.layout) in _LAYOUTS and type(leaf) in (torch.Tensor, torch.nn.Parameter)

    def flatten_bare(self, leaf: torch.Tensor) -> tuple[Sequence[Any], Any]:
        plain = leaf.detach()
        coalesced = False
        if leaf.layout is torch.sparse_coo:
            coalesced = leaf.is_coalesced()
            inner = [plain._indices(), plain._values()]
        else:
            inner = [getattr(plain, name)() for name in _COMPRESSED[leaf.layout]] + [plain.values()]
        return inner, (str(leaf.layout), tuple(leaf.shape), coalesced, *grad_of(leaf))

    def check_bare(self, inner: Sequence[Geometry | None], context: Any) -> None:
        layout, shape, coalesced, is_parameter, requires_grad = context
        bools(coalesced, is_parameter, requires_grad)
        found = [geometry for geometry in inner if geometry is not None]
        if len(found) != len(inner) or len(inner) != (2 if _LAYOUTS[layout] is torch.sparse_coo else 3):
            raise ValueError(f"a tensor of layout {layout} of {len(inner)} tensors")
        check_grad(found[-1].dtype, requires_grad)
        _check_sparse(_LAYOUTS[layout], shape_of(shape), found)

    def label(self, context: Any) -> str:
        return f"{context[0]} {context[1]}"

    def disagreement(self, context: Any, mine: Any) -> str:
        if context[:2] == mine[:2]:
            return ""
        return f"expected {mine[0]} {mine[1]}, source has {context[0]} {context[1]}"

    def unflatten_bare(self, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        layout, shape, coalesced, is_parameter, requires_grad = context
        leaf: Any
        if layout == str(torch.sparse_coo):
            indices, values = inner
            leaf = torch.sparse_coo_tensor(indices, values, shape, is_coalesced=coalesced, check_invariants=True)
        else:
            outer, indices, values = inner
            how: Any = {"layout": _LAYOUTS[layout], "check_invariants": True}
            leaf = torch.sparse_compressed_tensor(outer, indices, values, shape, **how)
        return with_grad(leaf, is_parameter, requires_grad)


# ``check_invariants=True`` reads the indices themselves, on the device. What can be wrong with shapes alone is found
# here, before a byte lands.
def _check_sparse(layout: torch.layout, shape: Sequence[int], inner: Sequence[Geometry]) -> None:
    """Let torch see whether indices and values make a tensor of this shape; what the indices are is seen later."""
    *_, indices, values = inner
    if indices.dtype not in (torch.int64, torch.int32) or inner[0].dtype is not indices.dtype:
        raise TypeError(f"indices of {inner[0].dtype} and {indices.dtype}")
    sizes = [list(geometry.shape) for geometry in inner]
    if layout is not torch.sparse_coo:
        # Without memory torch accepts no values: their number is compared here.
        num_batch_dims = len(sizes[0]) - 1
        if len(values.shape) <= num_batch_dims or indices.shape[-1:] != values.shape[num_batch_dims:][:1]:
            raise ValueError(f"indices {indices.shape} of values {values.shape}")
        sizes[1][-1] = sizes[2][num_batch_dims] = 0
    tensors = [torch.empty(size, dtype=each.dtype, device="meta") for size, each in zip(sizes, inner, strict=True)]
    make: Any = partial(torch.sparse_coo_tensor, check_invariants=False)
    if layout is not torch.sparse_coo:
        make = partial(torch.sparse_compressed_tensor, layout=layout, check_invariants=True)
    make(*tensors, shape)


# The older layout, of which torch offers no public way to take apart buffer, sizes and offsets. Jagged ones are wrapper
# subclasses, and have a kind there.
class NestedTensor(KeepsAttributes):
    """A nested tensor of strided layout (a jagged one is a wrapper subclass): its buffer travels.

    Context: (sizes, strides, offsets, is parameter, requires grad).
    """

    name = "nested"
    not_compared = (3, 4)
    is_tried = True
    not_in_place = "the template's tensor is nested"

    def claims(self, leaf: torch.Tensor) -> bool:
        return leaf.is_nested and leaf.layout is torch.strided and type(leaf) in (torch.Tensor, torch.nn.Parameter)

    def flatten_bare(self, leaf: torch.Tensor) -> tuple[Sequence[Any], Any]:
        plain = leaf.detach()
        shape, stride = (_rows(plain._nested_tensor_size()), _rows(plain._nested_tensor_strides()))
        offsets = tuple(plain._nested_tensor_storage_offsets().tolist())
        return [plain.values()], (shape, stride, offsets, *grad_of(leaf))

    def check_bare(self, inner: Sequence[Geometry | None], context: Any) -> None:
        shapes, strides, offsets, is_parameter, requires_grad = context
        bools(is_parameter, requires_grad)
        (buffer,) = inner
        if buffer is None or len(buffer.shape) != 1 or buffer.stride != (1,):
            raise ValueError("a nested tensor without a flat buffer")
        check_grad(buffer.dtype, requires_grad)
        for shape, stride, offset in zip(shapes, strides, sizes(offsets), strict=True):
            span = checked_geometry(buffer.dtype, sizes(shape), sizes(stride)).span // buffer.itemsize
            if offset + span > buffer.numel or len(shape) != len(shapes[0]):
                raise ValueError(f"a nested tensor with {shape} at {offset} of {buffer.numel}")

    def disagreement(self, context: Any, mine: Any) -> str:
        return "" if context[0] == mine[0] else f"expected nested {mine[0]}, source has {context[0]}"

    def unflatten_bare(self, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        shape, stride, offsets, is_parameter, requires_grad = context
        metadata = (torch.tensor(rows, dtype=torch.int64, device="cpu") for rows in (shape, stride, offsets))
        leaf = torch._nested_view_from_buffer(inner[0], *metadata)
        return with_grad(leaf, is_parameter, requires_grad)


def _rows(matrix: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, matrix.tolist()))
