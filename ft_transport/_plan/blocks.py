"""Memory that bytes are taken from, staged in, and land in.

Strategy: fresh memory costs page faults, which are several times slower than the wire, so it is asked for in huge
pages. Thousands of small tensors are copied by address, because a view of each would cost more than its bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import math
import mmap
import os
import re
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, compress, repeat, starmap
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ft_transport._plan.lent import readers_of
from ft_transport.errors import LocalProtocolError

__all__ = [
    "CPU",
    "FROM_ARENA",
    "Arena",
    "Block",
    "Bucket",
    "CARRIERS",
    "Held",
    "Places",
    "ReadOnlyMemory",
    "Room",
    "aligned",
    "allocate",
    "copy_blocks",
    "copy_elements",
    "held",
    "indexed",
    "memory_at",
    "no_collection",
    "undisturbed",
    "physical_bytes",
    "room",
    "share",
    "storage_as",
]

CPU = torch.device("cpu")

_HUGE_PAGE = 2 << 20
# Fresh memory of this size and more comes from an arena; smaller storages are torch's own.
FROM_ARENA = 256 << 10
# What an arena asks for at once. Its memory is given back when nothing in it is referred to any more.
_ARENA_BYTES = 64 << 20


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


def held(blocks: Sequence[Block]) -> list[Block]:
    """These blocks of a user's memory, with what it takes to see that it is taken away."""
    memory = list(map(itemgetter(0), blocks))
    storages = list(map(torch.Tensor.untyped_storage, memory))
    places = map(_base_of, storages), map(_nbytes_of, storages), map(torch.Tensor.data_ptr, memory)
    rows = zip(memory, map(itemgetter(1), blocks), map(itemgetter(2), blocks), storages, *places, strict=True)
    return list(map(tuple.__new__, repeat(Block), rows))


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
        enter, leave, before = readers.enter, readers.leave, readers.turn
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


def _if_there(blocks: Sequence[Block], items: Sequence[Any]) -> Iterable[Any]:
    """The items, none if the memory of one of the blocks is not there when the first item is asked for.

    No step of this is Python's, so nobody takes the memory away before a function of C has had the last item.
    """
    storages = list(map(itemgetter(3), blocks))
    noted = list(map(itemgetter(4, 5, 6), blocks))
    memory = map(itemgetter(0), blocks)
    now = zip(map(_base_of, storages), map(_nbytes_of, storages), map(torch.Tensor.data_ptr, memory), strict=False)
    return chain.from_iterable(compress((items,), map(noted.__eq__, map(list, (now,)))))


_base_of = torch.UntypedStorage.data_ptr
_nbytes_of = torch.UntypedStorage.nbytes


class Places:
    """Where the memory of some tensors is.

    A storage that gets another size moves, as all that torch's allocators do is to take new memory before they give
    back the old; and its address is nobody else's as long as it is kept. So addresses tell all.

    Args:
        tensors: A user's.
        addresses: Of the first byte of each.
        storages: Of each, to be kept.
    """

    def __init__(
        self, tensors: Sequence[torch.Tensor], addresses: list[int], storages: Sequence[torch.UntypedStorage]
    ) -> None:
        self._tensors = tensors
        self._addresses = addresses
        self._storages = storages

    @classmethod
    def of(cls, blocks: Sequence[Block]) -> Places:
        """Of tensors whose blocks :func:`held` has made."""
        columns = [list(map(itemgetter(column), blocks)) for column in (0, 6, 3)]
        return cls(*columns)

    def moved(self) -> list[int]:
        """Which of the tensors have other memory now, or less or more."""
        addresses = list(map(torch.Tensor.data_ptr, self._tensors))
        if addresses == self._addresses:
            return []
        return [index for index, (a, b) in enumerate(zip(addresses, self._addresses, strict=True)) if a != b]


def share(tensors: Iterable[torch.Tensor]) -> None:
    """Move what lies on the CPU into memory that other processes can see, where it does not lie there yet.

    A group in a process of its own (torchft's Baby groups) does so with all that it is given, in place; done before
    addresses are noted, nothing seems to be taken away.
    """
    for storage in (tensor.untyped_storage() for tensor in tensors if tensor.is_cpu):
        if storage.nbytes() and not storage.is_shared():
            storage.share_memory_()


def memory_at(address: int, nbytes: int) -> memoryview:
    """Memory of this process, whose owner the caller keeps."""
    view: memoryview = _view_of_memory(address, nbytes, _PyBUF_WRITE)
    return view


# An array of ctypes would be a new class for each length.
_view_of_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_view_of_memory.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int]
_view_of_memory.restype = ctypes.py_object
_PyBUF_WRITE = 0x200


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
    flat = torch.empty(0, dtype=dtype, device=tensor.device)
    return flat.set_(storage, 0, (storage.nbytes() // dtype.itemsize,), (1,))


def copy_blocks(parts: Sequence[tuple[Block, int, int]], staged: torch.Tensor, *, gather: bool) -> None:
    """Copy pieces of blocks to or from the bytes of one staged message.

    Args:
        parts: Block, first byte in it, number of bytes; in the order of the message.
        staged: The message, flat uint8.
        gather: Into the message if true, else out of it.

    Raises:
        LocalProtocolError: Memory of a block was taken away; nothing was read or written there.
    """
    rest = []
    blocks, moves = [], []
    done = 0
    address = staged.data_ptr() if staged.device.type == "cpu" else 0
    for block, begin, nbytes in parts:
        if address and block.dense and block.storage is not None and block.memory.is_cpu:
            theirs, ours = block.address + begin, address + done
            blocks.append(block)
            moves.append((ours, theirs, nbytes) if gather else (theirs, ours, nbytes))
        else:
            if not block.here:
                raise _taken_away()
            rest.append((block, begin, staged[done : done + nbytes]))
        done += nbytes
    for first in range(0, len(moves), _AT_ONCE):
        group = slice(first, first + _AT_ONCE)
        if not list(starmap(_memmove, _if_there(blocks[group], moves[group]))):
            raise _taken_away()
    flats = [(block.bytes(begin, begin + part.numel()), part) for block, begin, part in rest if block.dense]
    if flats:
        theirs_, ours_ = map(list, zip(*flats, strict=True))
        torch._foreach_copy_(*((ours_, theirs_) if gather else (theirs_, ours_)))
    for block, begin, part in rest:
        if block.places is not None:
            _copy_indexed(block.memory, block.places, begin, part, gather)
        elif not block.dense:
            _copy_strided(block.memory, begin, part, gather)


# No other thread of Python gets a turn in this one, unlike in ``ctypes.memmove``.
_memmove = ctypes.PyDLL(None).memmove
_memmove.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_memmove.restype = None
# Small tensors that are copied before another thread may get one: about 0.1 ms.
_AT_ONCE = 128


# Bit patterns are moved, not numbers, and copy_ does not know every dtype: any of the same size will do.
CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def _copy_indexed(flat: torch.Tensor, index: torch.Tensor, begin: int, part: torch.Tensor, gather: bool) -> None:
    size = flat.element_size()
    places = index[begin // size : (begin + part.numel()) // size].to(flat.device)
    if gather:
        part.copy_(flat[places].view(torch.uint8))
    else:
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


# ---------------------------------------------------------------------------------------- collection

_collection_lock = threading.Lock()
_collection_holders = 0
_collection_was_on = False


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Hold back Python's cyclic garbage collector.

    Describing a state makes hundreds of thousands of small objects and no cycle; the collector would walk through all
    of them, again and again, which takes longer than the describing.
    """
    global _collection_holders, _collection_was_on
    with _collection_lock:
        if _collection_holders == 0:
            _collection_was_on = gc.isenabled()
            gc.disable()
        _collection_holders += 1
    try:
        yield
    finally:
        with _collection_lock:
            _collection_holders -= 1
            if _collection_holders == 0 and _collection_was_on:
                gc.enable()


_overrides: Any = torch.overrides


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Put aside what this thread has told torch to do otherwise: a default device, inference mode, modes that see or
    replace every operation. What is made for a transfer is what it says it is, and can be trained with."""
    functions: list[Any] = []
    try:
        while _overrides._len_torch_function_stack():
            functions.append(_overrides._pop_mode())
        with torch.inference_mode(False), _disable_current_modes():
            yield
    finally:
        for mode in reversed(functions):
            _overrides._push_mode(mode)


# --------------------------------------------------------------------------------------- fresh memory


@functools.cache
def _machine_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE


class Room(NamedTuple):
    """How much memory there is, and whose limit that is, for an error."""

    nbytes: int
    of: str


def physical_bytes(root: str = "/") -> int:
    """What this process may have at most, which no honest state exceeds: the least of the machine's memory and the
    limits of its memory cgroups.

    Args:
        root: Where ``/proc`` and ``/sys`` are; for tests.
    """
    return min([_machine_bytes(), *(group.limit for group in _cgroups(root))])


def room(root: str = "/") -> Room:
    """What this process may take now without being killed for it: the least of the machine's memory and what each of
    its memory cgroups has left.

    A cgroup's use counts without the page cache and what else its kernel gives back under pressure. Swap does not
    count. Of the machine all memory counts, whoever uses it now.
    """
    rooms = [Room(_machine_bytes(), "this machine has")]
    for limit, used, path in _cgroups(root):
        left = max(0, limit - used)
        rooms.append(Room(left, f"the memory cgroup {path} has left ({left} of its {limit})"))
    return min(rooms)


class _Cgroup(NamedTuple):
    limit: int
    used: int
    path: str


class _Files(NamedTuple):
    """Where a version of cgroups says what we ask."""

    limit: str
    current: str
    reclaimable: tuple[str, ...]


_CGROUP_1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))
_CGROUP_2 = _Files("memory.max", "memory.current", ("active_file", "inactive_file", "slab_reclaimable"))


def _cgroups(root: str) -> Iterator[_Cgroup]:
    """The memory cgroups of this process and their ancestors, as far as they are mounted and have a limit."""
    try:
        with open(os.path.join(root, "proc/self/cgroup"), encoding="utf-8") as lines:
            entries = [line.rstrip("\n").split(":", 2) for line in lines]
        with open(os.path.join(root, "proc/self/mountinfo"), encoding="utf-8") as lines:
            mounts = [line.split() for line in lines]
    except (OSError, ValueError):
        return  # no Linux, or no /proc
    for entry in entries:
        if len(entry) != 3:
            continue
        _, controllers, path = entry
        version = 2 if not controllers else 1 if "memory" in controllers.split(",") else 0
        for mount in mounts if version else ():
            if _has_memory(mount, version):
                yield from _along(root, mount[4], _below(mount[3], path), _CGROUP_2 if version == 2 else _CGROUP_1)


def _has_memory(mount: list[str], version: int) -> bool:
    if "-" not in mount[6:]:
        return False
    kind, *more = mount[mount.index("-", 6) + 1 :] or [""]
    return kind == "cgroup2" if version == 2 else kind == "cgroup" and "memory" in ",".join(more).split(",")


def _below(mounted: str, path: str) -> list[str]:
    """The names that lead from a mount to a cgroup. In a container, what is mounted may be a part of the tree."""
    inside = path == mounted or path.startswith(mounted.rstrip("/") + "/")
    names = (path[len(mounted.rstrip("/")) :] if inside else path).split("/")
    return [] if ".." in names else [name for name in names if name]


def _along(root: str, mount_point: str, names: list[str], files: _Files) -> Iterator[_Cgroup]:
    for depth in range(len(names), -1, -1):
        path = "/".join([mount_point, *names[:depth]])
        folder = os.path.join(root, path.lstrip("/"))
        limit = _number(os.path.join(folder, files.limit))
        if limit is not None and limit < _machine_bytes():
            used = _number(os.path.join(folder, files.current)) or 0
            yield _Cgroup(limit, max(0, used - _reclaimable(os.path.join(folder, "memory.stat"), files)), path)


def _number(file: str) -> int | None:
    """The number in a file; None where there is none, as in ``max``."""
    try:
        with open(file, encoding="ascii") as text:
            return int(text.read())
    except (OSError, ValueError):
        return None


def _reclaimable(file: str, files: _Files) -> int:
    try:
        with open(file, encoding="ascii") as lines:
            fields = [line.split() for line in lines]
        return sum(int(field[1]) for field in fields if len(field) == 2 and field[0] in files.reclaimable)
    except (OSError, ValueError):
        return 0


def allocate(nbytes: int, device: torch.device, *, pinned: bool = False) -> torch.Tensor:
    """A flat uint8 tensor of ``nbytes`` with undefined content.

    Raises:
        MemoryError: The device has no room for it.
    """
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device=device, pin_memory=pinned)
    except RuntimeError as exc:
        raise MemoryError(f"no room for {nbytes} bytes on {device}: {exc}") from exc


class Arena:
    """Fresh memory on the CPU, in huge pages where the system has them.

    A page fault costs as much for 2 MiB as for 4 KiB, but tensors rarely start or end on a huge page. So they are
    placed one behind the other, each a storage of its own.
    """

    def __init__(self) -> None:
        self._mapping: mmap.mmap | None = None
        self._used = 0

    def allocate(self, nbytes: int) -> torch.Tensor:
        """A flat uint8 tensor of ``nbytes``, aligned to 64 bytes, with undefined content.

        Raises:
            MemoryError: There is no room for it.
        """
        if nbytes < FROM_ARENA:
            return allocate(nbytes, torch.device("cpu"))
        if self._mapping is None or len(self._mapping) - self._used < nbytes:
            self._map(nbytes)
        assert self._mapping is not None
        taken = torch.frombuffer(self._mapping, dtype=torch.uint8, count=nbytes, offset=self._used)
        self._used += aligned(nbytes)
        return taken

    def _map(self, nbytes: int) -> None:
        nbytes = max(nbytes, _ARENA_BYTES)
        size = nbytes + -nbytes % _HUGE_PAGE
        try:
            # One huge page more, so that the first can be at a multiple of its size.
            mapping = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError) as exc:
            raise MemoryError(f"no room for {size} bytes: {exc}") from exc
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel that has none
                mapping.madvise(mmap.MADV_HUGEPAGE)
        first = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        self._used = -first % _HUGE_PAGE
        self._mapping = mapping


# ---------------------------------------------------------------------------------- read-only memory


class ReadOnlyMemory:
    """Which addresses of this process cannot be written to: a write there would kill it.

    Looked up once, at the first question, where the system tells (Linux); elsewhere nothing counts as read-only.
    """

    def __init__(self) -> None:
        self._begins: list[int] | None = None
        self._ends: list[int] = []

    def holds(self, address: int) -> bool:
        """Whether the address lies in read-only memory."""
        if self._begins is None:
            self._look()
        assert self._begins is not None
        index = bisect_right(self._begins, address) - 1
        return index >= 0 and address < self._ends[index]

    def _look(self) -> None:
        self._begins, self._ends = [], []
        try:
            with open("/proc/self/maps", "rb") as maps:
                found = _READ_ONLY.findall(maps.read())
        except OSError:
            return
        for begin, end in found:
            self._begins.append(int(begin, 16))
            self._ends.append(int(end, 16))


# Begin and end of a mapping without the permission to write, in the order of addresses.
_READ_ONLY = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) .-", re.MULTILINE)


# -------------------------------------------------------------------------------------------- staging


class Bucket:
    """Memory on the wire's device that messages are staged in; grows to what one flight needs, then is reused.

    Args:
        device: Of the wire.
        pinned: Whether an accelerator, if there is one, shall be able to reach it directly.
    """

    __slots__ = ("_device", "_flat", "_pinned", "_used")

    def __init__(self, device: torch.device, *, pinned: bool = False) -> None:
        self._device = device
        self._pinned = pinned and torch.accelerator.is_available()
        self._flat: torch.Tensor | None = None
        self._used = 0

    def reset(self, nbytes: int) -> None:
        """Give back everything taken, and have room for ``nbytes`` in takes of :func:`aligned` sizes."""
        self._used = 0
        if nbytes and (self._flat is None or self._flat.numel() < nbytes):
            self._flat = None  # before the new one is allocated
            self._flat = allocate(nbytes, self._device, pinned=self._pinned)

    @property
    def untouched(self) -> bool:
        """Whether nothing was taken since the last :meth:`reset`."""
        return self._used == 0

    def take(self, nbytes: int) -> torch.Tensor:
        """The next ``nbytes`` as a flat uint8 tensor, aligned to 64 bytes."""
        assert self._flat is not None, "reset() comes first"
        taken = self._flat[self._used : self._used + nbytes]
        assert taken.numel() == nbytes, "more taken than asked for in reset()"
        self._used += aligned(nbytes)
        return taken


def aligned(nbytes: int) -> int:
    """``nbytes`` rounded up to 64 bytes, what one take from a bucket uses."""
    return nbytes + -nbytes % 64
