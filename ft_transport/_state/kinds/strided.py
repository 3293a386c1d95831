"""The kinds of tensor that the package brings beside plain strided ones.

Each is a few lines: what is inside, what else is needed, how to build it again. What is no tensor is in
``_state.kinds.python``, DTensor and ShardedTensor are in ``_state.kinds.distributed``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ft_transport._state.geometry import Geometry, checked_geometry, geometry_of
from ft_transport._state.kinds.base import Kind, Surroundings, attributes_of, check_grad, register_kind
from ft_transport._state.kinds.python import (
    KeepsAttributes,
    check_attributes,
    check_object,
    pickle_leaf,
    shape_of,
    sizes,
    unpickle_leaf,
    which_refers_to,
)
from ft_transport._state.values import class_name, dtype_name, dtype_of, imported_class

__all__: list[str] = []


def _with_grad(leaf: torch.Tensor, is_parameter: bool, requires_grad: bool) -> torch.Tensor:
    if is_parameter:
        return torch.nn.Parameter(leaf, requires_grad=requires_grad)
    return leaf.requires_grad_() if requires_grad else leaf


def _grad_of(leaf: torch.Tensor) -> tuple[bool, bool]:
    return isinstance(leaf, torch.nn.Parameter), leaf.requires_grad


def _bools(*values: Any) -> None:
    if any(type(value) is not bool for value in values):
        raise TypeError(f"expected bools, got {values!r}")


# ------------------------------------------------------------------------------------- strided tensors


class PythonTensor(Kind):
    """A strided tensor of a class of the user's, or with Python attributes (``torch.nn.Buffer`` has some).

    Context: (class or None, is parameter, requires grad, pickle of the attributes, values in it).
    """

    name = "python tensor"
    not_compared = (1, 2)
    family = "tensor"

    def claims(self, leaf: torch.Tensor) -> bool:
        return leaf.layout is torch.strided and not (leaf.is_quantized or leaf.is_nested or leaf.is_meta)

    def take_apart(self, leaf: torch.Tensor) -> tuple[Sequence[Any], Any]:
        cls = type(leaf)
        if cls.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            raise ValueError(f"a tensor of class {cls.__qualname__} cannot travel")
        name = None if cls in (torch.Tensor, torch.nn.Parameter) else class_name(cls)
        inner: list[Any] = []
        state = torch._utils._get_obj_state(leaf)  # type: ignore[no-untyped-call]
        if not _sets_its_own_state(cls):
            state = (attributes_of(leaf), *state[1:]) if isinstance(state, tuple) else state and attributes_of(leaf)
            check_attributes(state)
        data, values = pickle_leaf(state, inner) if state else (b"", [])
        if any(each is leaf for each in inner):
            what = which_refers_to(leaf)
            raise ValueError(f"a tensor of class {cls.__qualname__} cannot travel: {what} refers back to it")
        with torch._C.DisableTorchFunctionSubclass():
            base = leaf.detach().as_subclass(torch.Tensor)
        context = (name, *_grad_of(leaf), data, tuple(values))
        return [base, *inner], context

    def check(self, inner: Sequence[Geometry | None], context: Any) -> None:
        name, is_parameter, requires_grad, data, values = context
        _bools(is_parameter, requires_grad)
        if inner[0] is not None:
            check_grad(inner[0].dtype, requires_grad)
        if name is not None:
            cls = Surroundings().find_class(name)
            if not isinstance(cls, type) or not issubclass(cls, torch.Tensor):
                raise TypeError(f"{name} is no class of tensor")
        if data:
            check_object(data, values, inner[1:])

    def pickle_in(self, context: Any) -> bytes:
        return context[3]  # type: ignore[no-any-return]

    def label(self, context: Any) -> str:
        return context[0] or "tensor"

    def disagreement(self, context: Any, mine: Any) -> str:
        return "" if context[0] == mine[0] else f"expected {mine[0] or 'Tensor'}, source has {context[0] or 'Tensor'}"

    def put_together(self, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        base, *_ = inner
        name, is_parameter, requires_grad, _, _ = context
        if name is None:
            leaf = _with_grad(base, is_parameter, requires_grad)
        else:
            leaf = torch.Tensor._make_subclass(here.find_class(name), base, requires_grad)
        return self.refresh(leaf, inner, context, here)

    def refresh(self, mine: Any, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        *_, data, values = context
        if data:
            state = unpickle_leaf(data, values, inner[1:], here)
            if _sets_its_own_state(type(mine)):
                mine.__setstate__(state)
            else:
                check_attributes(state)
                torch._utils._set_obj_state(mine, state)  # type: ignore[no-untyped-call]
        return mine


def _sets_its_own_state(cls: type) -> bool:
    return getattr(cls, "__setstate__", torch.Tensor.__setstate__) is not torch.Tensor.__setstate__


class UninitializedTensor(Kind):
    """A parameter or buffer of a lazy module that has no shape yet. Context: (is parameter, requires grad), and
    its dtype if that is not float32."""

    name = "uninitialized"
    not_compared = (1,)
    is_tried = True
    types = (torch.nn.UninitializedParameter, torch.nn.UninitializedBuffer)

    def take_apart(self, leaf: Any) -> tuple[Sequence[Any], Any]:
        with torch._C.DisableTorchFunctionSubclass():  # it lets nobody ask for anything
            dtype = leaf.dtype
        more = () if dtype is torch.float32 else (dtype_name(dtype),)
        return [], (type(leaf) is torch.nn.UninitializedParameter, leaf.requires_grad, *more)

    def check(self, inner: Sequence[Geometry | None], context: Any) -> None:
        is_parameter, requires_grad, *more = context
        _bools(is_parameter, requires_grad)
        if len(more) > 1 or inner:
            raise ValueError(f"an uninitialized tensor of {context!r}")
        check_grad(dtype_of(*more) if more else torch.float32, requires_grad)

    def put_together(self, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        is_parameter, requires_grad, *more = context
        cls: Any = torch.nn.UninitializedParameter if is_parameter else torch.nn.UninitializedBuffer
        # Where and of what dtype is not the receiver's default: that is of other tensors.
        return cls(requires_grad, device="cpu", dtype=dtype_of(*more) if more else torch.float32)


class LazyTensor(Kind):
    """A lazy conjugate or negative: the physical bytes travel. Context: (conjugate, negative)."""

    name = "lazy"
    is_tried = True
    family = "tensor"

    def claims(self, leaf: torch.Tensor) -> bool:
        bare = type(leaf) is torch.Tensor and not leaf.__dict__ and not leaf.requires_grad
        return bare and leaf.layout is torch.strided and (leaf.is_conj() or leaf.is_neg())

    def take_apart(self, leaf: torch.Tensor) -> tuple[Sequence[Any], Any]:
        lazy = leaf.is_conj(), leaf.is_neg()
        return [_toggle(leaf, *lazy)], lazy

    def check(self, inner: Sequence[Geometry | None], context: Any) -> None:
        conjugate, negative = context
        _bools(conjugate, negative)
        if conjugate and (inner[0] is None or not inner[0].dtype.is_complex):
            raise ValueError("a conjugate of what is not complex")

    def put_together(self, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        return _toggle(inner[0], *context)


def _toggle(tensor: torch.Tensor, conjugate: bool, negative: bool) -> torch.Tensor:
    tensor = torch._conj(tensor) if conjugate else tensor
    return torch._neg_view(tensor) if negative else tensor


class MetaTensor(KeepsAttributes):
    """A tensor without bytes. Context: (dtype, shape, strides, is parameter, requires grad)."""

    name = "meta"
    not_compared = (2, 3, 4)
    is_tried = True

    def claims(self, leaf: torch.Tensor) -> bool:
        return leaf.is_meta and type(leaf) in (torch.Tensor, torch.nn.Parameter) and leaf.layout is torch.strided

    def take_bare_apart(self, leaf: torch.Tensor) -> tuple[Sequence[Any], Any]:
        return [], (dtype_name(leaf.dtype), tuple(leaf.shape), leaf.stride(), *_grad_of(leaf))

    def check_bare(self, inner: Sequence[Geometry | None], context: Any) -> None:
        dtype, shape, stride, is_parameter, requires_grad = context
        _bools(is_parameter, requires_grad)
        check_grad(dtype_of(dtype), requires_grad)
        checked_geometry(dtype_of(dtype), sizes(shape), sizes(stride))

    def label(self, context: Any) -> str:
        return f"meta {context[0]} {context[1]}"

    def disagreement(self, context: Any, mine: Any) -> str:
        return "" if context[:2] == mine[:2] else f"expected meta {mine[0]} {mine[1]}, source has {context[:2]}"

    def put_bare_together(self, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        dtype, shape, stride, is_parameter, requires_grad = context
        leaf = torch.empty_strided(shape, stride, dtype=dtype_of(dtype), device="meta")
        return _with_grad(leaf, is_parameter, requires_grad)


# ------------------------------------------------------------------------------------- other layouts

_COMPRESSED = {
    torch.sparse_csr: ("crow_indices", "col_indices"),
    torch.sparse_bsr: ("crow_indices", "col_indices"),
    torch.sparse_csc: ("ccol_indices", "row_indices"),
    torch.sparse_bsc: ("ccol_indices", "row_indices"),
}
_LAYOUTS = {str(layout): layout for layout in (torch.sparse_coo, *_COMPRESSED)}


class SparseTensor(KeepsAttributes):
    """Sparse COO, CSR, CSC, BSR, BSC: indices and values travel.

    Context: (layout, shape, is coalesced, is parameter, requires grad).
    """

    name = "sparse"
    not_compared = (3, 4)
    not_in_place = "the template's tensor is sparse: how many values it holds may differ"

    def claims(self, leaf: torch.Tensor) -> bool:
        return str(leaf.layout) in _LAYOUTS and type(leaf) in (torch.Tensor, torch.nn.Parameter)

    def take_bare_apart(self, leaf: torch.Tensor) -> tuple[Sequence[Any], Any]:
        plain = leaf.detach()
        coalesced = False
        if leaf.layout is torch.sparse_coo:
            coalesced = leaf.is_coalesced()
            inner = [plain._indices(), plain._values()]
        else:
            inner = [getattr(plain, name)() for name in _COMPRESSED[leaf.layout]] + [plain.values()]
        return inner, (str(leaf.layout), tuple(leaf.shape), coalesced, *_grad_of(leaf))

    def check_bare(self, inner: Sequence[Geometry | None], context: Any) -> None:
        layout, shape, coalesced, is_parameter, requires_grad = context
        _bools(coalesced, is_parameter, requires_grad)
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

    def put_bare_together(self, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        layout, shape, coalesced, is_parameter, requires_grad = context
        leaf: Any
        if layout == str(torch.sparse_coo):
            indices, values = inner
            leaf = torch.sparse_coo_tensor(indices, values, shape, is_coalesced=coalesced, check_invariants=True)
        else:
            outer, indices, values = inner
            how: Any = {"layout": _LAYOUTS[layout], "check_invariants": True}
            leaf = torch.sparse_compressed_tensor(outer, indices, values, shape, **how)
        return _with_grad(leaf, is_parameter, requires_grad)


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

    def take_bare_apart(self, leaf: torch.Tensor) -> tuple[Sequence[Any], Any]:
        plain = leaf.detach()
        shape, stride = (_rows(plain._nested_tensor_size()), _rows(plain._nested_tensor_strides()))
        offsets = tuple(plain._nested_tensor_storage_offsets().tolist())
        return [plain.values()], (shape, stride, offsets, *_grad_of(leaf))

    def check_bare(self, inner: Sequence[Geometry | None], context: Any) -> None:
        shapes, strides, offsets, is_parameter, requires_grad = context
        _bools(is_parameter, requires_grad)
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

    def put_bare_together(self, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        shape, stride, offsets, is_parameter, requires_grad = context
        metadata = (torch.tensor(rows, dtype=torch.int64, device="cpu") for rows in (shape, stride, offsets))
        leaf = torch._nested_view_from_buffer(inner[0], *metadata)
        return _with_grad(leaf, is_parameter, requires_grad)


def _rows(matrix: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, matrix.tolist()))


# Dtypes of the same size for the bytes of a quantized one; of others the whole storage travels.
_QUANTIZED = {torch.qint8: torch.int8, torch.quint8: torch.uint8, torch.qint32: torch.int32}


class QuantizedTensor(KeepsAttributes):
    """A quantized tensor, per tensor or per channel.

    Context: (dtype, shape, strides, scale, zero point, axis, is parameter, requires grad); scale and zero point are
    None where the axis is not, and travel as tensors.
    """

    name = "quantized"
    not_compared = (2, 6, 7)
    not_in_place = "the template's tensor is quantized: its scale may differ"

    def claims(self, leaf: torch.Tensor) -> bool:
        return leaf.is_quantized and type(leaf) in (torch.Tensor, torch.nn.Parameter)

    def take_bare_apart(self, leaf: torch.Tensor) -> tuple[Sequence[Any], Any]:
        carrier = _QUANTIZED.get(leaf.dtype)
        storage = leaf.untyped_storage()
        flat = torch.empty(0, dtype=carrier or torch.uint8, device=leaf.device)
        if carrier is None:
            if leaf.storage_offset():
                raise ValueError(f"a view of a tensor of {leaf.dtype} cannot travel")
            inner = [flat.set_(storage, 0, (storage.nbytes(),), (1,))]
        else:
            inner = [flat.set_(storage, leaf.storage_offset(), leaf.shape, leaf.stride())]
        scale = zero_point = axis = None
        if leaf.qscheme() is torch.per_tensor_affine:
            scale, zero_point = leaf.q_scale(), leaf.q_zero_point()
        else:
            axis = leaf.q_per_channel_axis()
            inner += [leaf.q_per_channel_scales(), leaf.q_per_channel_zero_points()]
        shape = tuple(leaf.shape), leaf.stride()
        return inner, (dtype_name(leaf.dtype), *shape, scale, zero_point, axis, *_grad_of(leaf))

    def check_bare(self, inner: Sequence[Geometry | None], context: Any) -> None:
        dtype, shape, stride, scale, zero_point, axis, is_parameter, requires_grad = context
        _bools(is_parameter, requires_grad)
        flat, *channels = inner
        carrier = _QUANTIZED.get(dtype_of(dtype))
        if flat is None or requires_grad or flat.dtype is not (carrier or torch.uint8):
            raise ValueError(f"a quantized tensor of {dtype}")
        wanted = checked_geometry(torch.uint8, sizes(shape), sizes(stride))
        per_byte = {torch.quint4x2: 2, torch.quint2x4: 4}.get(dtype_of(dtype), 1)
        if flat.shape != wanted.shape if carrier else flat.numel * per_byte < wanted.span or not flat.dense:
            raise ValueError(f"a quantized tensor of {shape} in {flat}")
        if axis is None:
            if type(scale) is not float or type(zero_point) is not int or channels:
                raise TypeError(f"scale {scale!r}, zero point {zero_point!r}")
            _without_elements(dtype_of(dtype), (), scale, zero_point, axis)
            return
        if type(axis) is not int or not 0 <= axis < len(shape) or len(channels) != 2:
            raise ValueError(f"a quantized tensor of {shape} by axis {axis!r}")
        if any(channel is None or channel.shape != (shape[axis],) or channel.expanded for channel in channels):
            raise ValueError(f"{shape[axis]} channels, but scales and zero points of {channels}")
        dtypes = [channel.dtype for channel in channels if channel is not None]
        scales, points = (torch.ones(1, dtype=each, device="cpu") for each in dtypes)
        _without_elements(dtype_of(dtype), (1,) * len(shape), scales, points, axis)

    def label(self, context: Any) -> str:
        return f"quantized {context[0]} {context[1]}"

    def disagreement(self, context: Any, mine: Any) -> str:
        return "" if context[:2] == mine[:2] else f"expected {mine[0]} {mine[1]}, source has {context[0]} {context[1]}"

    def put_bare_together(self, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        dtype, shape, stride, scale, zero_point, axis, is_parameter, requires_grad = context
        flat = inner[0]
        if axis is not None:
            scale, zero_point = inner[1:]
        # An expanded one's elements would take more memory than was received.
        leaf = _without_elements(dtype_of(dtype), shape, scale, zero_point, axis, flat.device)
        if dtype_of(dtype) in _QUANTIZED:
            stride = flat.stride()
        leaf.set_(flat.untyped_storage(), flat.storage_offset(), shape, stride)
        return _with_grad(leaf, is_parameter, requires_grad)


def _without_elements(
    dtype: torch.dtype, shape: Sequence[int], scale: Any, zero_point: Any, axis: int | None, device: Any = "cpu"
) -> torch.Tensor:
    """A quantized tensor of no memory, to be given some."""
    if axis is None:
        return torch._empty_affine_quantized((0,), scale=scale, zero_point=zero_point, dtype=dtype, device=device)
    nothing = [size if dim == axis else 0 for dim, size in enumerate(shape)]
    how: Any = {"scales": scale, "zero_points": zero_point, "axis": axis, "dtype": dtype, "device": device}
    made: torch.Tensor = torch._empty_per_channel_affine_quantized(nothing, **how)
    return made


class WrapperSubclass(Kind):
    """Any traceable wrapper subclass: what ``__tensor_flatten__`` gives travels.

    Context: (class, names of the inner tensors, what else it gives, outer shape, outer strides, is parameter, requires
    grad). The outer shape is None where it is not made of numbers.
    """

    name = "wrapper"
    not_compared = (4, 5, 6)
    looks_at_bytes = True

    def claims(self, leaf: torch.Tensor) -> bool:
        return is_traceable_wrapper_subclass(leaf)

    def take_apart(self, leaf: Any) -> tuple[Sequence[Any], Any]:
        names, context = leaf.__tensor_flatten__()
        shape, stride = tuple(leaf.shape), tuple(leaf.stride()) if leaf.layout is torch.strided else ()
        if any(type(number) is not int for number in (*shape, *stride)):
            shape = stride = None  # type: ignore[assignment]
        inner = [getattr(leaf, name) for name in names]
        return inner, (class_name(type(leaf)), tuple(names), context, shape, stride, *_grad_of(leaf))

    def check(self, inner: Sequence[Geometry | None], context: Any) -> None:
        name, names, _, shape, stride, is_parameter, requires_grad = context
        _bools(is_parameter, requires_grad)
        cls = _wrapper_class(name, Surroundings())
        if not isinstance(cls, type) or not issubclass(cls, torch.Tensor) or not hasattr(cls, "__tensor_unflatten__"):
            raise TypeError(f"{name} is no wrapper subclass")
        if len(names) != len(inner) or any(type(part) is not str for part in names) or len(set(names)) != len(names):
            raise ValueError(f"{names!r} for {len(inner)} tensors")
        if shape is not None:
            shape_of(shape)
            shape_of(stride)

    def label(self, context: Any) -> str:
        return str(context[0])

    def caches(self, context: Any) -> Collection[int]:
        return [i for i, name in enumerate(context[1]) if name in _CACHES] if context[0] == _JAGGED else ()

    def disagreement(self, context: Any, mine: Any) -> str:
        expected, got = (
            f"{c[0]} {c[3]} of {', '.join(name for i, name in enumerate(c[1]) if i not in self.caches(c))}"
            for c in (mine, context)
        )
        return "" if expected == got else f"expected {expected}, source has {got}"

    def put_together(self, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        name, names, other, shape, stride, is_parameter, requires_grad = context
        cls = _wrapper_class(name, here)
        if shape is not None:
            shape = torch.Size(shape)
        tensors = dict(zip(names, inner, strict=True))
        if name == _JAGGED:
            _check_rows(tensors["_values"], tensors["_offsets"], tensors.get("_lengths"), other["ragged_idx"])
        leaf = cls.__tensor_unflatten__(tensors, other, shape, stride)
        return _with_grad(leaf, is_parameter, requires_grad)

    def refresh(self, mine: Any, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        leaf = self.put_together(inner, context, here)
        my_inner, my_context = self.take_apart(mine)
        # A cache holds its number as its shape.
        stale = any(my_inner[i].shape != inner[i].shape for i in self.caches(context) if my_context == context)
        return mine if my_context == context and not stale else leaf


# torch's own, which needs no permission.
_JAGGED = "torch.nested._internal.nested_tensor.NestedTensor"
# Lengths of its shortest and longest row, once an operation has asked for them.
_CACHES = ("_min_seqlen_tensor", "_max_seqlen_tensor")


def _check_rows(values: torch.Tensor, offsets: torch.Tensor, lengths: torch.Tensor | None, dim: int) -> None:
    """The rows of a jagged tensor lie in its values: torch's kernels do not look, and would read what is behind."""
    num_rows = offsets.numel() - 1
    size = values.shape[dim - 1] if type(dim) is int and 1 <= dim <= values.dim() else -1
    if (
        offsets.dim() != 1
        or num_rows < 0
        or size < 0
        or any(
            part is not None and (part.dtype not in (torch.int32, torch.int64) or part.shape != (length,))
            for part, length in ((offsets, num_rows + 1), (lengths, num_rows))
        )
    ):
        raise ValueError(
            f"a jagged tensor of {geometry_of(values)} by dimension {dim!r}, offsets {tuple(offsets.shape)}"
        )
    begins, ends = offsets[:-1], offsets[1:] if lengths is None else offsets[:-1] + lengths
    bad = ((offsets < 0) | (offsets > size)).any() or (ends < begins).any() or (ends > size).any()
    if bool(bad):
        raise ValueError(f"a jagged tensor with rows outside of its {size}")


def _wrapper_class(name: str, here: Surroundings) -> Any:
    return imported_class(name) if name == _JAGGED else here.find_class(name)


for _kind in (
    UninitializedTensor(),
    PythonTensor(),
    LazyTensor(),
    QuantizedTensor(),
    NestedTensor(),
    SparseTensor(),
    MetaTensor(),
    WrapperSubclass(),
):
    register_kind(_kind)
