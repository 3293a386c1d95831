"""Memory that is the bytes of a range, and copying to and from it.

Strategy: a user may exchange or give back a tensor's memory at any moment (``.data =``, ``set_``, ``resize_``), and a
read of unmapped memory ends the process. So a block keeps the storage and remembers where it was; whoever is about to
read looks whether it is still there, with no step of Python in between. Thousands of small tensors are copied by
address, because a view of each would cost more than its bytes.
"""

from __future__ import annotations

import ctypes
import math
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate, chain, compress, pairwise, repeat
from operator import add, itemgetter
from typing import Any, NamedTuple

import torch

from ft_transport._device import seam
from ft_transport._plan.lent import kept, readers_of
from ft_transport._process import memory_at
from ft_transport._state.manifest import Manifest, made
from ft_transport._state.tree import format_path
from ft_transport.errors import LocalProtocolError

__all__ = [
    "CARRIERS",
    "Block",
    "Blocks",
    "Held",
    "Places",
    "copy_blocks",
    "copy_elements",
    "held",
    "indexed",
    "share",
    "storage_as",
]


# --------------------------------------------------------------------------------------------- blocks


class Block(NamedTuple):
    """Memory that is the bytes of a range, in order.

    Attributes:
        memory: Dense: a tensor of any shape without gaps, whose bytes from its lowest address on are the range.
            Otherwise: a strided tensor whose elements in row-major order are.
        dense: Which of the two.
        places: Set instead for a range with gaps that do not travel: ``memory`` is flat, and its elements at these
            places are the range.
        storage: Of ``memory``, which is kept whatever its tensor gets instead (``.data =``, ``set_``); None of memory
            that is ours alone. See :func:`held`.
        base: Address of the storage.
        nbytes: Of the storage.
        address: Of the first byte of ``memory``.
    """

    memory: torch.Tensor
    dense: bool = True
    places: torch.Tensor | None = None
    storage: torch.UntypedStorage | None = None
    base: int = 0
    nbytes: int = 0
    address: int = 0

    @property
    def here(self) -> bool:
        """Whether the tensor still has this memory, and its storage all of it."""
        storage = self.storage
        return storage is None or (
            (storage.data_ptr(), storage.nbytes()) == (self.base, self.nbytes)
            and self.memory.data_ptr() == self.address
        )

    def bytes(self, begin: int, end: int) -> torch.Tensor:
        """Bytes ``begin`` to ``end`` of a dense block as a flat uint8 tensor that shares the memory."""
        assert self.dense
        first = int(self.memory.storage_offset()) * self.memory.element_size()
        if self.storage is None:
            return storage_as(self.memory, torch.uint8)[first + begin : first + end]
        first = self.address - self.base
        flat = torch.empty(0, dtype=torch.uint8, device=self.memory.device)
        return flat.set_(self.storage, first + begin, (end - begin,), (1,))

    def view(self, begin: int, end: int) -> memoryview:
        """Bytes ``begin`` to ``end`` of a dense block on the CPU; the caller keeps the block."""
        assert self.dense
        return memory_at((self.memory.data_ptr() if self.storage is None else self.address) + begin, end - begin)


# Asked once for all, in columns: four calls of Python for each of 20,000 small tensors take longer than copying them.
def held(blocks: Sequence[Block]) -> list[Block]:
    """These blocks of a user's memory, with what it takes to see that it is taken away."""
    memory = list(map(itemgetter(0), blocks))
    storages = list(map(torch.Tensor.untyped_storage, memory))
    places = map(_base_of, storages), map(_nbytes_of, storages), map(torch.Tensor.data_ptr, memory)
    dense, indices = map(itemgetter(1), blocks), map(itemgetter(2), blocks)
    return made(Block, zip(memory, dense, indices, storages, *places, strict=True))


# Columns, as a state's views are: of a message's blocks two attributes are asked, and of a tuple for each of 20,000
# nearly all would be made, and freed, for nothing.
class Blocks:
    """The blocks of some ranges of memory, column by column, in the order of the ranges.

    Args:
        memory: Of each, as in :class:`Block`; so are the others.
        storages: Of each.
        bases: Of each.
        nbytes: Of each.
        addresses: Of each.
        on_host: Whether all are on the CPU.

    Attributes:
        others: By index: those that are not dense, or not held.
    """

    def __init__(
        self,
        memory: list[torch.Tensor],
        storages: list[torch.UntypedStorage],
        bases: list[int],
        nbytes: list[int],
        addresses: list[int],
        *,
        on_host: bool,
    ) -> None:
        self.memory = memory
        self.storages = storages
        self.bases = bases
        self.nbytes = nbytes
        self.addresses = addresses
        self.on_host = on_host
        self.others: dict[int, Block] = {}

    @classmethod
    def of(cls, blocks: Sequence[Block]) -> Blocks:
        """Of these."""
        found = cls([], [], [], [], [], on_host=True)
        found.extend(blocks)
        return found

    @property
    def columns(self) -> tuple[list[Any], ...]:
        """What is known of those that are held, and dense."""
        return self.memory, self.storages, self.bases, self.nbytes, self.addresses

    def __len__(self) -> int:
        return len(self.memory)

    def __getitem__(self, index: int) -> Block:
        other = self.others.get(index)
        if other is not None:
            return other
        memory, *home = (column[index] for column in self.columns)
        return Block(memory, True, None, *home)

    def __iter__(self) -> Iterator[Block]:
        return map(self.__getitem__, range(len(self)))

    def part(self, which: Sequence[int]) -> Blocks:
        """Those at some indices."""
        found = Blocks(*(list(_picked(column, which)) for column in self.columns), on_host=self.on_host)
        if self.others:
            found.others = {at: self.others[index] for at, index in enumerate(which) if index in self.others}
        return found

    def put(self, which: Sequence[int], blocks: Sequence[Block]) -> None:
        """Put these at some indices."""
        for column, field in zip(self.columns, (0, 3, 4, 5, 6), strict=True):
            for index, value in zip(which, map(itemgetter(field), blocks), strict=True):
                column[index] = value
        for index, block in zip(which, blocks, strict=True):
            if block[1] and block[3] is not None:
                self.others.pop(index, None)
            else:
                self.others[index] = block
        self.on_host = self.on_host and all(map(seam().on_host, map(itemgetter(0), blocks)))

    def extend(self, blocks: Sequence[Block]) -> None:
        """Append these."""
        num_before = len(self)
        for column in self.columns:
            column += [None] * len(blocks)
        self.put(range(num_before, len(self)), blocks)

    def held_again(self) -> Blocks:
        """The same, held where their tensors are by now."""
        # Others, and not these put right: another thread that reads a block of these meanwhile would find the address
        # of one moment beside the storage of another.
        return Blocks.of(held([Block(*block[:3]) for block in self]))


# What follows is about one danger. A user's thread may give back memory while another thread of ours reads it without
# the interpreter's lock: the read faults, and the process dies of SIGSEGV, which no ``except`` sees. System calls are
# safe (they give EFAULT); hashing is not, and goes through ``_plan.lent``.
class Held(NamedTuple):
    """Bytes of a dense block on the CPU, which its owner may take away at any moment."""

    block: Block
    begin: int
    end: int

    @property
    def view(self) -> memoryview:
        """The bytes. To be given to the system, which says so where there is nothing, and to :meth:`reads`."""
        return self.block.view(self.begin, self.end)

    def check(self) -> None:
        """Raises LocalProtocolError if the memory was taken away."""
        if not self.block.here:
            raise _taken_away()

    def reads(self, update: Callable[[memoryview], object]) -> Callable[[memoryview], object]:
        """``update``, to be given pieces of :attr:`view`: they stay where they are while it reads, see ``_plan.lent``.

        Raises:
            LocalProtocolError: The memory was taken away; so from each call, if it is since, before a byte is read.
        """
        storage = self.block.storage
        if storage is None:
            return update
        readers = readers_of(storage)
        # Bound once: this runs for every MiB, on threads that compete for the interpreter with the ones that move
        # bytes.
        enter, leave, before = readers.enter, readers.leave, readers.turn
        # An odd turn: somebody is taking the memory away just now. Looked at here as well as at each read, so that a
        # message whose memory is gone is never begun.
        if before % 2:
            raise _taken_away()
        self.check()

        def read(piece: memoryview) -> None:
            enter(piece)
            try:
                if readers.turn != before:
                    raise _taken_away()
                update(piece)
            finally:
                leave()

        return read


def _taken_away() -> LocalProtocolError:
    return LocalProtocolError("memory of the state was exchanged or given back while the state was moved")


# ``ctypes.PyDLL`` keeps the interpreter's lock, so between the look and the copy no other thread of Python runs, if
# neither is a step of Python: hence this chain of iterators in place of an ``if``.
def _if_there(memory: Sequence[torch.Tensor], addresses: Sequence[int], items: Sequence[Any]) -> Iterable[Any]:
    """The items, none if one of the tensors is not at its address when the first item is asked for.

    Its address tells all, see :class:`Places`. No step of this is Python's, so nobody takes the memory away before a
    function of C has had the last item.
    """
    now = map(torch.Tensor.data_ptr, memory)
    return chain.from_iterable(compress((items,), map(list(addresses).__eq__, map(list, (now,)))))


_base_of = torch.UntypedStorage.data_ptr
_nbytes_of = torch.UntypedStorage.nbytes


class Places:
    """Where the memory of some tensors of a user's is.

    A storage that gets another size moves, as all that torch's allocators do is to take new memory before they give
    back the old; and its address is nobody else's as long as it is kept. So addresses tell all, but for a storage that
    gives back all of its memory and then takes less of it, which may be at the same place (see ``docs/faults.md``).

    Args:
        tensors: The user's.
        addresses: Of the first byte of each.
        storages: Of each, to be kept.
        manifest: What they are, for errors.
        leaves: Gives the leaf of each tensor, by index; asked for once one has moved.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        addresses: Sequence[int],
        storages: Sequence[torch.UntypedStorage],
        manifest: Manifest,
        leaves: Callable[[], Sequence[int]],
    ) -> None:
        self._tensors = tensors
        self._addresses = addresses
        self._storages = storages
        self._manifest = manifest
        self._leaves = leaves

    @classmethod
    def of(cls, blocks: Blocks, manifest: Manifest, leaves: Callable[[], Sequence[int]]) -> Places:
        """Of tensors whose blocks are held."""
        return cls(list(blocks.memory), list(blocks.addresses), list(blocks.storages), manifest, leaves)

    def moved(self) -> list[int]:
        """Which of the tensors have other memory now, or less or more."""
        # One call of C for each tensor, and one comparison of lists: nothing has moved in nearly every transfer.
        addresses = list(map(torch.Tensor.data_ptr, self._tensors))
        if addresses == self._addresses:
            return []
        return [index for index, (a, b) in enumerate(zip(addresses, self._addresses, strict=True)) if a != b]

    def check(self) -> None:
        """Call before bytes that were read from there, or have landed there, count as the user's.

        Raises:
            LocalProtocolError: A tensor has lost its memory, or part of it; the text names the paths.
        """
        moved = self.moved()
        if not moved:
            return
        leaves, names = self._leaves(), self._manifest.paths
        paths = [format_path(names[leaf]) for leaf in dict.fromkeys(leaves[index] for index in moved)]
        more = f" and {len(paths) - _MAX_NAMED} more" if len(paths) > _MAX_NAMED else ""
        raise LocalProtocolError(
            "memory of the state was exchanged or given back while the state was moved: "
            f"{', '.join(paths[:_MAX_NAMED])}{more}; it must not be (.data, set_, resize_), before "
            "disallow_checkpoint() has returned"
        )


# Paths that an error names: whoever moves one tensor moves all.
_MAX_NAMED = 8


# Moving a storage into shared memory is itself an exchange of memory: Baby groups do it to whatever they are given, in
# the middle of a post. Done by us first, it is not taken for a user's.
def share(tensors: Iterable[torch.Tensor]) -> None:
    """Move what lies on the CPU into memory that other processes can see, where it does not lie there yet.

    A group in a process of its own (torchft's Baby groups) does so with all that it is given, in place; done before
    addresses are noted, nothing seems to be taken away.
    """
    for storage in (tensor.untyped_storage() for tensor in tensors if tensor.is_cpu):
        if storage.nbytes() and not storage.is_shared():
            storage.share_memory_()


def indexed(storage: torch.Tensor, begin: int, end: int, index: torch.Tensor, unit: int) -> Block:
    """The block of a range with gaps.

    Args:
        storage: Any tensor in its storage.
        begin: First byte of the range in the storage, a multiple of ``unit``.
        end: Behind the last byte.
        index: Which elements of ``unit`` bytes, counted from ``begin``.
        unit: 1, 2, 4, 8 or 16.
    """
    return Block(storage_as(storage, CARRIERS[unit])[begin // unit : end // unit], dense=False, places=index)


def storage_as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The whole storage of ``tensor`` as a flat tensor of ``dtype``; it shares the memory.

    The result has ``storage.nbytes() // dtype.itemsize`` elements, more than the tensor's own where its
    strides leave gaps.

    Raises:
        TypeError: ``tensor`` is a subclass, whose storage need not be what it shows.
    """
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise TypeError(f"expected a plain tensor, got {type(tensor).__qualname__}")
    storage = tensor.untyped_storage()
    # ``set_`` on a tensor of our own, not ``view``: a view would need strides that fit, and would share the version
    # counter, which tells autograd of every byte that lands.
    flat = torch.empty(0, dtype=dtype, device=tensor.device)
    return flat.set_(storage, 0, (storage.nbytes() // dtype.itemsize,), (1,))


def copy_blocks(
    blocks: Blocks,
    which: Sequence[int],
    sizes: Sequence[int],
    staged: torch.Tensor,
    *,
    gather: bool,
    begins: Sequence[int] = (),
) -> None:
    """Copy pieces of blocks to or from the bytes of one staged message.

    Args:
        blocks: Among which those are that the pieces are of.
        which: The block of each piece, by index, in the order of the message.
        sizes: Bytes of each piece.
        staged: The message, flat uint8.
        gather: Into the message if true, else out of it.
        begins: The first byte of each piece in its block; empty if all begin there.

    What crosses between a device and the host is only begun, in the calling thread's streams: until it is over
    (``_device.Copies``) the message must stay as it is, or is not there yet.

    Raises:
        LocalProtocolError: Memory of a block was taken away; nothing was read or written there.
    """
    # Dense blocks on the CPU are copied by address. What lies on an accelerator, is strided or has gaps goes through
    # torch, which is the slower way for small ones and the only one for these.
    memory: list[torch.Tensor]
    memory, addresses = _picked(blocks.memory, which), _picked(blocks.addresses, which)
    address = staged.data_ptr() if seam().on_host(staged) else 0
    ours = list(accumulate(sizes, initial=address))
    theirs = list(map(add, addresses, begins)) if any(begins) else addresses
    to, of = (ours, theirs) if gather else (theirs, ours)
    quick = None
    if address and blocks.on_host and blocks.others.keys().isdisjoint(which):
        done = 0
        if len(sizes) >= _AT_ONCE and staged.numel() <= _TINY_BYTES * len(sizes):
            done = _move_tiny(memory, addresses, theirs, ours, sizes, gather=gather)
        _move(memory[done:], addresses[done:], to[done:], of[done:], sizes[done:])
    else:
        here = map(seam().on_host, memory) if address else repeat(False)
        quick = [on_host and index not in blocks.others for on_host, index in zip(here, which, strict=False)]
        _move(*(list(compress(column, quick)) for column in (memory, addresses, to, of, sizes)))
    rest: list[_Part] = []
    far: list[_Part] = []
    for at in [at for at, is_quick in enumerate(quick or ()) if not is_quick]:
        first = ours[at] - address
        part = _Part(blocks[which[at]], begins[at] if begins else 0, staged[first : first + sizes[at]])
        (rest if not address or seam().on_host(memory[at]) else far).append(part)
    if rest or far:
        owned = (part.block.storage for part in chain(rest, far))
        with kept(storage for storage in owned if storage is not None) as there:
            if not there or not all(part.block.here for part in chain(rest, far)):
                raise _taken_away()
            _copy_by_torch(rest, far, staged, gather)


def _picked(column: list[Any], which: Sequence[int]) -> list[Any]:
    # Small tensors lie side by side among a state's ranges, so a bucket is mostly a piece of the column.
    return column[which.start : which.stop] if isinstance(which, range) else [column[index] for index in which]


def _move_tiny(
    memory: Sequence[torch.Tensor],
    addresses: Sequence[int],
    theirs: Sequence[int],
    ours: Sequence[int],
    sizes: Sequence[int],
    *,
    gather: bool,
) -> int:
    """As :func:`_move`, where ``ours`` follow each other, up to the last address in it; gives how many it did.

    By a pipe, to which a hundred of them are written by one system call, or read from it: that takes some six tenths of
    what as many calls of ``memmove`` do. One that copies within the process (``process_vm_readv``) would take less, and
    waits for whoever maps or unmaps memory meanwhile: with the interpreter's lock, all of the process would.
    """
    # Of the system's ``struct iovec``.
    extents = array("L", bytes(2 * array("L").itemsize * len(sizes)))
    extents[::2], extents[1::2] = array("L", theirs), array("L", sizes)
    try:
        out, into = os.pipe()
    except OSError:  # no descriptor is to be had
        return 0
    try:
        os.set_blocking(out, False)
        os.set_blocking(into, False)
        for first in range(0, len(memory), _AT_ONCE):
            group = slice(first, min(first + _AT_ONCE, len(memory)))
            part = memory_at(ours[group.start], ours[group.stop] - ours[group.start])
            if len(part) > _PIPE_BYTES or (not gather and os.write(into, part) < len(part)):
                return first
            there = _if_there(memory[group], addresses[group], (into if gather else out,))
            where = (extents.buffer_info()[0] + 2 * extents.itemsize * first,)
            moved = list(map(_writev if gather else _readv, there, where, (group.stop - first,)))
            if not moved:
                raise _taken_away()
            if moved[0] < len(part) or (gather and os.readv(out, [part]) < len(part)):
                return first
        return len(memory)
    finally:
        os.close(out)
        os.close(into)


def _move(
    memory: Sequence[torch.Tensor],
    addresses: Sequence[int],
    to: Sequence[int],
    of: Sequence[int],
    sizes: Sequence[int],
) -> None:
    """Copy by address, from or to tensors of a user's.

    Args:
        memory: The tensors.
        addresses: Where they were.
        to: Where to, for each.
        of: Where from.
        sizes: How many bytes.

    Raises:
        LocalProtocolError: The memory of one was taken away; nothing was read or written there.
    """
    # In groups, since all of one group are copied under the interpreter's lock: a bucket of 4 MiB at once would keep
    # every other thread, heartbeats too, waiting for half a millisecond.
    for first in range(0, len(memory), _AT_ONCE):
        group = slice(first, first + _AT_ONCE)
        if not list(map(_memmove, _if_there(memory[group], addresses[group], to[group]), of[group], sizes[group])):
            raise _taken_away()


class _Part(NamedTuple):
    """A piece of a block that torch copies, and its place in a staged message.

    Attributes:
        block: The block.
        begin: First byte in it.
        staged: Where it is in the message; as long as the piece.
    """

    block: Block
    begin: int
    staged: torch.Tensor

    @property
    def flat(self) -> torch.Tensor:
        """The piece of a dense block, flat uint8."""
        return seam().reach(self.block.bytes(self.begin, self.begin + self.staged.numel()))


def _copy_by_torch(rest: Sequence[_Part], far: Sequence[_Part], staged: torch.Tensor, gather: bool) -> None:
    """Copy pieces to or from a staged message: ``far`` ones are on devices, and it is not; ``rest`` are the others."""
    if rest and seam().on_host(staged):
        _copy_parts(rest, gather=gather)
    elif rest:
        # The message is on a device, and so is the work, whatever else takes part in it.
        seam().run(seam().device_of(staged), partial(_copy_parts, rest, gather=gather))
    for run in _runs(far):
        device = seam().device_of(run[0].block.memory)
        seam().run(device, partial(_gather_run if gather else _scatter_run, run))


def _copy_parts(parts: Sequence[_Part], *, gather: bool) -> None:
    """Copy pieces to or from a staged message, all of it where torch can copy from one to the other."""
    dense = [part for part in parts if part.block.dense]
    if not seam().on_host(parts[0].staged):
        memory = [part.block.memory for part in dense if not seam().on_host(part.block.memory)]
        seam().hold([parts[0].staged, *memory])
    if dense:
        theirs, ours = [part.flat for part in dense], [seam().reach(part.staged) for part in dense]
        # One kernel for many tensors, where there is an accelerator. On the CPU it is a loop, and no slower.
        torch._foreach_copy_(*((ours, theirs) if gather else (theirs, ours)))
    for part in parts:
        if not part.block.dense:
            _copy_with_gaps(part, seam().reach(part.staged), gather)


def _copy_with_gaps(part: _Part, flat: torch.Tensor, gather: bool) -> None:
    """Copy a piece that is not dense to or from flat memory, which may be elsewhere."""
    memory, places = seam().reach(part.block.memory), part.block.places
    if not seam().on_host(part.block.memory):
        seam().hold([part.block.memory])
    if places is not None:
        _copy_indexed(memory, places, part.begin, flat, gather)
    else:
        _copy_strided(memory, part.begin, flat, gather)


# ------------------------------------------------------------------------- between a device and the host


# Between tensors of a device: a copy costs as much as the way there and back of so many bytes, or more. Adam's state is
# like that: each parameter's count of steps is on the host, between momenta that are not.
_MAX_GAP = 64 << 10


def _runs(parts: Sequence[_Part]) -> Iterator[list[_Part]]:
    """Those that follow each other in the message, or nearly, and are on one device: they cross in few copies."""
    # Nothing of another device is between two of a run, whose copies are under way meanwhile: what is there is the
    # host's, and was copied before.
    run: list[_Part] = []
    end, device_of = -1, seam().device_of
    for part in parts:
        begin = _begin(part)
        if run and (begin - end > _MAX_GAP or device_of(part.block.memory) != device_of(run[0].block.memory)):
            yield run
            run = []
        run.append(part)
        end = begin + part.staged.numel()
    if run:
        yield run


# What is not dense is made flat on the device first: so it crosses like the rest, and nobody waits for a copy of its
# own, which torch would make in the middle of a step, and wait for without a limit.
def _gather_run(run: Sequence[_Part]) -> None:
    flats = []
    for part in run:
        if part.block.dense:
            flats.append(part.flat)
        else:
            flats.append(_new_flat(part))
            _copy_with_gaps(part, flats[-1], True)
    seam().to_host(_staged(run), flats, _gaps(run))


def _scatter_run(run: Sequence[_Part]) -> None:
    flats = [part.flat if part.block.dense else _new_flat(part) for part in run]
    seam().to_device(flats, _staged(run), _gaps(run))
    for part, flat in zip(run, flats, strict=True):
        if not part.block.dense:
            _copy_with_gaps(part, flat, False)


def _begin(part: _Part) -> int:
    return int(part.staged.storage_offset())


def _staged(run: Sequence[_Part]) -> torch.Tensor:
    """All of a run in the message, and what lies between."""
    first, last = run[0], run[-1]
    return first.staged.as_strided((_begin(last) + last.staged.numel() - _begin(first),), (1,))


def _gaps(run: Sequence[_Part]) -> list[int]:
    """Bytes between each part and the next one."""
    return [_begin(after) - _begin(part) - part.staged.numel() for part, after in pairwise(run)]


def _new_flat(part: _Part) -> torch.Tensor:
    return torch.empty(part.staged.numel(), dtype=torch.uint8, device=part.block.memory.device)


# No other thread of Python gets a turn in this one, unlike in ``ctypes.memmove``.
_memmove = ctypes.PyDLL(None).memmove
_memmove.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_memmove.restype = None
# Small tensors that are copied before another thread may get one: about 0.1 ms.
_AT_ONCE = 128
# Bytes of a piece, in the mean, up to which :func:`_move_tiny` is quicker, and what a pipe holds.
_TINY_BYTES = 256
_PIPE_BYTES = 64 << 10


def _vector_call(name: str) -> Any:
    call = getattr(ctypes.PyDLL(None), name)
    call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
    call.restype = ctypes.c_ssize_t
    return call


_readv, _writev = _vector_call("readv"), _vector_call("writev")


# Bit patterns are moved, not numbers, and copy_ does not know every dtype: any of the same size will do.
CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def _copy_indexed(flat: torch.Tensor, index: torch.Tensor, begin: int, part: torch.Tensor, gather: bool) -> None:
    size = flat.element_size()
    places = index[begin // size : (begin + part.numel()) // size].to(flat.device)
    if gather:
        part.copy_(flat[places].view(torch.uint8))
    else:
        # Advanced indexing gathers into new memory; there is no ``out=`` for bits of any dtype.
        # A part of a message need not be aligned to the elements.
        flat[places] = part.clone().view(flat.dtype).to(flat.device)


def _copy_strided(strided: torch.Tensor, begin: int, part: torch.Tensor, gather: bool) -> None:
    carrier = CARRIERS[strided.dtype.itemsize]
    flat = part
    if part.storage_offset() % carrier.itemsize:
        flat = torch.empty_like(part) if gather else part.clone()
    copy_elements(strided.view(carrier), begin // carrier.itemsize, flat.view(carrier), to_flat=gather)
    if gather and flat is not part:
        part.copy_(flat)


def copy_elements(strided: torch.Tensor, begin: int, flat: torch.Tensor, *, to_flat: bool) -> None:
    """Copy elements of ``strided``, numbered in row-major order from ``begin``, to or from ``flat``.

    Args:
        strided: Any strides that do not overlap, any device.
        begin: Number of the first element.
        flat: 1-D, contiguous, of the same dtype; its length says how many elements.
        to_flat: Gather into ``flat`` if true, else scatter from it.
    """
    # A message may begin and end in the middle of a row of a row: so cut into a head, whole rows and a tail, at each
    # dimension in turn. The depth is the number of dimensions, at most 64.
    if strided.dim() <= 1:
        part = strided[begin : begin + flat.numel()] if strided.dim() else strided.view(1)
        _copy(part, flat, to_flat)
        return
    row = math.prod(strided.shape[1:])
    done = 0
    while done < flat.numel():
        index, inside = divmod(begin + done, row)
        left = flat.numel() - done
        if inside or left < row:
            count = min(row - inside, left)
            copy_elements(strided[index], inside, flat[done : done + count], to_flat=to_flat)
        else:
            rows = left // row
            count = rows * row
            _copy(strided[index : index + rows], flat[done : done + count].view(rows, *strided.shape[1:]), to_flat)
        done += count


def _copy(strided: torch.Tensor, flat: torch.Tensor, to_flat: bool) -> None:
    if to_flat:
        flat.copy_(strided)
    else:
        strided.copy_(flat)
