"""How what the source sends fits the tensors that the receiver has: the *template*.

Strategy: first find the callback's tree inside what the source sends, then compare leaf by leaf. Disagreements are
collected, all of them. A template leaf that cannot be written without harm is left alone and named in the report.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ft_transport._geometry import Geometry, geometry, geometry_of
from ft_transport._leaves import KINDS, VALUE, Part, is_plain, take_apart
from ft_transport._manifest import Leaf, Manifest, View, disjoint
from ft_transport._memory import ReadOnlyMemory
from ft_transport._tree import Node, Path, flatten, format_path, paths_of
from ft_transport.errors import RemoteProtocolError
from ft_transport.report import TransferReport

__all__ = ["Slot", "Targets", "compare", "fit", "match_template", "same_strides"]

# Index of a leaf, and position of one of its views.
Slot = tuple[int, int]
# The template's tensor for each view that can land in it.
Targets = dict[Slot, torch.Tensor]


# Bounds the registered keys of torchft's envelope that are tried as the place of the callback's tree.
MAX_KEYS = 100


def fit(
    manifest: Manifest, state_dict: Callable[[], object] | None, strict: bool, report: TransferReport
) -> tuple[dict[int, object], Targets]:
    """Find the template in what the source sends, and check that it can take it.

    Returns:
        As :func:`match_template` and :func:`compare`.

    Raises:
        RemoteProtocolError: It cannot; every path is listed.
    """
    matched = match_template(manifest, state_dict(), report) if state_dict is not None else {}
    targets, reasons = compare(manifest, matched, report)
    if strict:
        reasons += [f"{path}: expected in the template, source has it" for path in report.missing]
        reasons += [f"{path}: expected from the source, template has it" for path in report.unused]
    if reasons:
        raise RemoteProtocolError("; ".join(reasons))
    return matched, targets


# --------------------------------------------------------------------------------------------- match


def match_template(manifest: Manifest, template: object, report: TransferReport) -> dict[int, object]:
    """Find the callback's tree inside what the source sent: at its root or inside torchft's envelope.

    The Manager wraps what it sends: ``{"user": {key: tree}, "torchft": {…}}``. The callback's tree may be the
    whole state, all of ``"user"``, or the tree of one key.

    Returns:
        The template's leaf for each manifest leaf that has one. A None has none for a tensor: a slot that is still
        empty, as an optimizer's before its first step.

    Raises:
        RemoteProtocolError: The source has tensors and none is where the callback's tree would have it, or
            there are two places that fit equally well.
    """
    nodes, leaves, _ = flatten(template)
    if _fits_as_a_whole(manifest.nodes, nodes):
        return {
            index: mine for index, mine in enumerate(leaves) if mine is not None or not manifest.leaves[index].views
        }
    paths = paths_of(nodes)
    index_of = _places(manifest.paths, set(paths))
    scored = [(_score(manifest, index_of, prefix, paths, leaves), prefix) for prefix in _prefixes(manifest.paths)]
    best, prefix = max(scored, key=lambda entry: entry[0])
    if any(leaf.views for leaf in manifest.leaves):
        if best == (0, 0):
            raise RemoteProtocolError(
                f"the state_dict callback matches nothing in what the source sends: the callback has "
                f"{_some(paths)}, the source sends {_some(manifest.paths)}"
            )
        rivals = [format_path(other)[:200] for score, other in scored if score == best]
        if len(rivals) > 1:
            raise RemoteProtocolError(
                f"the state_dict callback fits at {' and '.join(rivals)} alike; return a dict by registered key"
            )
    matched = {}
    for path, leaf in zip(paths, leaves, strict=True):
        index = index_of.get(prefix + path)
        if index is None:
            report.unused.append(format_path(prefix + path))
        elif leaf is not None or not manifest.leaves[index].views:
            matched[index] = leaf
    return matched


def _fits_as_a_whole(nodes: list[Node], template: list[Node]) -> bool:
    """Whether the template's tree is the source's, or the only one in the envelope: then no path is needed."""
    starts = [0]
    if "user" in nodes[0].keys[:1] and "torchft" in nodes[0].keys:
        starts += [1, 2] if nodes[1].num_children == 1 else []
    try:
        return sum(nodes[start : start + len(template)] == template for start in starts) == 1
    except Exception:  # contexts of registered nodes need not be comparable
        return False


def _places(paths: Sequence[Path], wanted: set[Path]) -> dict[Path, int]:
    """The index of each of the source's paths that the template may have.

    Not of all: a source can choose paths that a dict needs very long to tell apart.
    """
    return {
        path: index
        for index, path in enumerate(paths)
        if path in wanted or (path[:1] == ("user",) and (path[1:] in wanted or path[2:] in wanted))
    }


def _prefixes(paths: Sequence[Path]) -> Iterator[Path]:
    yield ()
    if {path[0] for path in paths if path} >= {"user", "torchft"}:
        yield ("user",)
        keys = dict.fromkeys(path[:2] for path in paths if len(path) >= 2 and path[0] == "user")
        yield from itertools.islice(keys, MAX_KEYS)


def _score(
    manifest: Manifest,
    index_of: dict[Path, int],
    prefix: Path,
    paths: Sequence[Path],
    leaves: Sequence[object],
) -> tuple[int, int]:
    """How many tensors of the template have a place under ``prefix``, and how many of these agree in shape."""
    places = agreeing = 0
    for path, leaf in zip(paths, leaves, strict=True):
        index = index_of.get(prefix + path)
        if index is not None and isinstance(leaf, torch.Tensor):
            views = manifest.leaves[index].views
            places += bool(views)
            agreeing += len(views) == 1 and views[0].geometry.shape == _shape_of(leaf)
    return places, agreeing


def _shape_of(leaf: torch.Tensor) -> tuple[int, ...] | None:
    """The shape of the template's leaf; None for one that has none, as a nested tensor of the old layout."""
    try:
        return leaf.shape
    except Exception:  # or whatever a subclass raises
        return None


def _some(paths: Sequence[Path]) -> str:
    names = [format_path(path)[:200] for path in paths[:3]]
    return ", ".join(names) + (f", … ({len(paths)} leaves)" if len(paths) > 3 else "") if names else "no leaves"


# ------------------------------------------------------------------------------------------- compare


def compare(manifest: Manifest, matched: dict[int, object], report: TransferReport) -> tuple[Targets, list[str]]:
    """Compare what the source sends with the template, leaf by leaf.

    Returns:
        The tensors that can take their bytes, and what disagrees, one line for each path.
    """
    targets: Targets = {}
    disagreements: list[str] = []
    comparison = _Comparison(manifest, targets, report)
    for index, leaf in enumerate(manifest.leaves):
        if index in matched:
            reason = comparison.leaf(index, leaf, matched[index])
            if reason:
                disagreements.append(f"{format_path(manifest.paths[index])}: {reason}")
        elif leaf.views and matched:
            report.missing.append(format_path(manifest.paths[index]))
    _drop_conflicts(manifest, targets, comparison.extents, report)
    return targets, disagreements


class _Comparison:
    """Compares leaf by leaf; notes the tensors that can take their bytes.

    Attributes:
        extents: First address and the one behind the last, of each such tensor.
    """

    def __init__(self, manifest: Manifest, targets: Targets, report: TransferReport) -> None:
        self.extents: list[tuple[int, int, Slot]] = []
        self._manifest = manifest
        self._targets = targets
        self._report = report
        self._read_only = ReadOnlyMemory()

    def leaf(self, index: int, leaf: Leaf, mine: Any) -> str:
        """Why a leaf disagrees with the template's, empty if it does not."""
        if leaf.kind == "tensor" and type(mine) in (torch.Tensor, torch.nn.Parameter) and is_plain(mine):
            return self._tensor((index, 0), leaf.views[0], mine)
        try:
            part, tensors = take_apart(mine)
        except ValueError as exc:
            self._keep_away(index, str(exc))
            return ""
        if part.kind in KINDS and part.kind == leaf.kind and (obstacle := KINDS[part.kind].obstacle(mine)):
            reason = KINDS[part.kind].disagreement(leaf.context, part.context)
            if not reason:
                self._keep_away(index, obstacle)
            return reason
        return self._part(index, leaf.part, 0, part, 0, tensors)

    def _part(self, index: int, part: Part, view: int, mine: Part, first: int, tensors: Sequence[torch.Tensor]) -> str:
        """Compare a part of a leaf, whose views start at ``view``, with one of the template's."""
        if _family(part.kind) != _family(mine.kind):
            leaf = self._manifest.leaves[index]
            return f"expected {_describe(mine, tensors[first:])}, source has {_describe_leaf(part, leaf.views[view:])}"
        if part.kind == mine.kind and part.kind in KINDS:
            reason = KINDS[part.kind].disagreement(part.context, mine.context)
            if reason:
                return reason
            if KINDS[part.kind].not_in_place:
                self._keep_away(index, KINDS[part.kind].not_in_place)
                return ""
        if _family(part.kind) == VALUE:
            if part.parts:
                self._keep_away(index, "inside of an object")
            return ""
        if _family(part.kind) == "tensor":
            if _laziness(part) != _laziness(mine):
                self._keep_away(index, "a lazy conjugate or negative on one side only")
                return ""
            return self._tensor((index, view), self._manifest.leaves[index].views[view], tensors[first])
        if len(part.parts) != len(mine.parts):
            return f"expected {len(mine.parts)} local tensors, source has {len(part.parts)}"
        for below, my_below in zip(part.parts, mine.parts, strict=True):
            if below.kind == "numpy":  # whether it can be written to is known of whole leaves alone
                self._keep_away(index, "an array inside of a leaf")
            elif reason := self._part(index, below, view, my_below, first, tensors):
                return reason
            view, first = view + below.num_views, first + my_below.num_views
        return ""

    def _tensor(self, slot: Slot, view: View, mine: torch.Tensor) -> str:
        shape = geometry(mine.dtype, mine.shape, mine.stride())
        wanted = view.geometry
        if shape is not wanted and (shape.dtype != wanted.dtype or shape.shape != wanted.shape):
            return f"expected {shape}, source has {wanted}"
        if shape.order is None or shape.expanded:
            self._keep_away(slot[0], "the template's tensor overlaps itself")
        elif view.storage >= 0:
            address = mine.data_ptr()
            if mine.is_cpu and self._read_only.holds(address):
                self._keep_away(slot[0], "the template's tensor lies in read-only memory")
            else:
                self._targets[slot] = mine
                self.extents.append((address, address + shape.span, slot))
        return ""

    def _keep_away(self, index: int, reason: str) -> None:
        self._report.not_in_place[format_path(self._manifest.paths[index])] = reason


def _laziness(part: Part) -> tuple[bool, bool]:
    """Whether a tensor, at whatever depth, is a lazy conjugate of its bytes, and whether a lazy negative."""
    conjugate = negative = False
    while part.parts:
        if part.kind == "lazy":
            conjugate, negative = conjugate != part.context[0], negative != part.context[1]
        part = part.parts[0]
    return conjugate, negative


def _family(kind: str) -> str:
    if kind in (VALUE, "tensor"):
        return kind
    return KINDS[kind].family or kind


def _describe(mine: Part, tensors: Sequence[torch.Tensor]) -> str:
    if _family(mine.kind) == VALUE:
        return f"a plain {type(mine.context).__name__ if mine.kind == VALUE else mine.kind}"
    return _of(mine, [geometry_of(tensor) for tensor in tensors[: mine.num_views]])


def _describe_leaf(part: Part, views: Sequence[View]) -> str:
    if _family(part.kind) == VALUE:
        return f"a plain {type(part.context).__name__ if part.kind == VALUE else part.kind}"
    return _of(part, [view.geometry for view in views[: part.num_views]])


def _of(part: Part, shapes: Sequence[Geometry]) -> str:
    label = KINDS[part.kind].label(part.context) if part.kind in KINDS else part.kind
    if _family(part.kind) == "tensor":
        return f"{label} {shapes[0]}"
    return f"{label} of {', '.join(map(str, shapes))}" if shapes else label


def same_strides(view: View, tensor: torch.Tensor) -> bool:
    """Whether a tensor of the view's shape has its elements in the same places."""
    shape, stride = view.geometry, tensor.stride()
    return shape.stride == stride or all(
        size == 1 or a == b for size, a, b in zip(shape.shape, shape.stride, stride, strict=True)
    )


# ----------------------------------------------------------------------------------------- conflicts


def _drop_conflicts(
    manifest: Manifest, targets: Targets, extents: list[tuple[int, int, Slot]], report: TransferReport
) -> None:
    """Give up template tensors that share memory in a way the source's do not: one would overwrite the other."""
    extents.sort()
    cluster: list[tuple[int, Slot]] = []
    reached = 0
    for begin, end, slot in [*extents, (_BEHIND, _BEHIND, (0, 0))]:
        if begin < reached:
            cluster.append((begin, slot))
            reached = max(reached, end)
            continue
        if len(cluster) > 1 and not _harmless(manifest, targets, cluster):
            for _, other in cluster:
                del targets[other]
                path = format_path(manifest.paths[other[0]])
                report.not_in_place[path] = "shares memory in the template in a way that it does not at the source"
        cluster, reached = [(begin, slot)], end


# An address that no tensor has.
_BEHIND = 1 << 64


def _shared_alike(manifest: Manifest, targets: Targets, cluster: Sequence[tuple[int, Slot]]) -> bool:
    """Whether targets that overlap do so, element by element, as their views at the source do."""
    views = [manifest.leaves[index].views[position] for _, (index, position) in cluster]
    # Which storage at the source, and how far the place there is from the one here.
    if len({(view.storage, begin - view.begin) for (begin, _), view in zip(cluster, views, strict=True)}) > 1:
        return False
    tensors = [targets[slot] for _, slot in cluster]
    if all(same_strides(view, tensor) for view, tensor in zip(views, tensors, strict=True)):
        return True
    # One and the same tensor several times, on both sides.
    return len(set(views)) == 1 and len({(begin, geometry_of(targets[slot])) for begin, slot in cluster}) == 1


def _harmless(manifest: Manifest, targets: Targets, cluster: Sequence[tuple[int, Slot]]) -> bool:
    """Whether targets whose extents overlap can all be written to."""
    if _shared_alike(manifest, targets, cluster):
        return True
    # Columns of one matrix: what is not the same tensor has no element in common.
    same: dict[View, list[tuple[int, Slot]]] = {}
    for begin, slot in cluster:
        shape = geometry_of(targets[slot])
        if begin % shape.itemsize != cluster[0][0] % shape.itemsize:
            return False
        same.setdefault(View(0, shape, begin // shape.itemsize), []).append((begin, slot))
    return all(_shared_alike(manifest, targets, group) for group in same.values()) and disjoint(list(same))
