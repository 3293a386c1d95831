"""Whether what the source sends fits the template, leaf by leaf. Nothing is written.

Strategy: plain tensors, nearly all of a state, are compared in columns; the rest by the parts that their kinds have
made of them. What fits is a *target*; what does not is a disagreement with its reason, all of them, since one who has
to mend a model wants to see them at once. A target that overlaps another one in a way that the source's views do not is
given up: one would overwrite the other.

Not here: where the callback's tree lies in what the source sends, and what becomes of a disagreement
(``_plan.template``).
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from itertools import filterfalse, islice
from operator import add, attrgetter, le
from typing import Any, NamedTuple

import torch

from ft_transport._device import on_host, seam
from ft_transport._plan.blocks import Block, Blocks, held
from ft_transport._plan.buffers import ReadOnlyMemory
from ft_transport._state.describe import Tensors, lies_in
from ft_transport._state.geometry import Geometry, geometry, geometry_of
from ft_transport._state.kinds.base import KINDS, VALUE, Part, flatten_leaf, is_plain
from ft_transport._state.manifest import Leaf, Manifest, View, disjoint
from ft_transport._state.tree import format_path
from ft_transport._telemetry.report import TransferReport

__all__ = ["Compared", "Plain", "Targets", "compare", "compare_all", "compare_plain", "same_strides"]


class Targets:
    """The template's tensors that can take their bytes, each by the number of the view that it takes.

    Attributes:
        numbers: Of the views, in no order.
        blocks: The tensor of each: dense, and held.
        geometries: Of each.
    """

    def __init__(self, numbers: Sequence[int], blocks: Blocks, geometries: list[Geometry]) -> None:
        self.numbers = numbers
        self.blocks = blocks
        self.geometries = geometries
        self._at: dict[int, int] | None = None
        self._overlap: bool | None = None

    @classmethod
    def none(cls) -> Targets:
        """Not one."""
        return cls((), Blocks.of(()), [])

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers)

    def at(self, number: int) -> int | None:
        """The place of a view's target among all, None if it has none."""
        # Of most states each view has one: then the number is the place, and nobody needs a dict of 20,000.
        if isinstance(self.numbers, range):
            return number if number in self.numbers else None
        if self._at is None:
            self._at = {number: at for at, number in enumerate(self.numbers)}
        return self._at.get(number)

    def __contains__(self, number: int) -> bool:
        return self.at(number) is not None

    def __getitem__(self, number: int) -> Block:
        at = self.at(number)
        if at is None:
            raise KeyError(number)
        return self.blocks[at]

    def tensor(self, number: int) -> torch.Tensor | None:
        """The target of a view, None if it has none."""
        at = self.at(number)
        return None if at is None else self.blocks.memory[at]

    def geometry(self, number: int) -> Geometry:
        """Of the target of a view that has one."""
        at = self.at(number)
        assert at is not None
        return self.geometries[at]

    def add(self, numbers: Sequence[int], tensors: Sequence[torch.Tensor], geometries: Sequence[Geometry]) -> None:
        """Some more."""
        if numbers:
            self.numbers = [*self.numbers, *numbers]
            self.blocks.extend(held(list(map(Block, tensors))))
            self.geometries += geometries
            self._at = self._overlap = None

    @property
    def ends(self) -> list[int]:
        """The address behind each."""
        return list(map(add, self.blocks.addresses, map(attrgetter("span"), self.geometries)))

    @property
    def overlap(self) -> bool:
        """Whether the extents of two overlap, as they were when the tensors were noted."""
        if self._overlap is None:
            # As many begins and ends in order: where each end is behind no later begin, no two overlap. Extents that
            # merely touch do not: parameters of one flat buffer lie side by side, and stay in place.
            self._overlap = not all(map(le, sorted(self.ends), islice(sorted(self.blocks.addresses), 1, None)))
        return self._overlap

    def drop(self, numbers: Container[int]) -> None:
        """Give up some."""
        kept = [at for at, number in enumerate(self.numbers) if number not in numbers]
        if len(kept) < len(self.numbers):
            self.numbers = [self.numbers[at] for at in kept]
            self.geometries = [self.geometries[at] for at in kept]
            self.blocks, self._at, self._overlap = self.blocks.part(kept), None, None


class Compared(NamedTuple):
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
    targets, disagreements, _ = compare_all(manifest, matched, report)
    return targets, [f"{format_path(manifest.paths[index])}: {reason}" for index, reason in disagreements.items()]


def compare_all(
    manifest: Manifest, matched: dict[int, object], report: TransferReport, plain: Plain | None = None
) -> Compared:
    """As :func:`compare`.

    Args:
        manifest: What the source sends.
        matched: The template's leaf for each manifest leaf that has one.
        report: Filled with what does not land in place, and why.
        plain: What :func:`compare_plain` gives, if it is known.
    """
    read_only = ReadOnlyMemory()
    # In two passes. The first takes nearly all leaves of nearly all states, in a handful of calls; what it does not
    # take is no worse for it, since the second looks at everything anew.
    targets, agreed = compare_plain(manifest, matched, read_only) if plain is None else plain
    disagreements: dict[int, str] = {}
    comparison = _Comparison(manifest, report, read_only)
    for index in filterfalse(agreed.__contains__, range(len(manifest.leaves))):
        leaf = manifest.leaves[index]
        if index in matched:
            reason = comparison.leaf(index, leaf, matched[index])
            if reason:
                disagreements[index] = reason
        elif leaf.views and matched:
            report.unexpected_keys.append(format_path(manifest.paths[index]))
    if comparison.found:
        targets.add(*zip(*comparison.found, strict=True))
    others: list[Extent] = []
    if disagreements:
        # A leaf lands as a whole or not at all: half of a DTensor from the source and half from here would be a leaf
        # that nobody ever had.
        # What a part of a leaf has noted before another part disagreed.
        firsts = manifest.leaves.firsts
        targets.drop({number for index in disagreements for number in range(firsts[index], firsts[index + 1])})
        for index in disagreements:
            report.not_in_place.pop(format_path(manifest.paths[index]), None)
        others = [extent for index in disagreements for extent in _left_alone(matched[index])]
    _drop_conflicts(manifest, targets, others, report)
    return Compared(targets, disagreements, comparison.casts)


# First address, the one behind the last, and the number of a view.
Extent = tuple[int, int, int]


def _left_alone(mine: object) -> list[Extent]:
    """The memory of a template leaf that nobody may write to."""
    try:
        _, tensors = flatten_leaf(mine)
        return [(tensor.data_ptr(), tensor.data_ptr() + geometry_of(tensor).span, _NOBODYS) for tensor in tensors]
    except Exception:  # a class of its own, or no memory
        return []


# In the place of the number of what is written to.
_NOBODYS = -1


class _Comparison:
    """Compares leaf by leaf.

    Attributes:
        found: The tensors that can take their bytes: the number of the view, the tensor, its geometry.
        casts: Leaves that disagree in the dtype of a tensor, and not in its shape.
    """

    def __init__(
        self,
        manifest: Manifest,
        report: TransferReport,
        read_only: ReadOnlyMemory,
    ) -> None:
        self.found: list[tuple[int, torch.Tensor, Geometry]] = []
        self.casts: set[int] = set()
        self._manifest = manifest
        self._report = report
        self._read_only = read_only

    def leaf(self, index: int, leaf: Leaf, mine: Any) -> str:
        """Why a leaf disagrees with the template's, empty if it does not."""
        # Exact classes: a subclass may keep its bytes anywhere, and show others.
        if leaf.kind == "tensor" and type(mine) in (torch.Tensor, torch.nn.Parameter) and is_plain(mine):
            return self._tensor(index, 0, leaf.views[0], mine)
        try:
            part, tensors = flatten_leaf(mine)
        # The template has what cannot travel, and the source has something. That is no disagreement of the source's: it
        # arrives beside, and the report says why.
        except ValueError as exc:
            self._keep_away(index, str(exc))
            return ""
        # Kinds of which nothing may be written are compared by their context alone: a sparse tensor of the same shape
        # may hold more values, and fits all the same.
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
            # A lazy conjugate holds the bytes of its negative imaginary part. Bytes that land there are right, and what
            # they show is not.
            if _laziness(part) != _laziness(mine):
                self._keep_away(index, "a lazy conjugate or negative on one side only")
                return ""
            return self._tensor(index, view, self._manifest.leaves[index].views[view], tensors[first])
        theirs, ours = _compared_parts(part, view), _compared_parts(mine, first)
        if len(theirs) != len(ours):
            return f"expected {len(ours)} local tensors, source has {len(theirs)}"
        for (below, their_view), (my_below, my_first) in zip(theirs, ours, strict=True):
            if below.kind in KINDS and (obstacle := KINDS[below.kind].not_in_place_inside):
                self._keep_away(index, obstacle)
            elif reason := self._part(index, below, their_view, my_below, my_first, tensors):
                return reason
        return ""

    def _tensor(self, index: int, position: int, view: View, mine: torch.Tensor) -> str:
        shape = geometry(mine.dtype, mine.shape, mine.stride())
        wanted = view.geometry
        if shape is not wanted and (shape.dtype != wanted.dtype or shape.shape != wanted.shape):
            # ``load_state_dict`` copies a dtype into another one without a word, so this is the one disagreement that
            # no error of torch's would show.
            if shape.shape == wanted.shape:
                self.casts.add(index)
            return f"expected {shape}, source has {wanted}"
        # An empty tensor agrees, and there is nothing to land.
        if view.storage < 0:
            return ""
        if obstacle := self._obstacle(mine, shape):
            self._keep_away(index, obstacle)
        else:
            self.found.append((self._manifest.leaves.firsts[index] + position, mine, shape))
        return ""

    def _obstacle(self, mine: torch.Tensor, shape: Geometry) -> str:
        """Why nothing may be written to a tensor of the template; empty if it may be."""
        if shape.order is None or shape.expanded:
            return "the template's tensor overlaps itself"
        address = mine.data_ptr()
        if not (address and lies_in(shape, int(mine.storage_offset()), mine.untyped_storage().nbytes())):
            return "the template's tensor has no memory"
        if seam().on_host(mine) and self._read_only.holds(address):
            return "the template's tensor lies in read-only memory"
        return ""

    def _keep_away(self, index: int, reason: str) -> None:
        self._report.not_in_place[format_path(self._manifest.paths[index])] = reason


class Plain(NamedTuple):
    """The plain tensors of a template that can take their bytes, as most do.

    Attributes:
        targets: Each, in the order of the leaves.
        leaves: Of each, by index.
    """

    targets: Targets
    leaves: set[int]


def compare_plain(
    manifest: Manifest, matched: dict[int, object], read_only: ReadOnlyMemory, known: Tensors | None = None
) -> Plain:
    """Compare the plain tensors, all at once; what is not among the result needs a closer look.

    A call for each costs more than all that is compared.

    Args:
        manifest: What the source sends.
        matched: The template's leaf for each manifest leaf that has one.
        read_only: Which memory is.
        known: What torch knows of the template's tensors, if it was asked before, and there are no others behind its
            leaves.
    """
    leaves = manifest.leaves
    indices: Sequence[int] = leaves.plain
    if known is None or len(known.tensors) != len(indices):
        unlike = {index for index, leaf in leaves.others.items() if leaf.kind != "tensor"}
        indices = [index for index, mine in matched.items() if type(mine) is torch.Tensor and index not in unlike]
    mine = known
    if mine is None:
        tensors: list[torch.Tensor] = list(map(matched.__getitem__, indices))  # type: ignore[arg-type]
        mine = Tensors.of_plain(tensors) if on_host(tensors) else None
    # On an accelerator ``data_ptr`` is no address that a page table of ours knows, so read-only memory is not looked
    # for; those leaves take the other way.
    if mine is None or not mine.on_cpu:
        return Plain(Targets.none(), set())
    numbers: Sequence[int] = range(len(leaves.views))
    wanted = manifest.views.geometries
    # Where as many leaves are compared as there are views, each is one view, and all are.
    if len(indices) < len(wanted) or (known is None and indices != sorted(indices)):
        numbers = list(map(leaves.firsts.__getitem__, indices))
        wanted = list(map(wanted.__getitem__, numbers))
    # Of 20,000 tensors there are a few dozen pairs of what is wanted and what is there, mostly the same.
    there = mine.geometries
    pairs = {(shape, shape) for shape in {*there}} if wanted == there else {*zip(wanted, there, strict=True)}
    misfitting = {pair for pair in pairs if not _can_land(*pair)}
    misfits = (
        {at for at, pair in enumerate(zip(wanted, there, strict=True)) if pair in misfitting} if misfitting else set()
    )
    misfits.update(read_only.among(mine.addresses))
    misfits.update(mine.without_memory)
    homes = list(mine.alive), list(mine.bases), list(mine.capacities), list(mine.addresses)
    blocks = Blocks(list(mine.tensors), *homes, on_host=True)
    targets = Targets(numbers, blocks, list(mine.geometries))
    if misfits:
        targets.drop({numbers[at] for at in misfits})
        indices = [index for at, index in enumerate(indices) if at not in misfits]
    return Plain(targets, {*indices})


def _can_land(wanted: Geometry, mine: Geometry) -> bool:
    """Whether a template's tensor agrees, and bytes may be written there."""
    if (wanted.dtype, wanted.shape) != (mine.dtype, mine.shape):
        return False
    # A tensor that overlaps itself (``expand``, ``as_strided``) is read as often as one likes, but written in an order
    # that nobody promises. An empty one has nothing to land.
    return mine.numel > 0 and mine.order is not None and not mine.expanded


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
        if part.kind in KINDS and KINDS[part.kind].is_lazy:
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


def same_strides(view: View, stride: tuple[int, ...]) -> bool:
    """Whether a tensor of the view's shape, and of these strides, has its elements in the same places."""
    shape = view.geometry
    # A dimension of size one has a stride that is never stepped: torch makes it up, and not always alike (a Linear of
    # one output and its transpose).
    return shape.stride == stride or all(
        size == 1 or a == b for size, a, b in zip(shape.shape, shape.stride, stride, strict=True)
    )


def _drop_conflicts(manifest: Manifest, targets: Targets, others: list[Extent], report: TransferReport) -> None:
    """Give up template tensors that share memory in a way the source's do not: one would overwrite the other.

    Args:
        others: Memory that nobody may write to.
    """
    if not others and not targets.overlap:
        return  # as in nearly every template
    # A sweep over begins, as in any interval problem.
    extents = sorted([*zip(targets.blocks.addresses, targets.ends, targets.numbers, strict=True), *others])
    cluster: list[tuple[int, int]] = []
    given_up: dict[int, str] = {}
    reached = 0
    for begin, end, number in [*extents, (_BEHIND, _BEHIND, 0)]:
        if begin < reached:
            cluster.append((begin, number))
            reached = max(reached, end)
            continue
        if len(cluster) > 1 and (reason := _conflict(manifest, targets, cluster)):
            given_up |= {other: reason for _, other in cluster if other in targets}
        cluster, reached = [(begin, number)], end
    targets.drop(given_up)
    for number, reason in given_up.items():
        report.not_in_place[format_path(manifest.paths[manifest.leaves.owners[number]])] = reason


# An address that no tensor has.
_BEHIND = 1 << 64


def _conflict(manifest: Manifest, targets: Targets, cluster: Sequence[tuple[int, int]]) -> str:
    """Why targets whose extents overlap cannot all be written to; empty if they can."""
    if any(number == _NOBODYS for _, number in cluster):
        return "shares memory in the template with a leaf that does not fit the source's"
    if not _harmless(manifest, targets, cluster):
        return "shares memory in the template in a way that it does not at the source"
    return ""


def _shared_alike(manifest: Manifest, targets: Targets, cluster: Sequence[tuple[int, int]]) -> bool:
    """Whether targets that overlap do so, element by element, as their views at the source do."""
    views = [manifest.views[number] for _, number in cluster]
    # Tied weights, rows of one matrix, a flat buffer: the template's tensors overlap, and the source's do in the very
    # same way, so each byte is written with the value that all who see it have.
    # Which storage at the source, and how far the place there is from the one here.
    if len({(view.storage, begin - view.begin) for (begin, _), view in zip(cluster, views, strict=True)}) > 1:
        return False
    shapes = [targets.geometry(number) for _, number in cluster]
    if all(same_strides(view, shape.stride) for view, shape in zip(views, shapes, strict=True)):
        return True
    # One and the same tensor several times, on both sides.
    mine = {(begin, targets.geometry(number)) for begin, number in cluster}
    return len(set(views)) == len(mine) == 1


def _harmless(manifest: Manifest, targets: Targets, cluster: Sequence[tuple[int, int]]) -> bool:
    """Whether targets whose extents overlap can all be written to."""
    if _shared_alike(manifest, targets, cluster):
        return True
    # Columns of one matrix: what is not the same tensor has no element in common.
    same: dict[View, list[tuple[int, int]]] = {}
    for begin, number in cluster:
        shape = targets.geometry(number)
        # Elements of two views that begin at different parts of an element overlap by halves; ``disjoint`` counts in
        # whole ones.
        if begin % shape.itemsize != cluster[0][0] % shape.itemsize:
            return False
        same.setdefault(View(0, shape, begin // shape.itemsize), []).append((begin, number))
    return all(_shared_alike(manifest, targets, group) for group in same.values()) and disjoint(list(same))
