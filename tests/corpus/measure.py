"""What a state weighs, and which of its leaves must land where. Knows nothing of the package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from corpus.look import addresses, is_dense, opened, parts

__all__ = ["allowance", "distinct_nbytes", "is_tensor", "never_lands", "reachable"]

# Bytes that do not grow with the state: lengths, answers, digests and signals of a few messages, the manifest's header,
# names of classes that are written once. An empty state takes 141 bytes (without torchft 188); the case that needs most
# of this, one jagged tensor of four parts, 848 (1,159).
FRAMES = 2048
PER_LEAF = 200
# A container is described by its type, the number of its children and their keys.
PER_CONTAINER = 24


def is_tensor(leaf: object) -> bool:
    """Whether a leaf is a tensor of any kind."""
    return isinstance(leaf, (torch.Tensor, ShardedTensor))


def reachable(state: object) -> Iterator[object]:
    """Everything in a state, each object once: containers, objects, what is in them, attributes of tensors."""
    seen: dict[int, object] = {}
    pending = [state]
    while pending:
        value = pending.pop()
        inside = opened(value)
        if inside is not None or is_tensor(value) or isinstance(value, (np.ndarray, bytes, str)):
            if id(value) in seen:
                continue
            seen[id(value)] = value
        yield value
        if inside is not None:
            pending.extend(inside.children)
        elif isinstance(value, (set, frozenset)):
            pending.extend(value)
        elif isinstance(value, torch.Tensor) and not is_traceable_wrapper_subclass(value):
            pending.extend(value.__dict__.values())


def distinct_nbytes(tensors: list[Any]) -> int:
    """How many distinct bytes these tensors refer to."""
    storages: dict[int, list[torch.Tensor]] = {}
    for tensor in tensors:
        for part in parts(tensor).values():
            if part.numel():
                storages.setdefault(part.untyped_storage()._cdata, []).append(part)
    total = 0
    for views in storages.values():
        if len(views) == 1 and is_dense(views[0]) and not views[0].is_quantized:
            total += views[0].numel() * views[0].element_size()
        else:
            total += len(np.unique(np.concatenate(list(map(addresses, views)))))
    return total


def allowance(state: object) -> int:
    """How many bytes a transfer may put on the wire."""
    tensors = []
    nbytes = leaves = containers = 0
    for value in reachable(state):
        inside = opened(value)
        if inside is not None:
            containers += 1
            nbytes += sum(len(name) for name in inside.names if isinstance(name, str) and len(name) > PER_CONTAINER)
            continue
        leaves += 1
        if is_tensor(value):
            tensors.append(value)
        else:
            nbytes += _weight(value)
    nbytes += distinct_nbytes(tensors)
    return nbytes + nbytes // 100 + PER_LEAF * leaves + PER_CONTAINER * containers + FRAMES


def _weight(value: object) -> int:
    """Bytes of a plain value that can be long."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, (bytes, bytearray)):
        return len(value)
    if isinstance(value, str):
        return len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, int) and not isinstance(value, bool):
        # As decimal digits.
        return value.bit_length() // 3 + 1
    if isinstance(value, torch.Generator):
        return int(value.get_state().numel())
    return 0


def never_lands(leaf: Any) -> bool:
    """Whether a template leaf of this kind cannot be written safely."""
    if isinstance(leaf, (DTensor, ShardedTensor)) or is_traceable_wrapper_subclass(leaf):
        return False
    if is_lazy(leaf):
        return False
    if leaf.layout != torch.strided or leaf.is_quantized:
        return True
    return not leaf.is_meta and not leaf.is_nested and _repeats(leaf)


def _repeats(tensor: torch.Tensor) -> bool:
    """Whether two elements of a tensor share memory."""
    if tensor.numel() <= 1 or is_dense(tensor):
        return False
    if any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)):
        return True
    found = addresses(tensor)
    return len(np.unique(found)) < len(found)
