"""Whether two tensors are one: the same elements of the same storage, read in the same way; whether they are equal."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["Aliases", "is_dtensor", "is_plain", "same_bits", "same_memory", "same_spec"]

# A class of somebody's own may keep its bytes elsewhere than a tensor of this shape does.
_PLAIN = (torch.Tensor, torch.nn.Parameter)

_kind = attrgetter("dtype", "layout", "is_cpu", "is_cuda")


def is_plain(tensor: Any) -> bool:
    """Whether it is a tensor of torch's own class, with strides."""
    return type(tensor) in _PLAIN and tensor.layout is torch.strided


def is_dtensor(value: Any) -> bool:
    """Whether it is a DTensor; without importing them, which takes a second."""
    return hasattr(value, "_local_tensor") and hasattr(value, "_spec")


def same_spec(one: Any, other: Any) -> bool:
    """Whether two DTensors are pieces of the same tensor, cut in the same way."""
    return one._spec is other._spec or bool(one._spec == other._spec)


def same_memory(one: Any, other: Any) -> bool:
    """Whether writing to one would write the same elements of the other. False where that is not known."""
    if one is other:
        return True
    if type(one) in _PLAIN and type(other) in _PLAIN:
        return _same_elements(one, other)
    if is_dtensor(one) and is_dtensor(other):
        return (
            same_spec(one, other)
            and is_plain(one._local_tensor)
            and same_memory(one._local_tensor, other._local_tensor)
        )
    return False


def _same_elements(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype is not other.dtype or one.layout is not torch.strided or other.layout is not torch.strided:
        return False
    if one.is_conj() != other.is_conj() or one.is_neg() != other.is_neg():
        return False
    if ((one.is_cpu and other.is_cpu) or (one.is_cuda and other.is_cuda)) and not (one.is_conj() or one.is_neg()):
        return one.is_set_to(other)
    # Other devices have not that function, and of conjugated tensors it compares copies.
    return (
        one.untyped_storage()._cdata == other.untyped_storage()._cdata
        and one.storage_offset() == other.storage_offset()
        and one.shape == other.shape
        and one.stride() == other.stride()
    )


def same_bits(one: Any, other: Any) -> bool:
    """Whether two states are equal to the bit: tensors, containers of them, and whatever else can be compared."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return _same_tensors(one.detach(), other.detach())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_bits(value, other[name]) for name, value in one.items())
    if isinstance(one, (list, tuple, deque)):
        return len(one) == len(other) and all(map(same_bits, one, other))
    return bool(one == other)


def _same_tensors(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.shape, one.dtype, one.device, one.layout) != (other.shape, other.dtype, other.device, other.layout):
        return False
    if is_traceable_wrapper_subclass(one):
        names, context = one.__tensor_flatten__()
        parts = [(getattr(one, name), getattr(other, name)) for name in names]
        return bool(other.__tensor_flatten__()[1] == context) and all(same_bits(*pair) for pair in parts)
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


class Aliases:
    """Detached aliases of tensors, made once and again where a tensor has other memory than it had."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._made = [tensor.detach() for tensor in tensors], _reading(tensors)

    def of(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The aliases of the same tensors now. Threading: any thread."""
        aliases, reading = self._made
        now = _reading(tensors)
        # All at once in C, where all of them are of torch's own class; True is said for other dtypes too.
        if now is None or now != reading or not all(map(torch.Tensor.is_set_to, aliases, tensors)):
            pairs = zip(aliases, tensors, strict=True)
            kept = [alias if same_memory(alias, tensor) else tensor.detach() for alias, tensor in pairs]
            self._made = kept, now  # in one step: another thread may be reading
            return kept
        return aliases


def _reading(tensors: Sequence[torch.Tensor]) -> list[list[Any]] | None:
    """How the tensors read their memory, beside where it is; None where they have not all of them such a one."""
    if not {*map(type, tensors)} <= {*_PLAIN}:
        return None
    kinds = list(map(_kind, tensors))
    if not all(layout is torch.strided and (is_cpu or is_cuda) for _, layout, is_cpu, is_cuda in {*kinds}):
        return None
    return [kinds, list(map(torch.Tensor.is_conj, tensors)), list(map(torch.Tensor.is_neg, tensors))]
