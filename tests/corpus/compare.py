"""Whether one state is another as far as anybody can observe. Knows nothing of the package.

Demanded is what ``torch.save`` and ``torch.load`` keep. Left open is what nobody can see: strides that leave gaps
may close, bytes that no view refers to may be lost, and lazy conj and neg bits may be resolved.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from corpus.look import Path, addresses, dotted, is_dense, opened, parts, raw_bytes

__all__ = ["differences"]


def differences(got: object, expected: object) -> list[str]:
    """Everything in which ``got`` differs from ``expected``, one line each; empty if there is nothing."""
    comparison = _Comparison()
    comparison.run(got, expected)
    return comparison.found


class _Pair(NamedTuple):
    """One plain tensor of both states."""

    path: Path
    got: torch.Tensor
    expected: torch.Tensor

    @property
    def name(self) -> str:
        return dotted(self.path)


class _Comparison:
    def __init__(self) -> None:
        self.found: list[str] = []
        self._pending: list[tuple[Path, Any, Any]] = []
        # Each object that can be told from its copy, with its partner in the other state.
        self._got_for: dict[int, tuple[Any, Any]] = {}
        self._expected_for: dict[int, tuple[Any, Any]] = {}
        self._tensors: list[_Pair] = []

    def run(self, got: Any, expected: Any) -> None:
        self._pending.append(((), got, expected))
        while self._pending:
            path, got, expected = self._pending.pop()
            self._compare(path, got, expected)
        self._sharing()

    def _say(self, path: Path, text: str) -> None:
        self.found.append(f"{dotted(path)}: {text}")

    def _same(self, path: Path, what: str, got: Any, expected: Any) -> None:
        if got != expected:
            self._say(path, f"{what}: {_show(got)} instead of {_show(expected)}")

    # -------------------------------------------------------------------------------------- values

    def _compare(self, path: Path, got: Any, expected: Any) -> None:
        if type(got) is not type(expected):
            self._say(path, f"{type(got).__name__} instead of {type(expected).__name__}")
        elif not _has_identity(expected):
            self._value(path, got, expected)
        elif id(expected) in self._got_for or id(got) in self._expected_for:
            first, other = self._got_for.get(id(expected)), self._expected_for.get(id(got))
            if first is None or first[1] is not got or other is None or other[1] is not expected:
                self._say(path, "one object there and two here" if first else "two objects there and one here")
        else:
            self._got_for[id(expected)] = (expected, got)
            self._expected_for[id(got)] = (got, expected)
            self._value(path, got, expected)

    def _value(self, path: Path, got: Any, expected: Any) -> None:
        if isinstance(expected, (torch.Tensor, ShardedTensor)):
            self._tensor(path, got, expected)
        elif isinstance(expected, np.ndarray):
            self._array(path, got, expected)
        elif (inside := opened(expected)) is not None:
            self._inside(path, opened(got), inside)
        elif _identity_of(got) != _identity_of(expected):
            self._say(path, f"{_show(got)} instead of {_show(expected)}")

    def _inside(self, path: Path, got: Any, expected: Any) -> None:
        self._same(path, "kept beside the items", got.what, expected.what)
        mine, theirs = got.names, expected.names
        if expected.is_object:
            mine, theirs = sorted(mine), sorted(theirs)
        if list(map(_key, mine)) != list(map(_key, theirs)):
            self._say(path, f"keys {str(mine)[:200]} instead of {str(theirs)[:200]}")
            return
        children = dict(zip(map(_key, got.names), got.children, strict=True))
        for name, child in reversed(list(zip(expected.names, expected.children, strict=True))):
            self._pending.append(((*path, name), children[_key(name)], child))

    def _array(self, path: Path, got: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
        self._same(path, "dtype", got.dtype, expected.dtype)
        self._same(path, "shape", got.shape, expected.shape)
        if expected.flags.f_contiguous and not expected.flags.c_contiguous:
            self._same(path, "column-major", got.flags.f_contiguous, True)
        if expected.dtype == object:
            self._pending.append(((*path, "items"), got.reshape(-1).tolist(), expected.reshape(-1).tolist()))
        elif got.tobytes() != expected.tobytes():
            self._say(path, "the array's bytes differ")

    # ------------------------------------------------------------------------------------- tensors

    def _tensor(self, path: Path, got: Any, expected: Any) -> None:
        plain = _plain(expected)
        if plain is not None and plain == _plain(got):
            self._attributes(path, got, expected)
            self._elements(path, got, expected)
            return
        before = len(self.found)
        for name, get in _PROPERTIES.items():
            # The ragged size of a nested tensor is a symbol of its own for each tensor.
            if not (name == "shape" and _ask(_PROPERTIES["is nested"], expected)):
                self._same(path, name, _ask(get, got), _ask(get, expected))
        if len(self.found) > before:
            return
        if isinstance(expected, DTensor):
            self._dtensor(path, got, expected)
        elif isinstance(expected, ShardedTensor):
            self._sharded(path, got, expected)
        elif is_traceable_wrapper_subclass(expected):
            self._same(path, "tensors and context", _flattened(got), _flattened(expected))
        else:
            self._attributes(path, got, expected)
            for name, get in _KINDS.items():
                self._same(path, name, _ask(get, got), _ask(get, expected))
        self._parts(path, parts(got), parts(expected))

    def _attributes(self, path: Path, got: torch.Tensor, expected: torch.Tensor) -> None:
        if got.__dict__ or expected.__dict__:
            self._pending.append(((*path, "__dict__"), got.__dict__, expected.__dict__))

    def _parts(self, path: Path, got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
        self._same(path, "made of", list(got), list(expected))
        for name, theirs in expected.items():
            if name not in got:
                continue
            mine = got[name]
            for what in ("dtype", "shape") if name else ():
                self._same((*path, name), what, getattr(mine, what), getattr(theirs, what))
            if (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape):
                self._elements((*path, name) if name else path, mine, theirs)

    def _elements(self, path: Path, got: torch.Tensor, expected: torch.Tensor) -> None:
        if not _equal_bits(got, expected):
            self._say(path, "bytes differ")
        contiguous = got.is_contiguous() and expected.is_contiguous()
        if not contiguous and expected.numel() and is_dense(expected):
            self._same(path, "strides", _strides(got), _strides(expected))
        lazy = expected.is_conj() or expected.is_neg()
        if expected.numel() and not lazy:
            self._tensors.append(_Pair(path, got, expected))

    def _dtensor(self, path: Path, got: DTensor, expected: DTensor) -> None:
        self._same(path, "placements", got.placements, expected.placements)
        self._same(path, "global strides", got._spec.tensor_meta.stride, expected._spec.tensor_meta.stride)
        for name in ("device_type", "mesh_dim_names"):
            self._same(path, name, getattr(got.device_mesh, name), getattr(expected.device_mesh, name))
        self._same(path, "mesh", got.device_mesh.mesh.tolist(), expected.device_mesh.mesh.tolist())
        self._same(path, "local tensor", type(got._local_tensor), type(expected._local_tensor))

    def _sharded(self, path: Path, got: ShardedTensor, expected: ShardedTensor) -> None:
        for name in ("shards_metadata", "size", "tensor_properties"):
            self._same(path, name, getattr(got.metadata(), name), getattr(expected.metadata(), name))
        mine, theirs = ([shard.metadata for shard in tensor.local_shards()] for tensor in (got, expected))
        self._same(path, "local shards", mine, theirs)

    # ------------------------------------------------------------------------------------- sharing

    def _sharing(self) -> None:
        """Views of one storage are views of one storage, and a byte that two views share is shared again."""
        groups: dict[int, list[_Pair]] = {}
        for pair in self._tensors:
            groups.setdefault(pair.expected.untyped_storage()._cdata, []).append(pair)
        owner: dict[int, _Pair] = {}
        for group in groups.values():
            storages = {pair.got.untyped_storage()._cdata for pair in group}
            if len(storages) > 1:
                self.found.append(f"{_names(group)}: one storage there and {len(storages)} here")
            for storage in storages:
                if owner.setdefault(storage, group[0]) is not group[0]:
                    self.found.append(f"{owner[storage].name}, {group[0].name}: two storages there and one here")
            if len(group) > 1 or not is_dense(group[0].expected) or not is_dense(group[0].got):
                self._aliases(group, distances=len(storages) == 1)

    def _aliases(self, group: list[_Pair], *, distances: bool) -> None:
        expected = [addresses(pair.expected) for pair in group]
        got = [addresses(pair.got) for pair in group]
        if not np.array_equal(_first_seen(np.concatenate(got)), _first_seen(np.concatenate(expected))):
            self.found.append(f"{_names(group)}: other elements are shared than there")
        elif distances:
            self._distances(group, got, expected)

    def _distances(self, group: list[_Pair], got: list[Any], expected: list[Any]) -> None:
        """Dense views with nothing unused between them keep their distance."""
        used = np.unique(np.concatenate(expected))
        run_of = np.concatenate([[0], np.cumsum(np.diff(used) > 1)])
        shift: dict[int, tuple[int, _Pair]] = {}
        for pair, mine, theirs in zip(group, got, expected, strict=True):
            if is_dense(pair.expected):
                run = int(run_of[np.searchsorted(used, theirs.min())])
                found = int(mine.min() - theirs.min())
                first, other = shift.setdefault(run, (found, pair))
                if first != found:
                    self.found.append(f"{other.name}, {pair.name}: {found - first} bytes further apart than there")


def _show(value: object) -> str:
    try:
        return repr(value)[:200]
    except ValueError:
        return "an integer too long to show"


def _equal_bits(got: torch.Tensor, expected: torch.Tensor) -> bool:
    if got.dtype in _QUICK and got.is_contiguous() and expected.is_contiguous() and not expected.is_neg():
        integer = _QUICK[got.dtype]
        return torch.equal(got.detach().view(integer), expected.detach().view(integer))
    return raw_bytes(got) == raw_bytes(expected)


# The dtypes of most tensors, and the integers that their elements are compared as.
_QUICK = {torch.float32: torch.int32, torch.int64: torch.int64, torch.uint8: torch.uint8}


def _names(group: list[_Pair]) -> str:
    return ", ".join(pair.name for pair in group[:4])


def _first_seen(places: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """For each entry the index of the first one that is equal."""
    _, first, inverse = np.unique(places, return_index=True, return_inverse=True)
    return first[inverse]


def _strides(tensor: torch.Tensor) -> list[int]:
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]


_PROPERTIES: dict[str, Callable[[Any], Any]] = {
    "dtype": lambda t: t.dtype,
    "layout": lambda t: t.layout,
    "shape": lambda t: tuple(t.shape),
    "device": lambda t: t.device,
    "requires_grad": lambda t: t.requires_grad,
    "is a Parameter": lambda t: isinstance(t, torch.nn.Parameter),
    "is quantized": lambda t: t.is_quantized,
    "is nested": lambda t: t.is_nested,
}
_KINDS: dict[str, Callable[[Any], Any]] = {
    "coalesced": lambda t: t.is_coalesced() if t.layout == torch.sparse_coo else None,
    "sparse dimensions": lambda t: t.sparse_dim() if t.layout != torch.strided else None,
    "quantization": lambda t: t.qscheme() if t.is_quantized else None,
    "scale and zero point": lambda t: (t.q_scale(), t.q_zero_point()) if t.is_quantized else None,
    "channel": lambda t: t.q_per_channel_axis() if t.is_quantized else None,
    "strides": lambda t: t.stride() if t.is_meta else None,
}


def _plain(tensor: Any) -> tuple[Any, ...] | None:
    """All properties of a tensor of the most common kind, None for others."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        return None
    if tensor.is_quantized or tensor.is_nested or tensor.is_meta:
        return None
    return tensor.dtype, tensor.shape, tensor.device, tensor.requires_grad


def _ask(get: Callable[[Any], Any], tensor: Any) -> Any:
    """A property of a tensor; None where this kind of tensor has none."""
    try:
        return get(tensor)
    except (AttributeError, NotImplementedError, RuntimeError, ValueError):
        return None


def _flattened(tensor: Any) -> tuple[list[str], Any]:
    names, context = tensor.__tensor_flatten__()
    return list(names), context


def _has_identity(value: Any) -> bool:
    """Whether one can tell an object from its copy without asking ``is``: whether it can be changed."""
    if isinstance(value, (torch.Tensor, ShardedTensor, np.ndarray, set, bytearray, torch.Generator)):
        return True
    inside = opened(value)
    return inside is not None and not isinstance(value, tuple)


def _key(name: Any) -> tuple[type, Any]:
    """A key that equals only one of the same type: True is not 1."""
    return (type(name), name) if type(name) in (str, int) else (type(name), _identity_of(name))


def _identity_of(value: Any) -> Any:
    """What equals that of another value only if nobody can tell them apart."""
    if isinstance(value, float):
        return struct.pack("d", value)
    if isinstance(value, complex):
        return struct.pack("dd", value.real, value.imag)
    if isinstance(value, np.generic):
        return value.dtype, value.tobytes()
    if isinstance(value, tuple):
        return tuple(map(_key, value))
    if isinstance(value, (set, frozenset)):
        return frozenset(map(_key, value))
    if isinstance(value, torch.Generator):
        return str(value.device), bytes(value.get_state().tolist())
    if isinstance(value, (slice, range)):
        return tuple(map(_key, (value.start, value.stop, value.step)))
    if isinstance(value, int) or type(value) is object:
        return int(value) if isinstance(value, int) else None
    # A Decimal that is not a number does not equal itself.
    return (value, repr(value)) if value == value else repr(value)
