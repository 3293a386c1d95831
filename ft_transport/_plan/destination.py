"""Where each byte range lands: in place, fresh, or staged through a bucket and copied.

Strategy: everything is decided before the first payload byte. A range lands directly in the template's memory where
strides and device agree as well; where only these differ it goes through a bucket. What the template lacks, or
cannot take without harm to a neighbour, lands in fresh memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence, Set
from functools import partial
from operator import itemgetter

import torch

from ft_transport._plan.blocks import (
    CARRIERS,
    CPU,
    Block,
    Held,
    Places,
    copy_blocks,
    held,
    indexed,
    refuse_moved,
    share,
    storage_as,
)
from ft_transport._plan.buffers import FROM_ARENA, Arena, allocate
from ft_transport._plan.compare import Slot, Targets, same_strides
from ft_transport._plan.rebuild import NEW_EACH_TIME, Objects, empty, quiet, view_of
from ft_transport._process import Room, room
from ft_transport._state.geometry import covered
from ft_transport._state.kinds.base import KINDS, Maker, Surroundings, plain, put_together, refresh
from ft_transport._state.kinds.distributed import meshes_of
from ft_transport._state.manifest import Leaf, Manifest, View
from ft_transport._state.tree import format_path
from ft_transport._telemetry.report import TransferReport
from ft_transport._wire.layout import Gaps, Layout, Piece
from ft_transport.errors import LocalProtocolError, RemoteProtocolError

__all__ = ["Landing"]

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
        surroundings: What the receiver has; the meshes of matched leaves are added to its own.
        fresh_device: Where fresh leaves that were on an accelerator live, if not on ``device``.
        shadow: Let no message land in the template: :meth:`rebuild` copies to it.
        beside: Paths of leaves for which the same holds.
        shared: Let all that messages land in be shared memory.

    Attributes:
        in_place: Whether any byte lands in the template's memory while messages move.
        large: For each large range that lands in place, by its index: the template's tensors there.

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
        surroundings: Surroundings | None = None,
        fresh_device: torch.device | None = None,
        shadow: bool = False,
        beside: Set[str] = frozenset(),
        shared: bool = False,
    ) -> None:
        self.in_place = False
        self.large: dict[int, list[torch.Tensor]] = {}
        self._manifest = manifest
        self._layout = layout
        self._matched = matched
        self._targets = targets
        self._device = device
        self._on_cpu = device.type == "cpu"
        self._fresh_on_cpu = fresh_on_cpu
        self._surroundings = surroundings or Surroundings()
        self._fresh_device = fresh_device or device
        self._shadow = shadow
        self._beside: set[int] = set()
        if beside:
            self._beside = {index for index, path in enumerate(manifest.paths) if format_path(path) in beside}
        self._fresh_ranges: set[int] = set()
        self._arena = Arena()
        self._fresh_storages: dict[int, torch.Tensor] = {}
        self._fresh_bytes = 0
        self._room: Room | None = None
        # For each range the memory it lands in.
        self._blocks: list[Block] = []
        # What each view becomes, which template tensors hold their value in the end, and copies still to be made.
        self._values: dict[Slot, torch.Tensor] = {}
        self._settled: set[Slot] = set()
        self._copies: list[tuple[Slot, Slot]] = []
        self._counts: list[int] = []  # of the targets of these copies, as torch counts their in-place operations
        if shared:
            share(targets.values())
        # Where the template's tensors are.
        homes = held([Block(tensor) for tensor in targets.values()])
        self._places = Places.of(homes)
        self._homes = dict(zip(targets, homes, strict=True))
        self._plan(report)
        if shared:
            share(block.memory for block in self._blocks)
        fresh = [which for which, block in enumerate(self._blocks) if block.storage is None]
        for which, block in zip(fresh, held([self._blocks[which] for which in fresh]), strict=True):
            self._blocks[which] = block

    # ---------------------------------------------------------------------------------------- plan

    def _plan(self, report: TransferReport) -> None:
        ranges = self._layout.ranges
        simple = len(ranges) == len(self._manifest.storages)  # nearly every storage is one range
        members: list[list[_Member]] = [[] for _ in ranges]
        for index, leaf in enumerate(self._manifest.leaves):
            for position, view in enumerate(leaf[1]):
                storage = view[0]
                if storage >= 0:
                    which = storage if simple else self._layout.range_of(storage, view.begin)
                    members[which].append(((index, position), view))
        in_place = copied = 0
        # Most ranges are one dense view, and land in the template's tensor as it is: those with little ado.
        homes = {} if self._shadow or self._beside else self._homes
        direct: dict[Slot, torch.Tensor] = {}
        for which, (piece, group) in enumerate(zip(ranges, members, strict=True)):
            nbytes = piece[2] - piece[1]
            slot, (_, shape, _) = group[0]
            if len(group) == 1 and shape.dense and (home := homes.get(slot)) is not None:
                tensor = home[0]
                if tensor.stride() == shape.stride and self._is_here(tensor):
                    direct[slot] = tensor
                    self._blocks.append(home)
                    in_place += nbytes
                    if nbytes >= self._layout.stage_below:
                        self.large[which] = [tensor]
                    continue
            gaps = self._layout.gaps.get(which)
            if self._shadow or not self._targets or (self._beside and any(i in self._beside for (i, _), _ in group)):
                block = None
            elif gaps is not None:
                block = self._in_place_with_gaps(piece, gaps, group)
            else:
                block = self._in_place(piece, group)
            if block is None:
                block = self._fresh(piece, group, gaps)
                self._fresh_ranges.add(which)
                if self._targets and any(slot in self._targets for slot, _ in group):
                    copied += nbytes
            else:
                in_place += nbytes
                if nbytes >= self._layout.stage_below:
                    self.large[which] = [self._targets[slot] for slot, _ in group if slot in self._targets]
            self._blocks.append(block)
        self._values.update(direct)
        self._settled.update(direct)
        self._try_to_rebuild()
        report.nbytes_in_place += in_place
        report.nbytes_fresh += self._layout.nbytes - in_place
        report.nbytes_copied += copied
        self.in_place = in_place > 0

    def _try_to_rebuild(self) -> None:
        """Find what cannot be rebuilt before a byte lands."""
        here = self._here()
        for index, leaf in enumerate(self._manifest.leaves):
            if leaf.kind in KINDS and KINDS[leaf.kind].is_tried and (index, 0) not in self._targets:
                try:
                    put_together(leaf.part, self._makers(index, leaf, None), here)
                except Exception as exc:
                    path = format_path(self._manifest.paths[index])
                    raise RemoteProtocolError(f"{path}: it cannot be rebuilt: {str(exc)[:1000]}") from exc

    def _here(self) -> Surroundings:
        meshes = {**self._surroundings.meshes, **meshes_of(list(self._matched.values()))}
        return self._surroundings._replace(meshes=meshes)

    def _in_place(self, piece: Piece, group: Sequence[_Member]) -> Block | None:
        """The template's own memory for a range, if its views have one that can hold all of it."""
        if len(group) == 1 and group[0][0] not in self._targets:
            return None
        exact: dict[tuple[int, int], list[_Member]] = {}
        for slot, view in group:
            tensor = self._targets.get(slot)
            if tensor is not None and self._is_here(tensor) and same_strides(view, tensor):
                shift = int(tensor.storage_offset()) * view.geometry.itemsize - view.begin
                if len(group) == 1 and view.geometry.dense:
                    self._settle_in_place(slot)
                    return self._homes[slot]
                exact.setdefault((tensor.untyped_storage()._cdata, shift), []).append((slot, view))
        for (_, shift), matching in exact.items():
            # Bytes in a view's gaps are its neighbours': a range is taken as it is where each byte is of some view, and
            # where those that the template lacks can begin at the same bytes.
            if len(matching) == len(group) or (
                all(shift % view.geometry.itemsize == 0 for _, view in group)
                and covered([view.placed for _, view in matching], piece.begin, piece.end)
            ):
                flat = storage_as(self._targets[matching[0][0]], torch.uint8)
                self._settle(group, {slot for slot, _ in matching}, flat, shift)
                return Block(flat[piece.begin + shift : piece.end + shift])
        return self._in_place_strided(piece, group)

    def _in_place_with_gaps(self, piece: Piece, gaps: Gaps, group: Sequence[_Member]) -> Block | None:
        """The template's memory for a range with gaps, where all its views lie as they do at the source."""
        places = set()
        for slot, view in group:
            tensor = self._targets.get(slot)
            if tensor is None or not self._is_here(tensor) or not same_strides(view, tensor):
                return None
            shift = int(tensor.storage_offset()) * view.geometry.itemsize - view.begin
            places.add((tensor.untyped_storage()._cdata, shift))
        if len(places) != 1 or (piece.begin + shift) % gaps.unit:
            return None
        for slot, _ in group:
            self._settle_in_place(slot)
        assert tensor is not None
        return indexed(tensor.detach(), piece.begin + shift, gaps.end + shift, gaps.places, gaps.unit)

    def _is_here(self, tensor: torch.Tensor) -> bool:
        """Whether messages can be received into it."""
        return tensor.is_cpu if self._on_cpu else tensor.device.type == self._device.type

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
                return Block(quiet(tensor).as_strided(shape, stride, tensor.storage_offset()), dense=False)
        return None

    def _settle_in_place(self, slot: Slot) -> None:
        self._values[slot] = self._targets[slot]
        self._settled.add(slot)

    def _fresh(self, piece: Piece, group: Sequence[_Member], gaps: Gaps | None) -> Block:
        nbytes, device_type = self._manifest.storages[piece.storage]
        on_cpu = self._fresh_on_cpu or "cpu" in (device_type, self._fresh_device.type)
        whole = piece.begin == 0 and piece.end == nbytes
        if on_cpu and piece.storage not in self._fresh_storages:
            self._fresh_bytes += nbytes
            # Asked once: what is taken here is in use only when bytes land in it.
            self._room = self._room or room()
            if self._fresh_bytes > self._room.nbytes:
                raise MemoryError(f"{self._fresh_bytes} bytes of fresh storages are more than {self._room.of}")
        if whole and len(group) == 1 and nbytes < FROM_ARENA and group[0][1].geometry.dense:
            # A tensor of its own: the quickest way for many small ones.
            (slot, view) = group[0]
            self._values[slot] = tensor = empty(view, CPU if on_cpu else self._fresh_device)
            if slot in self._targets:
                self._copies.append((slot, slot))
            return Block(tensor)
        flat = self._fresh_storages.get(piece.storage)
        if flat is None:
            flat = self._arena.allocate(nbytes) if on_cpu else allocate(nbytes, self._fresh_device)
            self._fresh_storages[piece.storage] = flat
        self._settle(group, set(), flat, 0)
        if gaps is not None:
            return indexed(flat, piece.begin, gaps.end, gaps.places, gaps.unit)
        return Block(flat if whole else flat[piece.begin : piece.end])

    def _settle(self, group: Sequence[_Member], direct: set[Slot], flat: torch.Tensor, shift: int) -> None:
        """Note what each view of a range becomes, once the range lies in ``flat`` moved by ``shift`` bytes."""
        for slot, view in group:
            if slot in direct:
                self._settle_in_place(slot)
                continue
            self._values[slot] = view_of(flat, view, shift)
            if slot in self._targets:
                self._copies.append((slot, slot))

    # ---------------------------------------------------------------------------------------- move

    def check(self) -> None:
        """Call before what has landed counts as the template's.

        Raises:
            LocalProtocolError: A tensor of the template has lost its memory, or part of it; the text names the paths.
        """
        if moved := self._places.moved():
            slots = list(self._targets)
            refuse_moved(self._manifest, [slots[index][0] for index in moved])

    def direct(self, message: int) -> torch.Tensor | None:
        """The memory that a message can be received into as it is, None if it must be staged.

        Raises:
            LocalProtocolError: As :meth:`check`.
        """
        found = self._direct(message)
        if found is None:
            return None
        if not found[0].here:
            self.check()
        return found[0].bytes(found[1], found[2])

    def view(self, message: int) -> memoryview | None:
        """As :meth:`direct`, for messages on the CPU; see :meth:`held`."""
        held = self.held(message)
        return None if held is None else held.view

    def held(self, message: int) -> Held | None:
        """As :meth:`view`, to see whether the memory is there."""
        found = self._direct(message)
        return None if found is None or not self._on_cpu else Held(*found)

    def _direct(self, message: int) -> tuple[Block, int, int] | None:
        pieces = self._layout.messages[message]
        # Small ones are staged for the reason that the source has, see ``_plan.placement.Gatherer``.
        if self._layout.is_small(message):
            return None
        block, begin, nbytes = self._locate(pieces[0])
        if not block.dense or block.memory.device.type != self._device.type:
            return None
        return block, begin, begin + nbytes

    def scatter(self, message: int, staged: torch.Tensor) -> None:
        """Copy a staged message to where its pieces belong."""
        self._copy(message, staged, gather=False)

    def gather(self, message: int, staged: torch.Tensor) -> None:
        """Copy a message from where its pieces landed."""
        self._copy(message, staged, gather=True)

    def _copy(self, message: int, staged: torch.Tensor, *, gather: bool) -> None:
        try:
            copy_blocks([self._locate(piece) for piece in self._layout.messages[message]], staged, gather=gather)
        except LocalProtocolError:
            self.check()  # which names it
            raise

    def memory(self) -> list[torch.Tensor]:
        """What holds each of the layout's ranges, in their order."""
        return [block.memory for block in self._blocks]

    def in_template(self, message: int) -> bool:
        """Whether all of a message lands in the template's memory."""
        return not any(range_ in self._fresh_ranges for range_ in self._ranges_of(message))

    def touches_template(self, message: int) -> bool:
        """Whether any of a message lands in the template's memory."""
        return any(range_ not in self._fresh_ranges for range_ in self._ranges_of(message))

    def _ranges_of(self, message: int) -> Iterator[int]:
        for piece in self._layout.messages[message]:
            yield self._layout.range_of(piece.storage, piece.begin)

    def _locate(self, piece: Piece) -> tuple[Block, int, int]:
        index = self._layout.range_of(piece.storage, piece.begin)
        return self._blocks[index], piece.begin - self._layout.ranges[index].begin, piece.end - piece.begin

    # ------------------------------------------------------------------------------------- rebuild

    def rebuild(self) -> object:
        """The received state dict. Call it once, after every message has landed and been verified."""
        self._counts = [_count(self._targets[target]) for target, _ in self._copies]
        for target, slot in self._copies:
            self._copy_to(target, slot)
            self._settled.add(target)
        manifest, matched = self._manifest, self._matched
        here = self._here()
        built: list[object] = []
        settled, values = self._settled, self._values
        objects = self._objects() if any(map(itemgetter(3), manifest.leaves)) else None
        all_new = not matched and not manifest.same and objects is None
        for index, leaf in enumerate(manifest.leaves):
            kind, _, context, _ = leaf
            if kind == "value":
                built.append(context)
            elif all_new and context is None and kind == "tensor" and (index, 0) in values:
                built.append(values[index, 0])  # of many states every leaf is such a one
            elif leaf.kind == "tensor" and (index, 0) in settled:
                built.append(matched[index])
            elif index in matched and self._adopts(index, leaf):
                built.append(refresh(leaf.part, self._makers(index, leaf, None), matched[index], here))
            elif index in manifest.same:
                built.append(built[manifest.same[index]])
            elif leaf.kind == "tensor" and objects is None:
                tensor = values.get((index, 0))
                built.append(plain(empty(leaf.views[0]) if tensor is None else tensor, leaf.context))
            elif leaf.kind == "tensor" and objects is not None:
                view, context = leaf.views[0], leaf.context
                built.append(objects.outer(view, context, self._values.get((index, 0))))
            else:
                built.append(put_together(leaf.part, self._makers(index, leaf, objects), here))
        return manifest.build(built)

    def _copy_to(self, target: Slot, slot: Slot) -> None:
        mine, new = quiet(self._targets[target]), quiet(self._values[slot])
        carrier = CARRIERS[mine.dtype.itemsize]
        mine.view(carrier).copy_(new.view(carrier))

    def copy_again(self) -> None:
        """Repeat the copies of :meth:`rebuild`: of small tensors all, of large ones those that have changed since."""
        for (target, slot), before in zip(self._copies, self._counts, strict=True):
            mine = self._targets[target]
            if mine.nbytes < self._layout.stage_below or _count(mine) != before:
                self._copy_to(target, slot)

    def find_again(self) -> set[int]:
        """Look for the template's memory where it is now: a ``load_state_dict`` may have exchanged it.

        Returns:
            The ranges whose tensors are of another size or shape by now.
        """
        lost: set[int] = set()
        moved = self._places.moved()
        if not moved:
            return lost
        slots = list(self._targets)
        for slot in [slots[index] for index in moved]:
            view, mine = self._manifest.leaves[slot[0]].views[slot[1]], self._targets[slot]
            if (mine.dtype, mine.shape) != (view.geometry.dtype, view.geometry.shape) or not same_strides(view, mine):
                lost.add(self._layout.range_of(view.storage, view.begin))
        self._blocks = held([Block(*block[:3]) for block in self._blocks])
        return lost

    def paths_of(self, ranges: Set[int]) -> list[str]:
        """The leaves that have bytes in these ranges."""
        if not ranges:
            return []
        range_of, manifest = self._layout.range_of, self._manifest
        return [
            format_path(manifest.paths[index])
            for index, leaf in enumerate(manifest.leaves)
            if any(view.storage >= 0 and range_of(view.storage, view.begin) in ranges for view in leaf.views)
        ]

    def paths_in_place(self) -> set[str]:
        """The leaves whose bytes land in the template, or are copied to it."""
        slots = itertools.chain(self._settled, (target for target, _ in self._copies))
        return {format_path(self._manifest.paths[index]) for index in {index for index, _ in slots}}

    def paths(self) -> set[str]:
        """All leaves of the state."""
        return set(map(format_path, self._manifest.paths))

    def _objects(self) -> Objects:
        """Tensors that leaves may hold, beginning with the template's own."""
        objects = Objects()
        for index, position in self._settled:
            leaf = self._manifest.leaves[index]
            if leaf.kind == "tensor":
                objects.know(leaf.views[position], leaf.context, self._targets[index, position])
        return objects

    def _adopts(self, index: int, leaf: Leaf) -> bool:
        """Whether the template's leaf holds the new bytes. Tensors among its attributes do not count."""
        if leaf.kind in NEW_EACH_TIME or (leaf.kind in KINDS and KINDS[leaf.kind].obstacle(self._matched[index])):
            return False
        views = leaf.views[:1] if leaf.kind == "python tensor" else leaf.views
        return all(view.storage < 0 or (index, i) in self._settled for i, view in enumerate(views))

    def _makers(self, index: int, leaf: Leaf, objects: Objects | None) -> Iterator[Maker]:
        for position, view in enumerate(leaf.views):
            slot = index, position
            tensor = self._values.get(slot)
            if objects is None or slot in self._settled:
                yield partial(plain, empty(view) if tensor is None else tensor)
            else:
                yield partial(objects.inner, view, tensor)

    @property
    def copies(self) -> bool:
        """Whether :meth:`rebuild` writes to the template."""
        return bool(self._copies)

    def written(self) -> list[torch.Tensor]:
        """The template's tensors that hold a new value."""
        return [self._targets[slot] for slot in self._settled]


def _count(tensor: torch.Tensor) -> int:
    """How many in-place operations autograd has counted; 0 for a tensor of inference mode, which has no count."""
    return 0 if tensor.is_inference() else tensor._version
