"""The memory behind a template, before and after a transfer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from corpus.look import Path, leaves, parts, storage_of
from corpus.measure import is_tensor, reachable

__all__ = ["Memory"]


class Memory:
    """The storages behind a template as they are now, neighbours included, and where each leaf's parts lie.

    Attributes:
        leaves: The template's leaves by path.
        parts: The plain tensors of each leaf that is a tensor.
    """

    def __init__(self, template: object) -> None:
        self.leaves: dict[Path, Any] = dict(leaves(template))
        self.parts = {path: parts(leaf) for path, leaf in self.leaves.items() if is_tensor(leaf)}
        everything = [part for leaf in reachable(template) if is_tensor(leaf) for part in parts(leaf).values()]
        self._storages = {part.untyped_storage()._cdata: storage_of(part) for part in everything if part.numel()}
        self._bytes = {key: memory.copy() for key, memory in self._storages.items()}

    def is_in_place(self, path: Path, leaf: Any) -> bool:
        """Whether a leaf of the result is the template's own, at the addresses it had."""
        found = {what: part.data_ptr() for what, part in parts(leaf).items()}
        return leaf is self.leaves[path] and found == {what: p.data_ptr() for what, p in self.parts[path].items()}

    def changed_outside(self, landed: list[torch.Tensor]) -> bool:
        """Whether a byte has changed that is of none of these tensors."""
        may_change = {key: np.zeros(len(memory), dtype=np.uint8) for key, memory in self._storages.items()}
        for tensor in landed:
            if tensor.numel():
                size = tensor.element_size()
                flat = torch.from_numpy(may_change[tensor.untyped_storage()._cdata])
                shape, stride = [*tensor.shape, size], [*(step * size for step in tensor.stride()), 1]
                flat.as_strided(shape, stride, tensor.storage_offset() * size).fill_(1)
        return any(
            bool(((memory != self._bytes[key]) & (may_change[key] == 0)).any())
            for key, memory in self._storages.items()
        )

    @property
    def changed(self) -> bool:
        """Whether any byte has changed."""
        return self.changed_outside([])
