"""The kind of quantized tensors, per tensor and per channel.

Their elements are integers with a scale: the integers travel as bytes of a plain dtype, the scales as leaves or values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ft_transport._state.classes import dtype_name, dtype_of
from ft_transport._state.geometry import Geometry, checked_geometry
from ft_transport._state.kinds.base import Surroundings, bools, grad_of, with_grad
from ft_transport._state.kinds.python import KeepsAttributes, sizes

__all__ = ["QuantizedTensor"]

# Dtypes of the same size for the bytes of a quantized one; of others the whole storage travels.
_QUANTIZED = {torch.qint8: torch.int8, torch.quint8: torch.uint8, torch.qint32: torch.int32}


# ``int_repr()`` copies. A tensor of a plain dtype over the same storage does not, and its bytes are the same.
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

    def flatten_bare(self, leaf: torch.Tensor) -> tuple[Sequence[Any], Any]:
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
        return inner, (dtype_name(leaf.dtype), *shape, scale, zero_point, axis, *grad_of(leaf))

    def check_bare(self, inner: Sequence[Geometry | None], context: Any) -> None:
        dtype, shape, stride, scale, zero_point, axis, is_parameter, requires_grad = context
        bools(is_parameter, requires_grad)
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

    def unflatten_bare(self, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        dtype, shape, stride, scale, zero_point, axis, is_parameter, requires_grad = context
        flat = inner[0]
        if axis is not None:
            scale, zero_point = inner[1:]
        # An expanded one's elements would take more memory than was received.
        leaf = _without_elements(dtype_of(dtype), shape, scale, zero_point, axis, flat.device)
        if dtype_of(dtype) in _QUANTIZED:
            stride = flat.stride()
        leaf.set_(flat.untyped_storage(), flat.storage_offset(), shape, stride)
        return with_grad(leaf, is_parameter, requires_grad)


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
