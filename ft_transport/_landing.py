"""Where each byte range lands: in place, fresh, or staged through a bucket and copied.

Strategy: everything is decided before the first payload byte. A range lands directly in the template's memory where
strides and device agree as well; where only these differ it goes through a bucket. What the template lacks, or
cannot take without harm to a neighbour, lands in fresh memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ft_transport._layout import Layout, Piece
from ft_transport._leaves import KINDS, Meshes, meshes_of
from ft_transport._manifest import Leaf, Manifest, View, rebuild
from ft_transport._memory import Arena, Block, allocate, copy_blocks, physical_bytes, storage_as
from ft_transport._template import Slot, Targets, same_strides
from ft_transport._tree import format_path
from ft_transport.errors import RemoteProtocolError
from ft_transport.report import TransferReport

__all__ = ["Landing", "mark_changed"]

_Member = tuple[Slot, View]


class Landing:
    """The plan for one receive, and the building of its result. Making one allocates what is fresh.

    Args:
        manifest: What the source described.
        layout: Its messages.
        matched: The template's leaf for each manifest leaf that has one.
        targets: The template's tensors that can take their bytes.
        device: Device of the wire's messages; fresh leaves that were on an accelerator live there too.
        report: Filled with what lands where.
        fresh_on_cpu: Allocate every fresh leaf on the CPU.

    Attributes:
        in_place: Whether any byte lands in the template's memory while messages move.

    Raises:
        MemoryError: There is no room for the fresh leaves.
        RemoteProtocolError: A leaf cannot be rebuilt from what the source described.
    """

    def __init__(
        self,
        manifest: Manifest,
        layout: Layout,
        matched: dict[int, object],
        targets: Targets,
        device: torch.device,
        report: TransferReport,
        *,
        fresh_on_cpu: bool = False,
    ) -> None:
        self.in_place = False
        self._manifest = manifest
        self._layout = layout
        self._matched = matched
        self._targets = targets
        self._device = device
        self._fresh_on_cpu = fresh_on_cpu
        self._arena = Arena()
        self._fresh_storages: dict[int, torch.Tensor] = {}
        self._fresh_bytes = 0
        # For each range the memory it lands in.
        self._blocks: list[Block] = []
        # What each view becomes, which template tensors hold their value in the end, and copies still to be made.
        self._values: dict[Slot, torch.Tensor] = {}
        self._settled: set[Slot] = set()
        self._copies: list[tuple[Slot, Slot]] = []
        self._plan(report)

    # ---------------------------------------------------------------------------------------- plan

    def _plan(self, report: TransferReport) -> None:
        ranges = self._layout.ranges
        members: list[list[_Member]] = [[] for _ in ranges]
        for index, leaf in enumerate(self._manifest.leaves):
            for position, view in enumerate(leaf.views):
                if view.storage >= 0:
                    members[self._layout.range_of(view.storage, view.begin)].append(((index, position), view))
        for piece, group in zip(ranges, members, strict=True):
            block = self._in_place(piece, group) if self._targets else None
            if block is None:
                block = self._fresh(piece, group)
                report.nbytes_fresh += piece.end - piece.begin
            else:
                report.nbytes_in_place += piece.end - piece.begin
            self._blocks.append(block)
        self.in_place = report.nbytes_in_place > 0
        self._try_rebuild()

    def _try_rebuild(self) -> None:
        """Find what cannot be rebuilt before a byte lands."""
        meshes = meshes_of(list(self._matched.values()))
        for index, leaf in enumerate(self._manifest.leaves):
            if leaf.kind == "value" or not KINDS[leaf.kind].is_tried or (index, 0) in self._targets:
                continue
            try:
                self._leaf(index, leaf, meshes)
            except Exception as exc:
                path = format_path(self._manifest.paths[index])
                raise RemoteProtocolError(f"{path}: it cannot be rebuilt: {str(exc)[:1000]}") from exc

    def _in_place(self, piece: Piece, group: Sequence[_Member]) -> Block | None:
        """The template's own memory for a range, if its views have one that can hold all of it."""
        exact: dict[tuple[int, int], list[_Member]] = {}
        for slot, view in group:
            tensor = self._targets.get(slot)
            if tensor is not None and tensor.device.type == self._device.type and same_strides(view, tensor):
                if len(group) == 1 and view.geometry.dense:
                    self._settle_in_place(slot)
                    return Block(tensor)
                shift = int(tensor.storage_offset()) * view.geometry.itemsize - view.begin
                exact.setdefault((tensor.untyped_storage()._cdata, shift), []).append((slot, view))
        for (_, shift), matching in exact.items():
            # Bytes in a view's gaps are its neighbours': only views without gaps may take the range as it is.
            if _cover([view for _, view in matching if view.geometry.dense], piece):
                flat = storage_as(self._targets[matching[0][0]], torch.uint8)
                self._settle(group, {slot for slot, _ in matching}, flat, shift)
                return Block(flat[piece.begin + shift : piece.end + shift])
        return self._in_place_strided(piece, group)

    def _in_place_strided(self, piece: Piece, group: Sequence[_Member]) -> Block | None:
        """A template tensor whose strides or device differ, to be written through a bucket."""
        # Views that are not all the same could not be copied from one target to the other.
        if not all(slot in self._targets and view == group[0][1] for slot, view in group):
            return None
        for slot, view in group:
            if (view.begin, view.end) == (piece.begin, piece.end) and view.geometry.dense:
                tensor, order = self._targets[slot], view.geometry.order
                assert order is not None
                self._settle_in_place(slot)
                self._copies += [(other, slot) for other, _ in group if other != slot]
                shape, stride = [tensor.shape[dim] for dim in order], [tensor.stride(dim) for dim in order]
                return Block(_quiet(tensor).as_strided(shape, stride, tensor.storage_offset()), dense=False)
        return None

    def _settle_in_place(self, slot: Slot) -> None:
        self._values[slot] = self._targets[slot]
        self._settled.add(slot)

    def _fresh(self, piece: Piece, group: Sequence[_Member]) -> Block:
        storage = self._manifest.storages[piece.storage]
        if piece.storage not in self._fresh_storages:
            on_cpu = self._fresh_on_cpu or "cpu" in (storage.device_type, self._device.type)
            self._fresh_bytes += storage.nbytes if on_cpu else 0
            if self._fresh_bytes > physical_bytes():
                raise MemoryError(f"{self._fresh_bytes} bytes of fresh storages are more than this machine has")
            self._fresh_storages[piece.storage] = (
                self._arena.allocate(storage.nbytes) if on_cpu else allocate(storage.nbytes, self._device)
            )
        flat = self._fresh_storages[piece.storage]
        self._settle(group, set(), flat, 0)
        whole = piece.begin == 0 and piece.end == storage.nbytes
        return Block(flat if whole else flat[piece.begin : piece.end])

    def _settle(self, group: Sequence[_Member], direct: set[Slot], flat: torch.Tensor, shift: int) -> None:
        """Note what each view of a range becomes, once the range lies in ``flat`` moved by ``shift`` bytes."""
        for slot, view in group:
            if slot in direct:
                self._settle_in_place(slot)
                continue
            self._values[slot] = _view_of(flat, view, shift)
            if slot in self._targets:
                self._copies.append((slot, slot))

    # ---------------------------------------------------------------------------------------- move

    def direct(self, message: int) -> torch.Tensor | None:
        """The memory that a message can be received into as it is, None if it must be staged."""
        pieces = self._layout.messages[message]
        # Small ones are staged for the reason that the source has, see ``_source.Gatherer``.
        if len(pieces) > 1 or self._layout.sizes[message] < self._layout.stage_below:
            return None
        block, begin, nbytes = self._locate(pieces[0])
        if not block.dense or block.memory.device.type != self._device.type:
            return None
        return block.bytes(begin, begin + nbytes)

    def scatter(self, message: int, staged: torch.Tensor) -> None:
        """Copy a staged message to where its pieces belong."""
        copy_blocks([self._locate(piece) for piece in self._layout.messages[message]], staged, gather=False)

    def _locate(self, piece: Piece) -> tuple[Block, int, int]:
        index = self._layout.range_of(piece.storage, piece.begin)
        return self._blocks[index], piece.begin - self._layout.ranges[index].begin, piece.end - piece.begin

    # ------------------------------------------------------------------------------------- rebuild

    def rebuild(self) -> object:
        """The received state dict. Call it once, after every message has landed and been verified."""
        for target, slot in self._copies:
            _quiet(self._targets[target]).copy_(_quiet(self._values[slot]))
            self._settled.add(target)
        meshes = meshes_of(list(self._matched.values()))
        return self._manifest.build(
            [
                leaf.context if leaf.kind == "value" else self._leaf(index, leaf, meshes)
                for index, leaf in enumerate(self._manifest.leaves)
            ]
        )

    def _leaf(self, index: int, leaf: Leaf, meshes: Meshes) -> object:
        slots = [(index, position) for position in range(len(leaf.views))]
        if index in self._matched and all(
            view.storage < 0 or slot in self._settled for slot, view in zip(slots, leaf.views, strict=True)
        ):
            return self._matched[index]
        tensors = [
            self._values[slot] if view.storage >= 0 else _empty(view)
            for slot, view in zip(slots, leaf.views, strict=True)
        ]
        return rebuild(leaf, tensors, meshes)

    @property
    def copies(self) -> bool:
        """Whether :meth:`rebuild` writes to the template."""
        return bool(self._copies)

    def written(self) -> list[torch.Tensor]:
        """The template's tensors that hold a new value."""
        return [self._targets[slot] for slot in self._settled]


def mark_changed(tensors: Sequence[torch.Tensor]) -> None:
    """Tell autograd that these tensors changed: a graph that saved them must not use the mix of old and new."""
    for tensor in tensors:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def _quiet(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with a version counter of its own, unlike ``detach()``: see :func:`mark_changed`."""
    return tensor.data


def _cover(views: Sequence[View], piece: Piece) -> bool:
    """Whether the views, which lie inside the range, leave none of it out."""
    reached = piece.begin
    for begin, end in sorted((view.begin, view.end) for view in views):
        if begin > reached:
            return False
        reached = max(reached, end)
    return reached == piece.end


def _view_of(flat: torch.Tensor, view: View, shift: int) -> torch.Tensor:
    shape = view.geometry
    tensor = torch.empty(0, dtype=shape.dtype, device=flat.device)
    return tensor.set_(flat.untyped_storage(), view.offset + shift // shape.itemsize, shape.shape, shape.stride)


def _empty(view: View) -> torch.Tensor:
    shape = view.geometry
    return torch.empty_strided(shape.shape, shape.stride, dtype=shape.dtype)
