"""How what the source sends fits the tensors that the receiver has: the *template*.

Strategy: first find the callback's tree inside what the source sends, then compare leaf by leaf. Disagreements are
collected, all of them; the caller's choice says what becomes of each: the source's leaf is new, and the template's left
alone, or all is refused. A template leaf that cannot be written without harm is left alone and named in the report.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch

from ft_transport._plan.blocks import ReadOnlyMemory
from ft_transport._state.geometry import Geometry, geometry, geometry_of
from ft_transport._state.kinds.base import KINDS, VALUE, Part, Surroundings, all_plain, is_plain, take_apart
from ft_transport._state.kinds.distributed import meshes_of
from ft_transport._state.manifest import Leaf, Manifest, View, disjoint
from ft_transport._state.tree import Node, Path, flatten, format_path, paths_of
from ft_transport._telemetry.report import Copies, OnMismatch, TransferReport, shortened
from ft_transport.errors import RemoteProtocolError, printable

__all__ = ["Fit", "Slot", "Targets", "compare", "fit", "match_template", "same_strides"]

logger = logging.getLogger("ft_transport")

# Index of a leaf, and position of one of its views.
Slot = tuple[int, int]
# The template's tensor for each view that can land in it.
Targets = dict[Slot, torch.Tensor]


# Bounds the registered keys of torchft's envelope that are tried as the place of the callback's tree.
MAX_KEYS = 100


class Fit(NamedTuple):
    """How the template takes what the source sends.

    Attributes:
        matched: See :func:`match_template`; without the leaves that are new.
        targets: The template's tensors that can take their bytes.
        here: The meshes of those template leaves that take none.
    """

    matched: dict[int, object]
    targets: Targets
    here: Surroundings


def fit(
    manifest: Manifest,
    state_dict: Callable[[], object] | None,
    report: TransferReport,
    *,
    strict: bool = False,
    on_mismatch: OnMismatch = "refuse",
    copies: Copies | None = None,
) -> Fit:
    """Find the template in what the source sends, and decide what becomes of each leaf. Nothing is written.

    Args:
        manifest: What the source sends.
        state_dict: Gives the template.
        report: Filled with what does not land in place, and why.
        strict: Refuse what disagrees, is missing or is left over.
        on_mismatch: What becomes of a leaf that disagrees.
        copies: What is known of the callback; it is called a second time if nothing is. None: it gives no copies.

    Raises:
        RemoteProtocolError: The template cannot take it; every path is listed.
        TypeError: ``on_mismatch`` has returned neither of its words.
    """
    if state_dict is None:
        return Fit({}, {}, Surroundings())
    try:
        return _fit(manifest, state_dict, report, "refuse" if strict else on_mismatch, strict, copies)
    except RemoteProtocolError:
        report.unfit = True
        raise


def _fit(
    manifest: Manifest,
    state_dict: Callable[[], object],
    report: TransferReport,
    on_mismatch: OnMismatch,
    strict: bool,
    copies: Copies | None,
) -> Fit:
    template = state_dict()
    matched = match_template(manifest, template, report)
    compared = _compare(manifest, matched, report)
    refused = _refused(manifest, matched, compared, on_mismatch, report)
    if strict:
        refused += [f"{path}: expected in the template, source has it" for path in report.missing]
        refused += [f"{path}: expected from the source, template has it" for path in report.unused]
    if refused:
        raise RemoteProtocolError("; ".join(refused))
    if report.missing and report.unused:
        logger.warning("the template and the source's state differ in their leaves: %s", shortened(report.gaps()))
    _warn(manifest, compared, report)
    targets, new = compared.targets, set(compared.disagreements)
    if copies is not None and targets:
        new |= _drop_copies(manifest, template, state_dict, targets, copies, report)
    here = Surroundings(meshes=meshes_of([matched.pop(index) for index in new]))
    return Fit(matched, targets, here)


def _refused(
    manifest: Manifest, matched: dict[int, object], compared: _Compared, on_mismatch: OnMismatch, report: TransferReport
) -> list[str]:
    """What must be refused, a line for each path; notes in the report all that disagrees."""
    refused = []
    fits = any(manifest.leaves[i].views for i in matched if i not in compared.disagreements)
    for index, reason in compared.disagreements.items():
        path = format_path(manifest.paths[index])
        reason = report.mismatched[path] = printable(reason)
        if (_choice(on_mismatch, path, reason) if fits else "refuse") == "refuse":
            refused.append(f"{path}: {reason}")
    return refused


def _choice(on_mismatch: OnMismatch, path: str, reason: str) -> str:
    if callable(on_mismatch):
        expected, _, got = reason.removeprefix("expected ").partition(", source has ")
        choice: object = on_mismatch(path, expected, got)
    else:
        choice = on_mismatch
    if choice not in ("fresh", "refuse"):
        raise TypeError(f"on_mismatch: expected 'fresh' or 'refuse' for {path}, got {choice!r}")
    return str(choice)


def _warn(manifest: Manifest, compared: _Compared, report: TransferReport) -> None:
    if compared.disagreements:
        lines = [
            f"{path}: {reason}" + (" (load_state_dict casts it without a word)" if index in compared.casts else "")
            for index, (path, reason) in zip(compared.disagreements, report.mismatched.items(), strict=True)
        ]
        logger.warning(
            "%d leaves do not fit the template's and are new; the template's own are left alone, and load_state_dict "
            "judges: %s",
            len(lines),
            shortened("; ".join(lines)),
        )


# ------------------------------------------------------------------------------------------- copies

_A_COPY = "the state_dict callback gives a copy, another one each time: what lands in it is nobody's"


def _drop_copies(
    manifest: Manifest,
    template: object,
    state_dict: Callable[[], object],
    targets: Targets,
    copies: Copies,
    report: TransferReport,
) -> set[int]:
    """Give up template tensors that the callback makes anew each time it is called: nobody keeps them.

    Called twice in a row, while the first one's tensors live: so one that lies elsewhere the second time is a copy, but
    for what another thread moves just then. Only once for each transport: a callback may cost much.
    """
    if copies.paths is None:
        copies.paths = _find_copies(manifest, template, state_dict, targets)
        if copies.paths:
            logger.warning(
                "the state_dict callback gives copies of %d leaves, the first is %s: they are received beside, and "
                "reach the model through load_state_dict alone",
                len(copies.paths),
                shortened(min(copies.paths)),
            )
    if not copies.paths:
        return set()
    dropped = {index for index, _ in targets if format_path(manifest.paths[index]) in copies.paths}
    for slot in [slot for slot in targets if slot[0] in dropped]:
        del targets[slot]
    for index in dropped:
        report.not_in_place[format_path(manifest.paths[index])] = _A_COPY
    return dropped


def _find_copies(
    manifest: Manifest, template: object, state_dict: Callable[[], object], targets: Targets
) -> frozenset[str]:
    try:
        again = state_dict()
        if again is template:
            return frozenset()
        unused = TransferReport("destination", "", None)
        second = _compare(manifest, match_template(manifest, again, unused), unused).targets
    except Exception:  # it has given a template once, and that one will do
        return frozenset()
    return frozenset(
        format_path(manifest.paths[slot[0]])
        for slot, tensor in targets.items()
        if slot in second and second[slot].data_ptr() != tensor.data_ptr()
    )


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


class _Compared(NamedTuple):
    """What came of a comparison.

    Attributes:
        targets: The template's tensors that can take their bytes.
        disagreements: Why a leaf disagrees, by index, in order.
        casts: Those of them that differ in nothing but the dtype.
    """

    targets: Targets
    disagreements: dict[int, str]
    casts: set[int]


def compare(manifest: Manifest, matched: dict[int, object], report: TransferReport) -> tuple[Targets, list[str]]:
    """Compare what the source sends with the template, leaf by leaf.

    Returns:
        The tensors that can take their bytes, and what disagrees, one line for each path.
    """
    targets, disagreements, _ = _compare(manifest, matched, report)
    return targets, [f"{format_path(manifest.paths[index])}: {reason}" for index, reason in disagreements.items()]


def _compare(manifest: Manifest, matched: dict[int, object], report: TransferReport) -> _Compared:
    targets: Targets = {}
    disagreements: dict[int, str] = {}
    comparison = _Comparison(manifest, targets, report)
    agreed = comparison.plain_tensors(matched)
    for index, leaf in enumerate(manifest.leaves):
        if index in agreed:
            continue
        if index in matched:
            reason = comparison.leaf(index, leaf, matched[index])
            if reason:
                disagreements[index] = reason
        elif leaf.views and matched:
            report.missing.append(format_path(manifest.paths[index]))
    extents = comparison.extents
    if disagreements:
        # What a part of a leaf has noted before another part disagreed.
        for slot in [slot for slot in targets if slot[0] in disagreements]:
            del targets[slot]
        for index in disagreements:
            report.not_in_place.pop(format_path(manifest.paths[index]), None)
        extents = [extent for extent in extents if extent[2][0] not in disagreements]
        extents += [extent for index in disagreements for extent in _left_alone(matched[index])]
    _drop_conflicts(manifest, targets, extents, report)
    return _Compared(targets, disagreements, comparison.casts)


def _left_alone(mine: object) -> list[tuple[int, int, Slot]]:
    """The memory of a template leaf that nobody may write to."""
    try:
        _, tensors = take_apart(mine)
        return [(tensor.data_ptr(), tensor.data_ptr() + geometry_of(tensor).span, _NOBODYS) for tensor in tensors]
    except Exception:  # a class of its own, or no memory
        return []


# In the place of the slot of what is written to.
_NOBODYS: Slot = (-1, -1)


class _Comparison:
    """Compares leaf by leaf; notes the tensors that can take their bytes.

    Attributes:
        extents: First address and the one behind the last, of each such tensor.
        casts: Leaves that disagree in the dtype of a tensor, and not in its shape.
    """

    def __init__(self, manifest: Manifest, targets: Targets, report: TransferReport) -> None:
        self.extents: list[tuple[int, int, Slot]] = []
        self.casts: set[int] = set()
        self._manifest = manifest
        self._targets = targets
        self._report = report
        self._read_only = ReadOnlyMemory()

    def plain_tensors(self, matched: dict[int, object]) -> set[int]:
        """Note the plain tensors that agree in all, strides too, as most do; gives their leaves.

        The rest is for :meth:`leaf`: a call for each costs more than all that is compared.
        """
        leaves = self._manifest.leaves
        indices = [i for i, mine in matched.items() if type(mine) is torch.Tensor and leaves[i].kind == "tensor"]
        tensors: list[torch.Tensor] = [matched[index] for index in indices]  # type: ignore[misc]
        dtypes = list(map(attrgetter("dtype"), tensors))
        if not tensors or not all(map(attrgetter("is_cpu"), tensors)) or not all_plain(tensors, dtypes, on_cpu=True):
            return set()
        shapes, strides = map(attrgetter("shape"), tensors), map(torch.Tensor.stride, tensors)
        rows = zip(indices, tensors, dtypes, shapes, strides, map(torch.Tensor.data_ptr, tensors), strict=True)
        agreed = set()
        for index, tensor, dtype, shape, stride, address in rows:
            storage, wanted, _ = leaves[index][1][0]
            if storage < 0 or dtype != wanted.dtype or shape != wanted.shape or stride != wanted.stride:
                continue
            if wanted.order is None or wanted.expanded or self._read_only.holds(address):
                continue
            self._targets[index, 0] = tensor
            self.extents.append((address, address + wanted.span, (index, 0)))
            agreed.add(index)
        return agreed

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
        theirs, ours = _compared_parts(part, view), _compared_parts(mine, first)
        if len(theirs) != len(ours):
            return f"expected {len(ours)} local tensors, source has {len(theirs)}"
        for (below, their_view), (my_below, my_first) in zip(theirs, ours, strict=True):
            if below.kind == "numpy":  # whether it can be written to is known of whole leaves alone
                self._keep_away(index, "an array inside of a leaf")
            elif reason := self._part(index, below, their_view, my_below, my_first, tensors):
                return reason
        return ""

    def _tensor(self, slot: Slot, view: View, mine: torch.Tensor) -> str:
        shape = geometry(mine.dtype, mine.shape, mine.stride())
        wanted = view.geometry
        if shape is not wanted and (shape.dtype != wanted.dtype or shape.shape != wanted.shape):
            if shape.shape == wanted.shape:
                self.casts.add(slot[0])
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


def _compared_parts(part: Part, first: int) -> list[tuple[Part, int]]:
    """The inner tensors that two leaves are compared by, and where their plain tensors begin."""
    caches = KINDS[part.kind].caches(part.context) if part.kind in KINDS else ()
    compared = []
    for position, below in enumerate(part.parts):
        if position not in caches:
            compared.append((below, first))
        first += below.num_views
    return compared


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
        if len(cluster) > 1 and (reason := _conflict(manifest, targets, cluster)):
            for _, other in cluster:
                if targets.pop(other, None) is not None:
                    report.not_in_place[format_path(manifest.paths[other[0]])] = reason
        cluster, reached = [(begin, slot)], end


# An address that no tensor has.
_BEHIND = 1 << 64


def _conflict(manifest: Manifest, targets: Targets, cluster: Sequence[tuple[int, Slot]]) -> str:
    """Why targets whose extents overlap cannot all be written to; empty if they can."""
    if any(slot is _NOBODYS for _, slot in cluster):
        return "shares memory in the template with a leaf that does not fit the source's"
    if not _harmless(manifest, targets, cluster):
        return "shares memory in the template in a way that it does not at the source"
    return ""


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
