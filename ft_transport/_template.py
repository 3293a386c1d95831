"""How what the source sends fits the tensors that the receiver has: the *template*.

Strategy: first find the callback's tree inside what the source sends, then compare leaf by leaf. Disagreements are
collected, all of them. A template leaf that cannot be written without harm is left alone and named in the report.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ft_transport._leaves import KINDS, kind_of
from ft_transport._manifest import Geometry, Leaf, Manifest, View, disjoint, geometry, merge
from ft_transport._tree import Path, flatten, format_path
from ft_transport.errors import RemoteProtocolError
from ft_transport.report import TransferReport

__all__ = ["Slot", "Targets", "compare", "geometry_of", "match_template", "same_strides"]

# Index of a leaf, and position of one of its views.
Slot = tuple[int, int]
# The template's tensor for each view that can land in it.
Targets = dict[Slot, torch.Tensor]

# Bounds the registered keys of torchft's envelope that are tried as the place of the callback's tree.
MAX_KEYS = 100


# --------------------------------------------------------------------------------------------- match


def match_template(manifest: Manifest, template: object, report: TransferReport) -> dict[int, object]:
    """Find the callback's tree inside what the source sent: at its root or inside torchft's envelope.

    The Manager wraps what it sends: ``{"user": {key: tree}, "torchft": {…}}``. The callback's tree may be the
    whole state, all of ``"user"``, or the tree of one key.

    Returns:
        The template's leaf for each manifest leaf that has one.

    Raises:
        RemoteProtocolError: The source has tensors and none is where the callback's tree would have it, or
            there are two places that fit equally well.
    """
    _, paths, leaves = flatten(template)
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
        else:
            matched[index] = leaf
    return matched


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
            agreeing += len(views) == 1 and views[0].geometry.shape == leaf.shape
    return places, agreeing


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
    for index, leaf in enumerate(manifest.leaves):
        if index in matched:
            reason = _compare_leaf(index, leaf, matched[index], manifest, targets, report)
            if reason:
                disagreements.append(f"{format_path(manifest.paths[index])}: {reason}")
        elif leaf.views and matched:
            report.missing.append(format_path(manifest.paths[index]))
    _drop_conflicts(manifest, targets, report)
    return targets, disagreements


def _compare_leaf(
    index: int, leaf: Leaf, mine: Any, manifest: Manifest, targets: Targets, report: TransferReport
) -> str:
    """Why a leaf disagrees, empty if it does not; then its tensors are noted as targets."""
    try:
        kind = kind_of(mine)
        if (kind.name if kind is not None else "value") != leaf.kind:
            return f"expected {_describe(mine)}, source has {_describe_leaf(leaf)}"
        if kind is None:
            return ""
        inner = kind.inner(mine)
    except ValueError as exc:
        report.not_in_place[format_path(manifest.paths[index])] = str(exc)
        return ""
    reason = KINDS[leaf.kind].disagreement(leaf.context, mine) or _shapes_differ(leaf, inner)
    if reason:
        return reason
    for position, tensor in enumerate(inner):
        if obstacle := _obstacle(tensor, mine):
            report.not_in_place[format_path(manifest.paths[index])] = obstacle
        elif leaf.views[position].storage >= 0:
            targets[index, position] = tensor
    return ""


def geometry_of(tensor: torch.Tensor) -> Geometry:
    """The geometry of a plain strided tensor."""
    return geometry(tensor.dtype, tuple(tensor.shape), tensor.stride())


def _shapes_differ(leaf: Leaf, inner: Sequence[torch.Tensor]) -> str:
    if len(inner) != len(leaf.views):
        return f"expected {len(inner)} local tensors, source has {len(leaf.views)}"
    for view, tensor in zip(leaf.views, inner, strict=True):
        if view.geometry.dtype != tensor.dtype or view.geometry.shape != tensor.shape:
            return f"expected {geometry_of(tensor)}, source has {view.geometry}"
    return ""


def _describe(mine: object) -> str:
    kind = kind_of(mine)
    if kind is None:
        return f"a plain {type(mine).__name__}"
    return f"{type(mine).__name__} " + ", ".join(str(geometry_of(tensor)) for tensor in kind.inner(mine))


def _describe_leaf(leaf: Leaf) -> str:
    if leaf.kind == "value":
        return f"a plain {type(leaf.context).__name__}"
    return f"{leaf.kind} " + ", ".join(str(view.geometry) for view in leaf.views)


def _obstacle(tensor: torch.Tensor, mine: Any) -> str:
    """Why bytes must not be written into a template tensor, empty if they may."""
    if type(mine) in (torch.Tensor, torch.nn.Parameter) and (mine.is_conj() or mine.is_neg()):
        return "the template's tensor is a lazy conjugate or negative"
    shape = geometry_of(tensor)
    if shape.order is None or shape.expanded:
        return "the template's tensor overlaps itself"
    return ""


def same_strides(view: View, tensor: torch.Tensor) -> bool:
    """Whether a tensor of the view's shape has its elements in the same places."""
    mine, theirs = view.geometry, geometry_of(tensor)
    return mine.stride == theirs.stride or all(
        size == 1 or a == b for size, a, b in zip(mine.shape, mine.stride, theirs.stride, strict=True)
    )


# ----------------------------------------------------------------------------------------- conflicts


def _drop_conflicts(manifest: Manifest, targets: Targets, report: TransferReport) -> None:
    """Give up template tensors that share memory in a way the source's do not: one would overwrite the other."""
    places: dict[int, list[tuple[int, int, Slot]]] = {}
    for slot, tensor in targets.items():
        begin = int(tensor.storage_offset()) * tensor.element_size()
        end = begin + geometry_of(tensor).span
        places.setdefault(tensor.untyped_storage()._cdata, []).append((begin, end, slot))
    for found in places.values():
        if len(found) == 1:
            continue
        for low, high in merge((begin, end) for begin, end, _ in found):
            cluster = [(begin, slot) for begin, _, slot in found if low <= begin < high]
            if len(cluster) > 1 and not _harmless(manifest, targets, cluster):
                for _, slot in cluster:
                    del targets[slot]
                    path = format_path(manifest.paths[slot[0]])
                    report.not_in_place[path] = "shares memory in the template in a way that it does not at the source"


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
        tensor = targets[slot]
        same.setdefault(View(0, geometry_of(tensor), int(tensor.storage_offset())), []).append((begin, slot))
    return all(_shared_alike(manifest, targets, group) for group in same.values()) and disjoint(list(same))
