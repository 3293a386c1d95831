"""Whether what arrived is what was sent, bit for bit, and where it landed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import xxhash

__all__ = ["differences", "distinct_nbytes", "fingerprint", "landed_in_place", "storages", "tensors"]


def fingerprint(state: object) -> dict[str, str]:
    """For each path what is there: the digest of a tensor's bytes with dtype and shape, a value, a container.

    A digest is taken of the raw bytes, so NaN equals NaN only where all their bits agree.
    """
    return {path: _describe(node) for path, node in _walk(state)}


def differences(expected: dict[str, str], got: dict[str, str]) -> list[str]:
    """Paths that one side lacks, or where they differ, sorted."""
    return sorted(path for path in expected.keys() | got.keys() if expected.get(path) != got.get(path))


def landed_in_place(template: object, state: object) -> tuple[int, int]:
    """How many tensors of ``state`` have the address of the template's at the same path, and of how many."""
    # Addresses, not `is`: a transport may well give new tensor objects over the template's memory. One without
    # elements has no memory to land in, and its address is 0 on both sides.
    own = dict(tensors(template))
    addresses = [(tensor.data_ptr(), own.get(path)) for path, tensor in tensors(state) if tensor.numel()]
    landed = sum(mine is not None and address == mine.data_ptr() for address, mine in addresses)
    return landed, len(addresses)


def distinct_nbytes(state: object) -> int:
    """Bytes that the tensors refer to, each counted once however many tensors share it.

    Counts a strided tensor from its first to its last byte.
    """
    ranges: list[tuple[int, int]] = []
    for _, tensor in tensors(state):
        if tensor.numel():
            last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            begin = tensor.data_ptr()
            ranges.append((begin, begin + (last + 1) * tensor.element_size()))
    # Intervals in order of their begin: what lies before `reached` is counted. A sum over tensors would count a tied
    # embedding twice, and a transport that sends it once would look faster than its network.
    nbytes, reached = 0, 0
    for begin, end in sorted(ranges):
        nbytes += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return nbytes


def storages(state: object) -> list[torch.Tensor]:
    """Each distinct storage of the state once, as flat uint8 tensors that share its memory, in path order."""
    # By address: each call of `untyped_storage` gives a new Python object, so neither `is` nor a set tells storages
    # apart.
    found: dict[int, torch.Tensor] = {}
    for _, tensor in tensors(state):
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in found:
            found[storage.data_ptr()] = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
    return list(found.values())


def tensors(state: object) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a state with their paths."""
    for path, node in _walk(state):
        if isinstance(node, torch.Tensor):
            yield path, node


def _walk(node: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Every node, containers before what they hold."""
    yield path, node
    if isinstance(node, dict):
        for key, child in node.items():
            yield from _walk(child, f"{path}[{key!r}]")
    elif isinstance(node, list | tuple):
        for index, child in enumerate(node):
            yield from _walk(child, f"{path}[{index}]")


def _describe(node: object) -> str:
    kind = type(node).__name__
    if isinstance(node, torch.Tensor):
        # As bytes: `torch.equal` says that NaN differs from itself and that 0.0 equals -0.0: the one would report a
        # state that arrived whole, the other let a flipped sign pass. Strides are left out: a transport may make a
        # tensor contiguous.
        flat = node.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return f"{kind} {node.dtype} {tuple(node.shape)} {xxhash.xxh3_128_hexdigest(flat.numpy().data)}"
    if isinstance(node, dict | list | tuple):
        return f"{kind} of {len(node)}"
    return f"{kind} {node!r}"
