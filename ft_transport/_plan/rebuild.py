"""Leaves from their bytes, once these have landed.

Strategy: the template's own objects where their memory holds the new bytes, others where it does not. A tensor that is
a leaf and is inside of another leaf as well is one object again, as it was at the source.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ft_transport._plan.blocks import CPU
from ft_transport._state.kinds.base import plain
from ft_transport._state.manifest import View

__all__ = ["NEW_EACH_TIME", "Objects", "empty", "mark_changed", "quiet", "view_of"]


class Objects:
    """Which tensor objects have been made, by view and context: a tensor inside of a leaf may be a leaf itself.

    Two leaves of one view are two objects, unless the manifest says otherwise; inside of leaves they are one, as
    the offsets of jagged tensors that fit together are.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[View, Any], torch.Tensor] = {}
        self._leaves: set[tuple[View, Any]] = set()

    def know(self, view: View, context: Any, leaf: torch.Tensor) -> None:
        """A leaf that the template has, if it is what the source's is."""
        is_parameter, requires_grad = context or (False, False)
        if isinstance(leaf, torch.nn.Parameter) == is_parameter and leaf.requires_grad == requires_grad:
            self._made.setdefault((view, context), leaf)
            self._leaves.add((view, context))

    def inner(self, view: View, tensor: torch.Tensor | None, context: Any) -> torch.Tensor:
        """A tensor inside of a leaf."""
        key = view, context
        if key not in self._made:
            self._made[key] = plain(empty(view) if tensor is None else tensor, context)
        return self._made[key]

    def outer(self, view: View, context: Any, tensor: torch.Tensor | None) -> torch.Tensor:
        """A tensor that is a leaf."""
        key = view, context
        if key in self._leaves or view.storage < 0:
            return plain(empty(view) if tensor is None else tensor, context)
        self._leaves.add(key)
        return self.inner(view, tensor, context)


# Kinds whose leaves have content beside their tensors, which the template's own does not get.
NEW_EACH_TIME = frozenset({"object"})


def mark_changed(tensors: Sequence[torch.Tensor]) -> None:
    """Tell autograd that these tensors changed: a graph that saved them must not use the mix of old and new."""
    for tensor in tensors:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def quiet(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with a version counter of its own, unlike ``detach()``: see :func:`mark_changed`."""
    return tensor.data


def view_of(flat: torch.Tensor, view: View, shift: int) -> torch.Tensor:
    shape = view.geometry
    tensor = torch.empty(0, dtype=shape.dtype, device=flat.device)
    return tensor.set_(flat.untyped_storage(), view.offset + shift // shape.itemsize, shape.shape, shape.stride)


def empty(view: View, device: torch.device = CPU) -> torch.Tensor:
    shape = view.geometry
    return torch.empty_strided(shape.shape, shape.stride, dtype=shape.dtype, device=device)
