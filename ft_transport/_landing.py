"""Where each byte range lands: in place, fresh, or staged through a bucket and copied.

Strategy: everything is decided before the first payload byte. A range lands directly in the template's memory
where shape, dtype, strides and device agree; where only strides or device differ it goes through a bucket. What
the template lacks, or cannot take without harm to a neighbour, lands in fresh memory. Disagreements are
collected, all of them, and nothing is touched if there is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ft_transport._layout import Layout, Piece
from ft_transport._leaves import KINDS, dtype_name, kind_of, meshes_of
from ft_transport._manifest import Leaf, Manifest, View, extent, is_dense, memory_order, merge, rebuild, storage_as
from ft_transport._memory import allocate, copy_bytes, populate
from ft_transport._tree import Path, flatten, format_path
from ft_transport.errors import RemoteProtocolError
from ft_transport.report import TransferReport

__all__ = ["Landing", "match_template"]

_Slot = tuple[int, int]  # leaf, position among its views


class _Target(NamedTuple):
    """Where one range lands: flat uint8 memory, or strided elements that are its bytes in order."""

    memory: torch.Tensor
    in_place: bool


class Landing:
    """The plan for one receive, and the building of its result.

    Args:
        manifest: What the source described.
        layout: Its messages.
        template: The leaves to land in by index of the manifest's leaf, from :func:`match_template`.
        device: Device of the wire's messages; fresh leaves that were on an accelerator live there too.
        report: Filled with what lands where.
        fresh_on_cpu: Allocate every fresh leaf on the CPU.

    Attributes:
        disagreements: Why the template cannot take this state, one line for each path; nothing may move
            while there is one.
    """

    def __init__(
        self,
        manifest: Manifest,
        layout: Layout,
        template: dict[int, object],
        device: torch.device,
        report: TransferReport,
        *,
        fresh_on_cpu: bool = False,
    ) -> None:
        self._fresh_on_cpu = fresh_on_cpu
        self._manifest = manifest
        self._layout = layout
        self._template = template
        self._device = device
        self._report = report
        self.disagreements: list[str] = []
        self._targets: dict[_Slot, torch.Tensor] = {}
        self._landed: list[_Target] = []
        self._values: dict[_Slot, torch.Tensor] = {}
        self._copies: list[tuple[torch.Tensor, _Slot]] = []
        self._in_place_slots: set[_Slot] = set()
        for index, leaf in enumerate(manifest.leaves):
            self._compare(index, leaf)

    # ------------------------------------------------------------------------------------- compare

    def _compare(self, index: int, leaf: Leaf) -> None:
        """Check one leaf against the template and note the tensors it can land in."""
        path = format_path(self._manifest.paths[index])
        if index not in self._template:
            if leaf.views and self._template:
                self._report.missing.append(path)
            return
        mine = self._template[index]
        try:
            kind = kind_of(mine)
            name = "value" if kind is None else kind.name
            if name != leaf.kind:
                self.disagreements.append(f"{path}: expected {_describe(mine)}, source has {_describe_leaf(leaf)}")
                return
            if kind is None:
                return
            inner = kind.inner(mine)
        except ValueError as exc:
            self._report.not_in_place[path] = str(exc)
            return
        reason = KINDS[leaf.kind].disagreement(leaf.context, mine) or _shapes_differ(leaf, inner)
        if reason:
            self.disagreements.append(f"{path}: {reason}")
            return
        for position, tensor in enumerate(inner):
            if obstacle := _obstacle(tensor, mine):
                self._report.not_in_place[path] = obstacle
            elif leaf.views[position].storage >= 0:
                self._targets[index, position] = tensor

    # ---------------------------------------------------------------------------------------- plan

    def plan(self) -> None:
        """Decide where every range lands, and allocate what is fresh.

        Raises:
            MemoryError: There is no room for the fresh leaves.
        """
        self._drop_conflicts()
        members: dict[tuple[int, int], list[tuple[_Slot, View]]] = {}
        ranges = self._layout.ranges
        for index, leaf in enumerate(self._manifest.leaves):
            for position, view in enumerate(leaf.views):
                if view.storage >= 0:
                    home = ranges[self._layout.range_of(view.storage, extent(view)[0])]
                    members.setdefault((home.storage, home.begin), []).append(((index, position), view))
        fresh: dict[int, torch.Tensor] = {}
        for piece in ranges:
            group = members.get((piece.storage, piece.begin), [])
            target = self._in_place(piece, group) or self._fresh(piece, group, fresh)
            self._landed.append(target)
            if target.in_place:
                self._report.nbytes_in_place += piece.end - piece.begin
            else:
                self._report.nbytes_fresh += piece.end - piece.begin

    def _drop_conflicts(self) -> None:
        """Give up template tensors that share memory in a way the source's do not."""
        places: dict[tuple[torch.device, int], list[tuple[int, int, _Slot]]] = {}
        for slot, tensor in self._targets.items():
            begin, end = _extent_of(tensor)
            places.setdefault((tensor.device, _base(tensor)), []).append((begin, end, slot))
        for found in places.values():
            if len(found) == 1:
                continue
            for begin, end in merge((low, high) for low, high, _ in found):
                cluster = [slot for low, _, slot in found if begin <= low < end]
                if len({self._relation(slot) for slot in cluster}) > 1:
                    for slot in cluster:
                        del self._targets[slot]
                        path = format_path(self._manifest.paths[slot[0]])
                        self._report.not_in_place[path] = "shares memory in the template, but not in the source"

    def _relation(self, slot: _Slot) -> tuple[int, int]:
        """Which storage of the source the slot is a view of, and how far its place there is from its target's."""
        view = self._manifest.leaves[slot[0]].views[slot[1]]
        return view.storage, _extent_of(self._targets[slot])[0] - extent(view)[0]

    def _in_place(self, piece: Piece, group: Sequence[tuple[_Slot, View]]) -> _Target | None:
        """The template's own memory for a range, if its views have one that can hold all of it."""
        exact: dict[tuple[int, int], list[tuple[_Slot, View]]] = {}
        for slot, view in group:
            tensor = self._targets.get(slot)
            if tensor is not None and tensor.device.type == self._device.type and _same_strides(view, tensor):
                exact.setdefault((_base(tensor), self._relation(slot)[1]), []).append((slot, view))
        for (_, shift), matching in exact.items():
            # Bytes in a view's gaps are its neighbours': only views without gaps may take the range as it is.
            if _cover([extent(v) for _, v in matching if is_dense(v.shape, v.stride)], piece):
                tensor = self._targets[matching[0][0]]
                flat = storage_as(tensor.detach(), torch.uint8)
                self._settle(group, {slot for slot, _ in matching}, flat, shift)
                return _Target(flat[piece.begin + shift : piece.end + shift], True)
        return self._in_place_strided(piece, group)

    def _in_place_strided(self, piece: Piece, group: Sequence[tuple[_Slot, View]]) -> _Target | None:
        """A template tensor whose strides or device differ, to be written through a bucket."""
        if not all(slot in self._targets for slot, _ in group):
            return None
        for slot, view in group:
            if extent(view) == (piece.begin, piece.end) and is_dense(view.shape, view.stride):
                tensor = self._targets[slot].detach()
                dims = memory_order(view.shape, view.stride)
                assert dims is not None
                memory = tensor.as_strided(
                    [tensor.shape[dim] for dim in dims],
                    [tensor.stride(dim) for dim in dims],
                    tensor.storage_offset(),
                )
                self._values[slot] = self._targets[slot]
                self._in_place_slots.add(slot)
                for other, _ in group:
                    if other != slot:
                        self._copies.append((self._targets[other], slot))
                        self._in_place_slots.add(other)
                return _Target(memory, True)
        return None

    def _fresh(
        self, piece: Piece, group: Sequence[tuple[_Slot, View]], fresh: dict[int, torch.Tensor]
    ) -> _Target:
        storage = self._manifest.storages[piece.storage]
        if piece.storage not in fresh:
            on_cpu = self._fresh_on_cpu or storage.device_type == "cpu"
            fresh[piece.storage] = allocate(storage.nbytes, torch.device("cpu") if on_cpu else self._device)
        flat = fresh[piece.storage]
        self._settle(group, set(), flat, 0)
        return _Target(flat[piece.begin : piece.end], False)

    def _settle(
        self, group: Sequence[tuple[_Slot, View]], direct: set[_Slot], flat: torch.Tensor, shift: int
    ) -> None:
        """Note what each view of a range becomes, once the range lies in ``flat`` moved by ``shift`` bytes."""
        for slot, view in group:
            target = self._targets.get(slot)
            if slot in direct:
                assert target is not None
                self._values[slot] = target
                self._in_place_slots.add(slot)
                continue
            self._values[slot] = _view_of(flat, view, shift)
            if target is not None and not (direct and _overlaps(target, flat, view, shift)):
                self._copies.append((target, slot))
                self._in_place_slots.add(slot)

    # ---------------------------------------------------------------------------------------- move

    def direct(self, message: int) -> torch.Tensor | None:
        """The memory that a message can be received into as it is, None if it must be staged."""
        pieces = self._layout.messages[message]
        if len(pieces) > 1:
            return None
        target, begin, nbytes = self._locate(pieces[0])
        memory = target.memory
        if memory.dtype != torch.uint8 or memory.dim() != 1 or not memory.is_contiguous():
            return None
        if memory.device.type != self._device.type:
            return None
        part = memory[begin : begin + nbytes]
        if not target.in_place:
            populate(part)
        return part

    def scatter(self, message: int, staged: torch.Tensor) -> None:
        """Copy a staged message to where its pieces belong."""
        pieces = self._layout.messages[message]
        sources = staged.split([piece.end - piece.begin for piece in pieces])
        flat_sources: list[torch.Tensor] = []
        flat_targets: list[torch.Tensor] = []
        for piece, source in zip(pieces, sources, strict=True):
            target, begin, nbytes = self._locate(piece)
            if target.memory.dtype == torch.uint8 and target.memory.dim() == 1:
                flat_sources.append(source)
                flat_targets.append(target.memory[begin : begin + nbytes])
            else:
                copy_bytes(target.memory, begin, source, to_flat=False)
        if flat_sources:
            torch._foreach_copy_(flat_targets, flat_sources)

    def _locate(self, piece: Piece) -> tuple[_Target, int, int]:
        index = self._layout.range_of(piece.storage, piece.begin)
        return self._landed[index], piece.begin - self._layout.ranges[index].begin, piece.end - piece.begin

    # ------------------------------------------------------------------------------------- rebuild

    def touches_template(self) -> bool:
        """Whether any byte lands in the template's memory while the messages move."""
        return any(target.in_place for target in self._landed)

    def rebuild(self) -> object:
        """The received state dict. Call it once, after every message has landed and been verified."""
        for target, slot in self._copies:
            target.detach().copy_(self._values[slot].detach())
        for slot in self._in_place_slots:
            tensor = self._targets[slot]
            if not tensor.is_inference():
                # The bytes changed behind autograd's back: a graph that saved them must not use the mix.
                torch.autograd.graph.increment_version(tensor)
        meshes = meshes_of(list(self._template.values()))
        return self._manifest.build(
            [self._leaf(index, leaf, meshes) for index, leaf in enumerate(self._manifest.leaves)]
        )

    def _leaf(self, index: int, leaf: Leaf, meshes: Any) -> object:
        slots = [(index, position) for position in range(len(leaf.views))]
        filled = [s for s, view in zip(slots, leaf.views, strict=True) if view.storage >= 0]
        if index in self._template and leaf.views and all(slot in self._in_place_slots for slot in filled):
            return self._template[index]
        tensors = [
            self._values[slot] if view.storage >= 0 else self._empty(view)
            for slot, view in zip(slots, leaf.views, strict=True)
        ]
        return rebuild(leaf, tensors, meshes)

    def _empty(self, view: View) -> torch.Tensor:
        return torch.empty_strided(view.shape, view.stride, dtype=view.dtype)


# -------------------------------------------------------------------------------------------- helpers


def _cover(extents: Sequence[tuple[int, int]], piece: Piece) -> bool:
    """Whether the extents, which lie inside the range, leave none of it out."""
    reached = piece.begin
    for begin, end in sorted(extents):
        if begin > reached:
            return False
        reached = max(reached, end)
    return reached == piece.end


def _shapes_differ(leaf: Leaf, inner: Sequence[torch.Tensor]) -> str:
    if len(inner) != len(leaf.views):
        return f"expected {len(inner)} local tensors, source has {len(leaf.views)}"
    for view, tensor in zip(leaf.views, inner, strict=True):
        if view.dtype != tensor.dtype or view.shape != tuple(tensor.shape):
            return f"expected {_dtype_shape(tensor)}, source has {_dtype_shape(view)}"
    return ""


def _dtype_shape(tensor: torch.Tensor | View) -> str:
    return f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)}"


def _describe(mine: object) -> str:
    kind = kind_of(mine)
    if kind is None:
        return f"a plain {type(mine).__name__}"
    return f"{type(mine).__name__} " + ", ".join(_dtype_shape(tensor) for tensor in kind.inner(mine))


def _describe_leaf(leaf: Leaf) -> str:
    if leaf.kind == "value":
        return f"a plain {type(leaf.context).__name__}"
    return f"{leaf.kind} " + ", ".join(map(_dtype_shape, leaf.views))


def _obstacle(tensor: torch.Tensor, mine: Any) -> str:
    """Why bytes must not be written into a template tensor, empty if they may."""
    if isinstance(mine, torch.Tensor) and type(mine) in (torch.Tensor, torch.nn.Parameter):
        if mine.is_conj() or mine.is_neg():
            return "the template's tensor is a lazy conjugate or negative"
    if 0 in tensor.shape:
        return ""
    if memory_order(tensor.shape, tensor.stride()) is None or any(
        size > 1 and step == 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    ):
        return "the template's tensor overlaps itself"
    return ""


def _same_strides(view: View, tensor: torch.Tensor) -> bool:
    return all(
        size == 1 or a == b for size, a, b in zip(view.shape, view.stride, tensor.stride(), strict=True)
    )


def _base(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _extent_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Byte range in the tensor's own storage."""
    return extent(View(0, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())))


def _view_of(flat: torch.Tensor, view: View, shift: int) -> torch.Tensor:
    tensor = torch.empty(0, dtype=view.dtype, device=flat.device)
    offset = view.offset + shift // view.dtype.itemsize
    return tensor.set_(flat.untyped_storage(), offset, view.shape, view.stride)  # type: ignore[call-overload, no-any-return]


def _overlaps(target: torch.Tensor, flat: torch.Tensor, view: View, shift: int) -> bool:
    """Whether the target is the very memory that the view is in after landing."""
    begin, _ = extent(view)
    return _base(target) == _base(flat) and _extent_of(target)[0] == begin + shift


# ------------------------------------------------------------------------------------------- template


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
    index_of = {path: index for index, path in enumerate(manifest.paths)}
    _, paths, leaves = flatten(template)
    scored = [
        (_score(manifest, index_of, prefix, paths, leaves), prefix) for prefix in _prefixes(manifest.paths)
    ]
    best, prefix = max(scored, key=lambda entry: entry[0])
    has_tensors = any(leaf.views for leaf in manifest.leaves)
    if has_tensors and best == (0, 0):
        raise RemoteProtocolError(
            f"the state_dict callback matches nothing in what the source sends: the callback has "
            f"{_some(paths)}, the source sends {_some(manifest.paths)}",
            phase="agree",
        )
    rivals = [format_path(other) for score, other in scored if score == best]
    if has_tensors and len(rivals) > 1:
        raise RemoteProtocolError(
            f"the state_dict callback fits at {' and '.join(rivals)} alike; return a dict by registered key",
            phase="agree",
        )
    matched = {}
    for path, leaf in zip(paths, leaves, strict=True):
        index = index_of.get(prefix + path)
        if index is None:
            report.unused.append(format_path(prefix + path))
        else:
            matched[index] = leaf
    return matched


def _prefixes(paths: Sequence[Path]) -> Iterator[Path]:
    yield ()
    if {path[0] for path in paths if path} >= {"user", "torchft"}:
        yield ("user",)
        yield from dict.fromkeys(path[:2] for path in paths if len(path) >= 2 and path[0] == "user")


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
            agreeing += len(views) == 1 and views[0].shape == tuple(leaf.shape)
    return places, agreeing


def _some(paths: Sequence[Path]) -> str:
    names = [format_path(path) for path in paths[:3]]
    return ", ".join(names) + (f", … ({len(paths)} leaves)" if len(paths) > 3 else "") if names else "no leaves"
