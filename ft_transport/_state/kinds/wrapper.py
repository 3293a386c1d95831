"""The kind of wrapper subclasses, which hold tensors instead of memory, and of jagged tensors, which are one of them.

Such a class says itself what is inside (``__tensor_flatten__``), which torch's compiler asks of it, too.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ft_transport._state.classes import class_name, imported_class
from ft_transport._state.geometry import Geometry, geometry_of
from ft_transport._state.kinds.base import Kind, Surroundings, bools, grad_of, with_grad
from ft_transport._state.kinds.python import shape_of

__all__ = ["WrapperSubclass"]


# torchao's and others': ``__torch_dispatch__`` and ``__tensor_flatten__``. Their attributes beside tensors travel as a
# pickle of allowed classes.
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

    def flatten(self, leaf: Any) -> tuple[Sequence[Any], Any]:
        names, context = leaf.__tensor_flatten__()
        shape, stride = tuple(leaf.shape), tuple(leaf.stride()) if leaf.layout is torch.strided else ()
        if any(type(number) is not int for number in (*shape, *stride)):
            shape = stride = None  # type: ignore[assignment]
        inner = [getattr(leaf, name) for name in names]
        return inner, (class_name(type(leaf)), tuple(names), context, shape, stride, *grad_of(leaf))

    def check(self, inner: Sequence[Geometry | None], context: Any) -> None:
        name, names, _, shape, stride, is_parameter, requires_grad = context
        bools(is_parameter, requires_grad)
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

    def unflatten(self, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        name, names, other, shape, stride, is_parameter, requires_grad = context
        cls = _wrapper_class(name, here)
        if shape is not None:
            shape = torch.Size(shape)
        tensors = dict(zip(names, inner, strict=True))
        if name == _JAGGED:
            _check_rows(tensors["_values"], tensors["_offsets"], tensors.get("_lengths"), other["ragged_idx"])
        leaf = cls.__tensor_unflatten__(tensors, other, shape, stride)
        return with_grad(leaf, is_parameter, requires_grad)

    def refresh(self, mine: Any, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        leaf = self.unflatten(inner, context, here)
        my_inner, my_context = self.flatten(mine)
        # A cache holds its number as its shape.
        stale = any(my_inner[i].shape != inner[i].shape for i in self.caches(context) if my_context == context)
        return mine if my_context == context and not stale else leaf


# torch's own, which needs no permission.
_JAGGED = "torch.nested._internal.nested_tensor.NestedTensor"
# Lengths of its shortest and longest row, once an operation has asked for them.
_CACHES = ("_min_seqlen_tensor", "_max_seqlen_tensor")


# Offsets are read by kernels without bounds. A jagged tensor whose rows lie outside of its values is a read of other
# memory.
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
