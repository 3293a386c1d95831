"""Whether two tensors are one: the same elements of the same storage, read in the same way."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["is_dtensor", "is_plain", "same_memory"]

# A class of somebody's own may keep its bytes elsewhere than a tensor of this shape does.
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_plain(tensor: Any) -> bool:
    """Whether it is a tensor of torch's own class, with strides."""
    return type(tensor) in _PLAIN and tensor.layout is torch.strided


def is_dtensor(value: Any) -> bool:
    """Whether it is a DTensor; without importing them, which takes a second."""
    return hasattr(value, "_local_tensor") and hasattr(value, "_spec")


def same_memory(one: Any, other: Any) -> bool:
    """Whether writing to one would write the same elements of the other. False where that is not known."""
    if one is other:
        return True
    if type(one) in _PLAIN and type(other) in _PLAIN:
        return _same_elements(one, other)
    if is_dtensor(one) and is_dtensor(other):
        same = one._spec is other._spec or one._spec == other._spec
        return same and is_plain(one._local_tensor) and same_memory(one._local_tensor, other._local_tensor)
    return False


def _same_elements(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype is not other.dtype or one.layout is not torch.strided or other.layout is not torch.strided:
        return False
    if one.is_conj() != other.is_conj() or one.is_neg() != other.is_neg():
        return False
    if (one.is_cpu and other.is_cpu) or (one.is_cuda and other.is_cuda):
        return one.is_set_to(other)
    # Other devices have not that function.
    return (
        one.untyped_storage()._cdata == other.untyped_storage()._cdata
        and one.storage_offset() == other.storage_offset()
        and one.shape == other.shape
        and one.stride() == other.stride()
    )
