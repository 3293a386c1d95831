"""What a state is made of, as Python and torch themselves see it. Knows nothing of the package."""

from __future__ import annotations

import copyreg
import enum
import types
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import SUPPORTED_NODES

__all__ = ["Opened", "Path", "addresses", "dotted", "is_dense", "leaves", "opened", "parts", "raw_bytes", "storage_of"]

Path = tuple[Any, ...]


class Opened(NamedTuple):
    """A value that holds others: its type and what else it keeps, and its children by name in their order."""

    what: tuple[Any, ...]
    names: list[Any]
    children: list[Any]
    is_object: bool = False


# Their state is not in their attributes: compared as wholes.
_WHOLE = (str, bytes, bytearray, int, float, complex, enum.Enum, np.generic, type, types.ModuleType, torch.Generator)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.BuiltinMethodType)


def opened(value: Any) -> Opened | None:
    """The children of a container or of an object with attributes, None for everything else."""
    cls = type(value)
    if isinstance(value, dict):
        attributes = getattr(value, "__dict__", {})
        names = [*value.keys(), *(f".{name}" for name in attributes)]
        factory = getattr(value, "default_factory", None)
        return Opened((cls, factory), names, [*value.values(), *attributes.values()])
    if isinstance(value, (list, tuple, deque)):
        attributes = getattr(value, "__dict__", {})
        names = [*range(len(value)), *(f".{name}" for name in attributes)]
        return Opened((cls, getattr(value, "maxlen", None)), names, [*value, *attributes.values()])
    if isinstance(value, (torch.Tensor, ShardedTensor, np.ndarray, set, frozenset, *_WHOLE, *_FUNCTIONS)):
        return None
    attributes = dict(getattr(value, "__dict__", {}))
    attributes.update((name, getattr(value, name)) for name in copyreg._slotnames(cls) if hasattr(value, name))
    if cls.__module__.split(".")[0] in _LIBRARY or not (attributes or _is_plain_class(cls)):
        return None
    return Opened((cls,), list(attributes), list(attributes.values()), is_object=True)


# Classes whose instances are values: dates, paths, decimals, devices and so on.
_LIBRARY = {"builtins", "datetime", "decimal", "fractions", "pathlib", "uuid", "zoneinfo"}


def _is_plain_class(cls: type) -> bool:
    """Whether a class is written in Python and all its state is in attributes."""
    return cls.__basicsize__ <= object.__basicsize__ + 16 and bool(cls.__flags__ & (1 << 9))


def leaves(state: Any) -> Iterator[tuple[Path, Any]]:
    """The leaves of a state with their paths: what lies in its containers, attributes of mappings included.

    Containers are dicts, sequences, dataclasses and what is registered with torch's pytree.
    """
    pending: list[tuple[Path, Any]] = [((), state)]
    while pending:
        path, value = pending.pop()
        inside = opened(value)
        if inside is None or (inside.is_object and not _is_container(value)):
            yield path, value
            continue
        pairs = zip(inside.names, inside.children, strict=True)
        pending.extend(reversed([((*path, _bare(name)), child) for name, child in pairs]))


def _is_container(value: Any) -> bool:
    return hasattr(type(value), "__dataclass_fields__") or type(value) in SUPPORTED_NODES


def _bare(name: Any) -> Any:
    return name[1:] if isinstance(name, str) and name.startswith("._") else name


def dotted(path: Path) -> str:
    """A path as reports and errors write it."""
    return ".".join(map(str, path)) if path else "<root>"


# --------------------------------------------------------------------------------------- tensors


def parts(leaf: Any) -> dict[str, torch.Tensor]:
    """The plain strided tensors that a tensor is made of, by name; a plain one is made of itself."""
    if isinstance(leaf, ShardedTensor):
        return {f"shard {i}": shard.tensor for i, shard in enumerate(leaf.local_shards())}
    if isinstance(leaf, DTensor):
        return _inside("local", leaf._local_tensor)
    if is_traceable_wrapper_subclass(leaf):
        found: dict[str, torch.Tensor] = {}
        for name in leaf.__tensor_flatten__()[0]:
            found.update(_inside(name, getattr(leaf, name)))
        return found
    if is_lazy(leaf):
        return {}
    get = _BY_LAYOUT.get(leaf.layout)
    if get is not None:
        return {name.strip("_()"): getattr(leaf.detach(), name)() for name in get}
    if leaf.is_nested:
        return {"buffer": leaf.detach().values(), "sizes": leaf._nested_tensor_size()}
    if leaf.is_meta:
        return {}
    if leaf.is_quantized and leaf.qscheme() in _BY_CHANNEL:
        return {"": leaf, "scales": leaf.q_per_channel_scales(), "zero points": leaf.q_per_channel_zero_points()}
    return {"": leaf}


def _inside(name: str, inner: Any) -> dict[str, torch.Tensor]:
    if inner is None:
        return {}
    return {f"{name} {deeper}".rstrip(): tensor for deeper, tensor in parts(inner).items()}


_BY_LAYOUT: dict[torch.layout, tuple[str, ...]] = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}
# How many elements a byte holds; tensors of these dtypes are always whole storages.
_PACKED = {torch.quint4x2: 2, torch.quint2x4: 4}
_BY_CHANNEL = {torch.per_channel_affine, torch.per_channel_affine_float_qparams}


def storage_of(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The bytes of a tensor's whole storage; shares the memory."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage()).numpy()


def _places(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """For each byte of each element, in row-major order, its place in the storage."""
    if tensor.dtype in _PACKED:
        return np.arange(-(-tensor.numel() // _PACKED[tensor.dtype]), dtype=np.int64)
    itemsize = tensor.dtype.itemsize
    if tensor.is_contiguous():
        begin = tensor.storage_offset() * itemsize
        return np.arange(begin, begin + tensor.numel() * itemsize, dtype=np.int64)
    places = np.arange(itemsize, dtype=np.int64)
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        places = (np.arange(size, dtype=np.int64)[:, None] * (stride * itemsize) + places.reshape(1, -1)).reshape(-1)
    return places + tensor.storage_offset() * itemsize


def addresses(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """For each byte of each element, in row-major order, its address."""
    return _places(tensor) + tensor.untyped_storage().data_ptr()


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The bytes of the elements of a plain tensor in row-major order, whatever its dtype makes of them."""
    tensor = tensor.detach()
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    if tensor.numel() == 0:
        return b""
    begin = tensor.storage_offset() * tensor.dtype.itemsize
    if tensor.is_contiguous() and tensor.dtype not in _PACKED:
        return storage_of(tensor)[begin : begin + tensor.numel() * tensor.dtype.itemsize].tobytes()
    return storage_of(tensor)[_places(tensor)].tobytes()


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether every element has a place of its own and there are no gaps, in whatever order."""
    if tensor.is_contiguous():
        return True
    step = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != step:
            return False
        step *= size
    return True
