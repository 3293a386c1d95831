"""The kinds of strided tensor beside plain ones: of a class of the user's, lazy, uninitialized, meta.

Each is a few lines: what is inside, what else is needed, how to build it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ft_transport._state.classes import class_name, dtype_name, dtype_of
from ft_transport._state.geometry import Geometry, checked_geometry
from ft_transport._state.kinds.base import (
    Kind,
    Surroundings,
    attributes_of,
    bools,
    check_grad,
    grad_of,
    with_grad,
)
from ft_transport._state.kinds.python import (
    KeepsAttributes,
    check_attributes,
    check_object,
    pickle_leaf,
    sizes,
    unpickle_leaf,
    which_refers_to,
)

__all__ = ["LazyTensor", "MetaTensor", "PythonTensor", "UninitializedTensor"]

# ------------------------------------------------------------------------------------- strided tensors


# Python lets one put anything onto a tensor, and ``torch.nn.Buffer`` does (``persistent``). torch.save keeps such
# attributes; so does this.
class PythonTensor(Kind):
    """A strided tensor of a class of the user's, or with Python attributes (``torch.nn.Buffer`` has some).

    Context: (class or None, is parameter, requires grad, pickle of the attributes, values in it).
    """

    name = "python tensor"
    num_tensors_in_place = 1  # the others are among its attributes
    not_compared = (1, 2)
    family = "tensor"

    def claims(self, leaf: torch.Tensor) -> bool:
        return leaf.layout is torch.strided and not (leaf.is_quantized or leaf.is_nested or leaf.is_meta)

    def flatten(self, leaf: torch.Tensor) -> tuple[Sequence[Any], Any]:
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
        context = (name, *grad_of(leaf), data, tuple(values))
        return [base, *inner], context

    def check(self, inner: Sequence[Geometry | None], context: Any) -> None:
        name, is_parameter, requires_grad, data, values = context
        bools(is_parameter, requires_grad)
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

    def unflatten(self, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        base, *_ = inner
        name, is_parameter, requires_grad, _, _ = context
        if name is None:
            leaf = with_grad(base, is_parameter, requires_grad)
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


# ``torch.nn.LazyLinear`` and its like before their first forward: a tensor that has no shape yet.
class UninitializedTensor(Kind):
    """A parameter or buffer of a lazy module that has no shape yet. Context: (is parameter, requires grad), and
    its dtype if that is not float32."""

    name = "uninitialized"
    not_compared = (1,)
    is_tried = True
    types = (torch.nn.UninitializedParameter, torch.nn.UninitializedBuffer)

    def flatten(self, leaf: Any) -> tuple[Sequence[Any], Any]:
        with torch._C.DisableTorchFunctionSubclass():  # it lets nobody ask for anything
            dtype = leaf.dtype
        more = () if dtype is torch.float32 else (dtype_name(dtype),)
        return [], (type(leaf) is torch.nn.UninitializedParameter, leaf.requires_grad, *more)

    def check(self, inner: Sequence[Geometry | None], context: Any) -> None:
        is_parameter, requires_grad, *more = context
        bools(is_parameter, requires_grad)
        if len(more) > 1 or inner:
            raise ValueError(f"an uninitialized tensor of {context!r}")
        check_grad(dtype_of(*more) if more else torch.float32, requires_grad)

    def unflatten(self, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        is_parameter, requires_grad, *more = context
        cls: Any = torch.nn.UninitializedParameter if is_parameter else torch.nn.UninitializedBuffer
        # Where and of what dtype is not the receiver's default: that is of other tensors.
        return cls(requires_grad, device="cpu", dtype=dtype_of(*more) if more else torch.float32)


# ``conj()`` and ``.imag.neg()`` of complex tensors are flags on a view, and the bytes are those of the tensor before.
# What travels are these bytes, and the flags.
class LazyTensor(Kind):
    """A lazy conjugate or negative: the physical bytes travel. Context: (conjugate, negative)."""

    name = "lazy"
    is_lazy = True
    is_tried = True
    family = "tensor"

    def claims(self, leaf: torch.Tensor) -> bool:
        bare = type(leaf) is torch.Tensor and not leaf.__dict__ and not leaf.requires_grad
        return bare and leaf.layout is torch.strided and (leaf.is_conj() or leaf.is_neg())

    def flatten(self, leaf: torch.Tensor) -> tuple[Sequence[Any], Any]:
        lazy = leaf.is_conj(), leaf.is_neg()
        return [_toggle(leaf, *lazy)], lazy

    def check(self, inner: Sequence[Geometry | None], context: Any) -> None:
        conjugate, negative = context
        bools(conjugate, negative)
        if conjugate and (inner[0] is None or not inner[0].dtype.is_complex):
            raise ValueError("a conjugate of what is not complex")

    def unflatten(self, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        return _toggle(inner[0], *context)


def _toggle(tensor: torch.Tensor, conjugate: bool, negative: bool) -> torch.Tensor:
    tensor = torch._conj(tensor) if conjugate else tensor
    return torch._neg_view(tensor) if negative else tensor


# A shape and nothing else; a model on the meta device before it is sharded.
class MetaTensor(KeepsAttributes):
    """A tensor without bytes. Context: (dtype, shape, strides, is parameter, requires grad)."""

    name = "meta"
    not_compared = (2, 3, 4)
    is_tried = True

    def claims(self, leaf: torch.Tensor) -> bool:
        return leaf.is_meta and type(leaf) in (torch.Tensor, torch.nn.Parameter) and leaf.layout is torch.strided

    def flatten_bare(self, leaf: torch.Tensor) -> tuple[Sequence[Any], Any]:
        return [], (dtype_name(leaf.dtype), tuple(leaf.shape), leaf.stride(), *grad_of(leaf))

    def check_bare(self, inner: Sequence[Geometry | None], context: Any) -> None:
        dtype, shape, stride, is_parameter, requires_grad = context
        bools(is_parameter, requires_grad)
        check_grad(dtype_of(dtype), requires_grad)
        checked_geometry(dtype_of(dtype), sizes(shape), sizes(stride))

    def label(self, context: Any) -> str:
        return f"meta {context[0]} {context[1]}"

    def disagreement(self, context: Any, mine: Any) -> str:
        return "" if context[:2] == mine[:2] else f"expected meta {mine[0]} {mine[1]}, source has {context[:2]}"

    def unflatten_bare(self, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        dtype, shape, stride, is_parameter, requires_grad = context
        leaf = torch.empty_strided(shape, stride, dtype=dtype_of(dtype), device="meta")
        return with_grad(leaf, is_parameter, requires_grad)
