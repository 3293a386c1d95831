"""Leaves from their bytes, once these have landed.

Strategy: the template's own objects where their memory holds the new bytes, others where it does not. A tensor that is
a leaf and is inside of another leaf as well is one object again, as it was at the source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import filterfalse
from typing import Any, NamedTuple

import torch

from ft_transport._device import seam
from ft_transport._options import CPU
from ft_transport._plan.compare import Targets
from ft_transport._state.kinds.base import KINDS, Maker, Surroundings, plain, refresh, unflatten_leaf
from ft_transport._state.kinds.distributed import meshes_of
from ft_transport._state.manifest import EMPTY_ON_DEVICE, Leaf, Manifest, View
from ft_transport._state.tree import format_path
from ft_transport.errors import RemoteProtocolError

__all__ = ["Landed", "Rebuild", "allocated", "mark_changed", "quiet", "view_of"]


class Landed(NamedTuple):
    """What becomes of the views of a manifest, by their numbers.

    Attributes:
        values: The tensor that each view is, or that its value is copied from in the end; None of one without elements.
        settled: Those that are the template's tensors, which hold their value once it has landed.
        copies: Those that get it by a copy when all has landed: which, and of which view's value.
    """

    values: list[torch.Tensor | None]
    settled: set[int]
    copies: list[tuple[int, int]]


class Rebuild:
    """Builds the state from what has landed.

    Args:
        manifest: What the source described.
        matched: The template's leaf for each manifest leaf that has one.
        targets: The template's tensors that can take their bytes.
        landed: What has become of the views.
        surroundings: What the receiver has; the meshes of matched leaves are added to its own.
        device: Where fresh tensors live that were on an accelerator.
    """

    def __init__(
        self,
        manifest: Manifest,
        matched: dict[int, object],
        targets: Targets,
        landed: Landed,
        surroundings: Surroundings,
        device: torch.device = CPU,
    ) -> None:
        self._manifest = manifest
        self._matched = matched
        self._targets = targets
        self._values = landed.values
        self._settled = landed.settled
        self._surroundings = surroundings
        self._device = device

    def _empty(self, view: View) -> torch.Tensor:
        """A tensor that has no bytes, where the source's was."""
        return allocated(view, self._device if view.storage == EMPTY_ON_DEVICE else CPU)

    def try_it(self) -> None:
        """Find what cannot be rebuilt before a byte lands.

        Raises:
            RemoteProtocolError: A leaf cannot; the text names it.
        """
        # Some classes find more wrong with a context than we can check (a mesh that cannot be made, an ``__init__``
        # that raises). Tried with memory of the right form and no content, it costs nothing that is kept.
        tried = {name for name, kind in KINDS.items() if kind.is_tried}
        leaves = self._manifest.leaves
        found = {index: leaf for index, leaf in leaves.others.items() if leaf.kind in tried}
        if not found:
            return
        here = self._here()
        for index, leaf in sorted(found.items()):
            if not leaf.views or leaves.firsts[index] not in self._targets:
                try:
                    unflatten_leaf(leaf.part, self._makers(index, leaf, None), here)
                except Exception as exc:
                    path = format_path(self._manifest.paths[index])
                    raise RemoteProtocolError(f"{path}: it cannot be rebuilt: {str(exc)[:1000]}") from exc

    def _here(self) -> Surroundings:
        meshes = {**self._surroundings.meshes, **meshes_of(list(self._matched.values()))}
        return self._surroundings._replace(meshes=meshes)

    def state(self) -> object:
        """The state dict, once every message has landed and been verified."""
        manifest, matched, settled = self._manifest, self._matched, self._settled
        leaves = manifest.leaves
        objects = self._objects() if any(leaf.parts for leaf in leaves.others.values()) else None
        # Nearly every leaf is a plain tensor: the template's, which has its bytes, or without one what has landed.
        # These all at once.
        unlike = {index for index, leaf in leaves.others.items() if leaf.kind != "tensor"}
        ready: set[int] | None = None
        built: list[object]
        if matched or objects is not None:
            built = list(map(matched.get, range(len(leaves))))
            if len(settled) < len(leaves.views):
                ready = {leaves.owners[number] for number in settled}.difference(unlike)
        else:
            indices = leaves.plain
            values = list(map(self._values.__getitem__, map(leaves.firsts.__getitem__, indices)))
            built = [None] * len(leaves)
            for index, value in zip(indices, values, strict=True):
                built[index] = value
            ready = {index for index, value in zip(indices, values, strict=True) if value is not None}
        rest = sorted(unlike) if ready is None else filterfalse(ready.__contains__, range(len(leaves)))
        here = self._here()
        # In the order of leaves, which is the order of the tree: what a leaf is the same as has been built before it.
        for index in rest:
            leaf = leaves[index]
            if leaf.kind == "value":
                built[index] = leaf.context
            # The template's object with its new bytes: modules and optimizers hold on to it, and must find the new
            # values there.
            elif index in matched and self._adopts(index, leaf):
                built[index] = refresh(leaf.part, self._makers(index, leaf, None), matched[index], here)
            elif index in manifest.same:
                built[index] = built[manifest.same[index]]
            else:
                built[index] = self._new_leaf(index, leaf, objects, here)
        return manifest.build(built)

    def _new_leaf(self, index: int, leaf: Leaf, objects: _Objects | None, here: Surroundings) -> object:
        if leaf.kind != "tensor":
            here = here._replace(template=self._matched.get(index))
            return unflatten_leaf(leaf.part, self._makers(index, leaf, objects), here)
        tensor, view = self._values[self._manifest.leaves.firsts[index]], leaf.views[0]
        if objects is not None:
            return objects.outer(view, leaf.context, tensor)
        return plain(self._empty(view) if tensor is None else tensor, leaf.context)

    def _objects(self) -> _Objects:
        """Tensors that leaves may hold, beginning with the template's own."""
        objects = _Objects(self._empty)
        for number in sorted(self._settled):
            leaf = self._manifest.leaves[self._manifest.leaves.owners[number]]
            if leaf.kind == "tensor":
                objects.know(leaf.views[0], leaf.context, self._targets[number].memory)
        return objects

    def _adopts(self, index: int, leaf: Leaf) -> bool:
        """Whether the template's leaf holds the new bytes. Tensors among its attributes do not count."""
        views = leaf.views
        if leaf.kind in KINDS:
            kind = KINDS[leaf.kind]
            if kind.always_new or kind.obstacle(self._matched[index]):
                return False
            views = views[: kind.num_tensors_in_place]
        first = self._manifest.leaves.firsts[index]
        return all(view.storage < 0 or number in self._settled for number, view in enumerate(views, first))

    def _makers(self, index: int, leaf: Leaf, objects: _Objects | None) -> Iterator[Maker]:
        for number, view in enumerate(leaf.views, self._manifest.leaves.firsts[index]):
            tensor = self._values[number]
            if objects is None or number in self._settled:
                yield partial(plain, self._empty(view) if tensor is None else tensor)
            else:
                yield partial(objects.inner, view, tensor)


class _Objects:
    """Which tensor objects have been made, by view and context: a tensor inside of a leaf may be a leaf itself.

    Two leaves of one view are two objects, unless the manifest says otherwise; inside of leaves they are one, as
    the offsets of jagged tensors that fit together are.
    """

    def __init__(self, empty: Callable[[View], torch.Tensor]) -> None:
        self._empty = empty
        self._made: dict[tuple[View, Any], torch.Tensor] = {}
        self._leaves: set[tuple[View, Any]] = set()

    def know(self, view: View, context: Any, leaf: torch.Tensor) -> None:
        """A leaf that the template has, if it is what the source's is."""
        is_parameter, requires_grad = context or (False, False)
        # A template may have a Parameter where the source has its tensor; then what is inside of other leaves is not
        # that Parameter.
        if isinstance(leaf, torch.nn.Parameter) == is_parameter and leaf.requires_grad == requires_grad:
            self._made.setdefault((view, context), leaf)
            self._leaves.add((view, context))

    def inner(self, view: View, tensor: torch.Tensor | None, context: Any) -> torch.Tensor:
        """A tensor inside of a leaf."""
        key = view, context
        if key not in self._made:
            self._made[key] = plain(self._empty(view) if tensor is None else tensor, context)
        return self._made[key]

    def outer(self, view: View, context: Any, tensor: torch.Tensor | None) -> torch.Tensor:
        """A tensor that is a leaf."""
        key = view, context
        # Empty tensors are never one: they have nothing in common but that.
        if key in self._leaves or view.storage < 0:
            return plain(self._empty(view) if tensor is None else tensor, context)
        self._leaves.add(key)
        return self.inner(view, tensor, context)


def mark_changed(tensors: Sequence[torch.Tensor]) -> None:
    """Tell autograd that these tensors changed: a graph that saved them must not use the mix of old and new."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:  # of a tensor of inference mode, which has no count; to count others twice does no harm
        torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])


def quiet(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with a version counter of its own, unlike ``detach()``: see :func:`mark_changed`."""
    # ``detach()`` shares the version counter: writing through it would tell autograd of each message. It is told once,
    # when all is verified, by :func:`mark_changed`.
    return tensor.data


def view_of(flat: torch.Tensor, view: View, shift: int) -> torch.Tensor:
    shape = view.geometry
    tensor = torch.empty(0, dtype=shape.dtype, device=flat.device)
    return tensor.set_(flat.untyped_storage(), view.offset + shift // shape.itemsize, shape.shape, shape.stride)


def allocated(view: View, device: torch.device) -> torch.Tensor:
    """A tensor of a view's shape, without content."""
    shape = view.geometry
    return seam().empty_strided(shape.shape, shape.stride, shape.dtype, device)
