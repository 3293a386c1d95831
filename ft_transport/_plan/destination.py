"""Where each byte range lands: in place, fresh, or staged through a bucket and copied.

Strategy: everything is decided before the first payload byte, and everything that can fail for want of memory, or for
what the source has described, fails then. A range lands directly in the template's memory where strides and device
agree as well; where only these differ it goes through a bucket. What the template lacks, or cannot take without harm to
a neighbour, lands in fresh memory.

Not here: which tensors of the template may be written to at all (``_plan.compare``), and which object a leaf becomes
(``_plan.rebuild``).
"""

from __future__ import annotations

from collections.abc import Container, Sequence, Set
from itertools import chain
from typing import Any, NamedTuple

import torch

from ft_transport._device import NO_STREAMS, Streams, copy
from ft_transport._options import CPU, Options
from ft_transport._plan.blocks import CARRIERS, Block, Blocks, Places, held, indexed, share, storage_as
from ft_transport._plan.buffers import FROM_ARENA, Arena, allocate
from ft_transport._plan.compare import Targets, same_strides
from ft_transport._plan.expected import Template
from ft_transport._plan.pages import Pages
from ft_transport._plan.placement import Placement, note_state
from ft_transport._plan.rebuild import Landed, Rebuild, allocated, quiet, view_of
from ft_transport._plan.template import fit
from ft_transport._process import Room, room
from ft_transport._state.geometry import covered
from ft_transport._state.kinds.base import Surroundings
from ft_transport._state.manifest import Manifest, View
from ft_transport._state.tree import format_path
from ft_transport._telemetry.report import TransferReport
from ft_transport._wire.layout import Gaps, Layout, Piece

__all__ = ["DestinationPlan", "plan_destination"]

_APART = (
    "its memory, or what it shares of it, is arranged otherwise than at the source: received beside it, then copied"
)


def plan_destination(
    manifest: Manifest,
    layout: Layout,
    template: Template | None,
    options: Options,
    report: TransferReport,
    beside: Set[str] = frozenset(),
) -> DestinationPlan:
    """Check what the source sends against the template, and decide where each byte lands.

    Args:
        manifest: What the source described.
        layout: Its messages.
        template: What the caller has; None for a fresh state.
        options: The caller's choices.
        report: Filled with what the state is, and what lands where.
        beside: Paths of leaves that must not land in the template, but be copied to it in the end.

    Raises:
        MemoryError: There is no room for the fresh leaves.
        RemoteProtocolError: The template cannot take it, or a leaf cannot be rebuilt; every path is listed.
    """
    matched, targets, here = fit(
        manifest,
        template,
        report,
        strict=options.strict,
        on_mismatch=options.on_mismatch,
        copies=options.copies,
    )
    plan = DestinationPlan(
        manifest,
        layout,
        matched,
        targets,
        options.device,
        report,
        surroundings=here,
        fresh_device=options.fresh_device,
        shadow=options.shadow,
        beside=beside,
        shared=options.shared,
    )
    note_state(report, manifest, layout)
    return plan


class DestinationPlan:
    """The plan for one receive, and the building of its result. Making one allocates what is fresh.

    Args:
        manifest: What the source described.
        layout: Its messages.
        matched: The template's leaf for each manifest leaf that has one.
        targets: The template's tensors that can take their bytes.
        device: Device of the wire's messages; fresh leaves that were on an accelerator live there too.
        report: Filled with what lands where.
        surroundings: What the receiver has; the meshes of matched leaves are added to its own.
        fresh_device: Where fresh leaves that were on an accelerator live, if not on ``device``.
        shadow: Let no message land in the template: :meth:`rebuild` copies to it.
        beside: Paths of leaves for which the same holds.
        shared: Let all that messages land in be shared memory.

    Attributes:
        placement: Where each message lands.
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
        surroundings: Surroundings | None = None,
        fresh_device: torch.device | None = None,
        shadow: bool = False,
        beside: Set[str] = frozenset(),
        shared: bool = False,
    ) -> None:
        self._manifest = manifest
        self._layout = layout
        self._targets = targets
        if shared:
            share(targets.blocks.memory)
            targets.blocks = targets.blocks.held_again()
        # Noted when they were compared, and before anything is allocated: memory that moves from then on is seen to.
        self._places = Places.of(
            targets.blocks, manifest, lambda: list(map(manifest.leaves.owners.__getitem__, targets))
        )
        aside: Container[int] = range(len(manifest.leaves)) if shadow else _indices(manifest, beside)
        where = fresh_device or device
        fresh = _Fresh(manifest, where)
        plan = _Plan(manifest, layout, targets, fresh, aside, shared=shared)
        blocks = plan.blocks()
        nbytes_in_place = layout.nbytes - sum(map(layout.ranges.nbytes.__getitem__, plan.fresh_ranges))
        self.in_place = nbytes_in_place > 0
        self.large = plan.large
        self._fresh_ranges = plan.fresh_ranges
        self._pages = fresh.pages
        self._landed = plan.landed
        self._counts: list[int] = []  # of the targets of copies, as torch counts their in-place operations
        self._rebuild = Rebuild(manifest, matched, targets, plan.landed, surroundings or Surroundings(), where)
        # After the last allocation: what is put together here for a try is thrown away, and must not take the room that
        # was looked for.
        self._rebuild.try_it()
        self.placement = Placement(layout, blocks, self._places, device)
        report.nbytes_in_place += nbytes_in_place
        report.nbytes_fresh += layout.nbytes - nbytes_in_place
        report.nbytes_copied += plan.nbytes_copied
        # They cost as much memory as they have, which is a device's where they are.
        report.not_in_place |= {format_path(manifest.paths[index]): _APART for index in sorted(plan.apart)}

    # ---------------------------------------------------------------------------------------- move

    def check(self) -> None:
        """As ``Placement.check``."""
        self._places.check()

    def in_template(self, message: int) -> bool:
        """Whether all of a message lands in the template's memory."""
        return self._fresh_ranges.isdisjoint(self._layout.owners[message])

    @property
    def has_pages(self) -> bool:
        """Whether :meth:`provide` may do anything."""
        return self._pages.any

    def provide(self, message: int, *, ahead: bool = False) -> None:
        """Have the system provide the memory that a message is about to land in, where that is fresh; see
        ``_plan.pages``. Any thread."""
        held = self.placement.held(message) if self._pages.any else None
        if held is not None:
            address = held.block.address
            self._pages.provide(address + held.begin, address + held.end, ahead=ahead)

    def touches_template(self, message: int) -> bool:
        """Whether any of a message lands in the template's memory."""
        return not self._fresh_ranges.issuperset(self._layout.owners[message])

    # ------------------------------------------------------------------------------------- rebuild

    def rebuild(self, streams: Streams = NO_STREAMS) -> object:
        """The received state dict. Call it once, after every message has landed and been verified.

        Args:
            streams: To copy in, where the template is on accelerators.

        Raises:
            TransferTimeout: Their deadline passed; the template holds a mix.
        """
        landed = self._landed
        self._pages.allow_huge()  # nobody waits for them any more
        self._counts = [_count(self._targets[target].memory) for target, _ in landed.copies]
        if landed.copies:
            # Not in the caller's: there each would wait for the step that training is in, without a limit.
            with streams.use():
                for target, number in landed.copies:
                    self._copy_to(target, number, begin=True)
                    landed.settled.add(target)
            streams.begun().finish()
        return self._rebuild.state()

    def _copy_to(self, target: int, number: int, *, begin: bool = False) -> None:
        # As bits: ``copy_`` of a dtype that has no arithmetic (float8, quantized) is not implemented everywhere, and
        # NaNs must keep their payload.
        value = self._landed.values[number]
        assert value is not None
        mine, new = quiet(self._targets[target].memory), quiet(value)
        carrier = CARRIERS[mine.dtype.itemsize]
        copy(mine.view(carrier), new.view(carrier), begin=begin)

    def copy_again(self) -> None:
        """Repeat the copies of :meth:`rebuild`: of small tensors all, of large ones those that have changed since."""
        for (target, number), before in zip(self._landed.copies, self._counts, strict=True):
            mine = self._targets[target].memory
            # BatchNorm's fused kernels write statistics without counting, so small ones are copied whether they count
            # as changed or not.
            if mine.nbytes < self._layout.stage_below or _count(mine) != before:
                self._copy_to(target, number)

    def find_again(self) -> set[int]:
        """Look for the template's memory where it is now: a ``load_state_dict`` may have exchanged it.

        Returns:
            The ranges whose tensors are of another size or shape by now.
        """
        lost: set[int] = set()
        moved = self._places.moved()
        if not moved:
            return lost
        numbers = self._targets.numbers
        # ``load_state_dict(assign=True)``, FSDP's resharding, an optimizer that casts its state: the tensor object may
        # be the same with other memory, and then what is written again goes there.
        for number in [numbers[index] for index in moved]:
            view, mine = self._manifest.views[number], self._targets[number].memory
            if (mine.dtype, mine.shape) != (view.geometry.dtype, view.geometry.shape) or not same_strides(
                view, mine.stride()
            ):
                lost.add(self._layout.range_of(view.storage, view.begin))
        # In one assignment: a relay's threads go on reading messages from there.
        self.placement.blocks = self.placement.blocks.held_again()
        return lost

    def written(self) -> list[torch.Tensor]:
        """The template's tensors that hold a new value."""
        blocks, settled = self._targets.blocks, self._landed.settled
        if len(settled) == len(self._targets):
            return list(blocks.memory)
        return [mine for number, mine in zip(self._targets, blocks.memory, strict=True) if number in settled]

    @property
    def copies(self) -> bool:
        """Whether :meth:`rebuild` writes to the template."""
        return bool(self._landed.copies)

    # --------------------------------------------------------------------------------------- paths

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

    def device_memory(self) -> list[torch.Tensor]:
        """All that is written to, while messages move and in the end; nothing if all of it is on the CPU."""
        if self.placement.blocks.on_host and self._targets.blocks.on_host:
            return []
        return self.placement.memory() + [self._targets[number].memory for number, _ in self._landed.copies]

    def paths_in_place(self) -> set[str]:
        """The leaves whose bytes land in the template, or are copied to it."""
        numbers = chain(self._landed.settled, (target for target, _ in self._landed.copies))
        owners = self._manifest.leaves.owners
        return {format_path(self._manifest.paths[index]) for index in {owners[number] for number in numbers}}

    def paths(self) -> set[str]:
        """All leaves of the state."""
        return set(map(format_path, self._manifest.paths))


def _indices(manifest: Manifest, paths: Set[str]) -> set[int]:
    """The leaves of these paths."""
    return {index for index, path in enumerate(manifest.paths) if format_path(path) in paths} if paths else set()


def _count(tensor: torch.Tensor) -> int:
    """How many in-place operations autograd has counted; 0 for a tensor of inference mode, which has no count."""
    return 0 if tensor.is_inference() else tensor._version


# ---------------------------------------------------------------------------------------------- plan


class _Member(NamedTuple):
    """One view of a range, and its number."""

    number: int
    view: View


class _Plan:
    """Decides, range by range.

    Args:
        manifest: What the source described.
        layout: Its messages.
        homes: The memory of each target.
        fresh: Where to take memory from.
        aside: Leaves of which nothing may land in the template while messages move.
        shared: Whether all that messages land in is to be shared memory.

    Attributes:
        landed: What has been decided of each view.
        large: As in :class:`DestinationPlan`.
        fresh_ranges: The ranges that do not land in the template.
        nbytes_copied: Bytes that are copied to it in the end.
        apart: The leaves of these, by index, where that is because of how the template's memory is arranged.
    """

    def __init__(
        self,
        manifest: Manifest,
        layout: Layout,
        homes: Targets,
        fresh: _Fresh,
        aside: Container[int],
        *,
        shared: bool,
    ) -> None:
        self.landed = Landed([None] * len(manifest.views), set(), [])
        self.large: dict[int, list[torch.Tensor]] = {}
        self.fresh_ranges: set[int] = set()
        self.apart: set[int] = set()
        # What each range becomes is decided in one pass, in the layout's order; nothing decided for one depends on
        # another but the room that is left.
        self.nbytes_copied = 0
        self._manifest = manifest
        self._layout = layout
        self._homes = homes
        self._fresh = fresh
        self._aside = aside
        self._shared = shared

    def blocks(self) -> Blocks:
        """The memory that each of the layout's ranges lands in."""
        # Most ranges are one dense view, and land in the template's tensor as it is: those in columns.
        # With a shadow, or leaves that forward has written to, the quick way is closed to all: it does not look at
        # leaves one by one.
        ranges, homes = self._layout.ranges, self._homes.blocks
        places: Sequence[Any] = [None] * len(ranges) if self._aside else self._direct()
        if isinstance(places, range):
            return homes.part(places)
        slow = [which for which, place in enumerate(places) if place is None]
        members = self._members(slow)
        found = [self._block(which, ranges[which], members[which]) for which in slow]
        # Fresh memory is held like the template's: once rebuilt it is the user's, and a relay still reads it for the
        # next destination. Not what is held already: its address is of when it was compared, and if it has moved since
        # nothing may be written there.
        loose = [at for at, block in enumerate(found) if block.storage is None]
        if self._shared:
            share(found[at].memory for at in loose)
        for at, block in zip(loose, held([found[at] for at in loose]), strict=True):
            found[at] = block
        if len(slow) == len(ranges):
            return Blocks.of(found)
        blocks = homes.part([place or 0 for place in places])
        blocks.put(slow, found)
        return blocks

    def _direct(self) -> Sequence[Any]:
        """For each range that is one dense view, and lands in a target that is the same in all, the place of that
        target; else None."""
        lone, geometries, homes = self._layout.ranges.lone, self._manifest.views.geometries, self._homes
        memory, landed = homes.blocks.memory, self.landed
        places: Sequence[Any]
        # Of most states all are, and by identity, as shapes are compared.
        if isinstance(lone, range) and homes.numbers == lone and homes.geometries == geometries:
            places = range(len(memory))
            landed.values[:] = memory
            landed.settled.update(places)
        else:
            places = [homes.at(number) if number >= 0 else None for number in lone]
            pairs = [
                None if place is None else (geometries[number], homes.geometries[place])
                for number, place in zip(lone, places, strict=True)
            ]
            fitting = {pair for pair in {*pairs} if pair is not None and pair[0].stride == pair[1].stride}
            places = [place if pair in fitting else None for pair, place in zip(pairs, places, strict=True)]
            for number, place in zip(lone, places, strict=True):
                if place is not None:
                    landed.values[number] = memory[place]
                    landed.settled.add(number)
        self.large.update(
            (which, [memory[place]]) for which in self._layout.large if (place := places[which]) is not None
        )
        return places

    def _members(self, ranges: Sequence[int]) -> dict[int, list[_Member]]:
        """The views of some ranges."""
        layout, views, lone = self._layout, self._manifest.views, self._layout.ranges.lone
        members: dict[int, list[_Member]] = {}
        for which in ranges:
            number = lone[which]
            members[which] = [_Member(number, views[number])] if number >= 0 else []
        for number in sorted({*range(len(views))}.difference(lone)):
            if (view := views[number]).storage >= 0:
                members[layout.range_of(view.storage, view.begin)].append(_Member(number, view))
        return members

    def _block(self, which: int, piece: Piece, group: Sequence[_Member]) -> Block:
        gaps = self._layout.gaps.get(which)
        block = None
        if self._homes and not any(self._owner(number) in self._aside for number, _ in group):
            block = self._in_place(piece, group) if gaps is None else self._in_place_with_gaps(piece, gaps, group)
        mine: list[torch.Tensor] = []
        if self._homes:
            mine = [home for number, _ in group if (home := self._homes.tensor(number)) is not None]
        if block is not None:
            if piece.end - piece.begin >= self._layout.stage_below:
                self.large[which] = mine
            return block
        self.fresh_ranges.add(which)
        if mine:
            self.nbytes_copied += piece.end - piece.begin
            # Unless it is aside that one of them was to land.
            if not any(self._owner(number) in self._aside for number, _ in group):
                self.apart.update(self._owner(number) for number, _ in group if number in self._homes)
        return self._fresh_block(piece, group, gaps)

    def _owner(self, number: int) -> int:
        """The leaf of a view."""
        return self._manifest.leaves.owners[number]

    def _in_place(self, piece: Piece, group: Sequence[_Member]) -> Block | None:
        """The template's own memory for a range, if its views have one that can hold all of it."""
        # The usual fresh leaf. What follows is for groups of which some have a home.
        if len(group) == 1 and group[0].number not in self._homes:
            return None
        exact: dict[tuple[int, int], list[_Member]] = {}
        for member in group:
            number, view = member
            shift = self._shift(member)
            if shift is not None:
                if len(group) == 1 and view.geometry.dense:
                    self._settle_in_place(number)
                    return self._homes[number]
                exact.setdefault(shift, []).append(member)
        for (_, shift_bytes), matching in exact.items():
            # Bytes in a view's gaps are its neighbours': a range is taken as it is where each byte is of some view, and
            # where those that the template lacks can begin at the same bytes.
            if len(matching) == len(group) or (
                all(shift_bytes % view.geometry.itemsize == 0 for _, view in group)
                and covered([view.placed for _, view in matching], piece.begin, piece.end)
            ):
                flat = storage_as(self._homes[matching[0].number].memory, torch.uint8)
                self._settle(group, {number for number, _ in matching}, flat, shift_bytes)
                return Block(flat[piece.begin + shift_bytes : piece.end + shift_bytes])
        return self._in_place_strided(piece, group)

    def _in_place_with_gaps(self, piece: Piece, gaps: Gaps, group: Sequence[_Member]) -> Block | None:
        """The template's memory for a range with gaps, where all its views lie as they do at the source."""
        shifts = {self._shift(member) for member in group}
        # All views must have moved alike: the places in ``gaps`` are of the source's storage, and hold here only then.
        (shift, *others) = shifts
        if shift is None or others or (piece.begin + shift[1]) % gaps.unit:
            return None
        for number, _ in group:
            self._settle_in_place(number)
        tensor = self._homes[group[-1].number].memory.detach()
        return indexed(tensor, piece.begin + shift[1], gaps.end + shift[1], gaps.places, gaps.unit)

    def _shift(self, member: _Member) -> tuple[int, int] | None:
        """Which storage of the template has a view's elements as the source's has them, and how many bytes behind;
        None if none has."""
        tensor = self._homes.tensor(member.number)
        if tensor is None or not same_strides(member.view, tensor.stride()):
            return None
        begin = int(tensor.storage_offset()) * member.view.geometry.itemsize
        return tensor.untyped_storage()._cdata, begin - member.view.begin

    def _in_place_strided(self, piece: Piece, group: Sequence[_Member]) -> Block | None:
        """A template tensor whose strides differ, to be written through a bucket."""
        # The message is staged, and scattered to the first of the targets; copies fill the others once all has landed.
        # Views that are not all the same could not be copied from one target to the other.
        if not all(number in self._homes and view == group[0].view for number, view in group):
            return None
        number, view = group[0]
        if (view.begin, view.end) != (piece.begin, piece.end) or not view.geometry.dense:
            return None
        tensor, order = self._homes[number].memory, view.geometry.order
        assert order is not None
        self._settle_in_place(number)
        self.landed.copies.extend((other, number) for other, _ in group if other != number)
        shape, stride = [tensor.shape[dim] for dim in order], [tensor.stride(dim) for dim in order]
        return Block(quiet(tensor).as_strided(shape, stride, tensor.storage_offset()), dense=False)

    def _settle_in_place(self, number: int) -> None:
        self.landed.values[number] = self._homes.tensor(number)
        self.landed.settled.add(number)

    def _settle(self, group: Sequence[_Member], direct: set[int], flat: torch.Tensor, shift: int) -> None:
        """Note what each view of a range becomes, once the range lies in ``flat`` moved by ``shift`` bytes."""
        for number, view in group:
            if number in direct:
                self._settle_in_place(number)
            else:
                self._settle_beside(number, view_of(flat, view, shift))

    def _settle_beside(self, number: int, tensor: torch.Tensor) -> None:
        self.landed.values[number] = tensor
        if self._homes and number in self._homes:
            self.landed.copies.append((number, number))

    def _fresh_block(self, piece: Piece, group: Sequence[_Member], gaps: Gaps | None) -> Block:
        whole = piece.begin == 0 and piece.end == self._manifest.storages[piece.storage].nbytes
        # Below the arena's size torch's own allocator is quicker, and gives back memory piece by piece.
        if whole and len(group) == 1 and piece.end < FROM_ARENA and group[0].view.geometry.dense:
            # A tensor of its own: the quickest way for many small ones.
            tensor = self._fresh.tensor(group[0].view)
            self._settle_beside(group[0].number, tensor)
            return Block(tensor)
        flat = self._fresh.storage(piece.storage)
        self._settle(group, set(), flat, 0)
        if gaps is not None:
            return indexed(flat, piece.begin, gaps.end, gaps.places, gaps.unit)
        return Block(flat if whole else flat[piece.begin : piece.end])


class _Fresh:
    """Memory for the storages of leaves that the template does not take.

    Args:
        manifest: What the source described.
        device: Where those live that were on an accelerator at the source.
    """

    def __init__(self, manifest: Manifest, device: torch.device) -> None:
        self._manifest = manifest
        self._device = device
        self._arena = Arena()
        self._storages: dict[int, torch.Tensor] = {}
        self._nbytes = 0
        self._room: Room | None = None

    @property
    def pages(self) -> Pages:
        """What the CPU's large storages are made of."""
        return self._arena.pages

    def tensor(self, view: View) -> torch.Tensor:
        """A tensor that is all of a storage."""
        return allocated(view, self._take(view.storage))

    def storage(self, storage: int) -> torch.Tensor:
        """A storage as flat uint8; the same one whenever it is asked for."""
        flat = self._storages.get(storage)
        if flat is None:
            device, nbytes = self._take(storage), self._manifest.storages[storage].nbytes
            flat = self._arena.allocate(nbytes) if device is CPU else allocate(nbytes, device)
            self._storages[storage] = flat
        return flat

    def _take(self, storage: int) -> torch.device:
        """The device of a storage, for which there is room.

        Raises:
            MemoryError: There is none.
        """
        nbytes, device_type = self._manifest.storages[storage]
        # A leaf that was on the CPU at the source stays there, whatever the destination has: counters and generators'
        # states do not belong on a device.
        if "cpu" not in (device_type, self._device.type):
            return self._device  # whose allocator says so by itself, before anything is killed for it
        self._nbytes += nbytes
        # Asked once: what is taken here is in use only when bytes land in it.
        self._room = self._room or room()
        if self._nbytes > self._room.nbytes:
            raise MemoryError(f"{self._nbytes} bytes of fresh storages are more than {self._room.of}")
        return CPU
