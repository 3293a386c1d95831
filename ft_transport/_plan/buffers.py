"""Memory of our own: arenas for fresh leaves, buckets to stage in; and memory that cannot be written to.

Strategy: fresh memory costs page faults, which are several times slower than the wire, so it is asked for in huge
pages (see ``_plan.pages``), and a bucket is used again and again.
"""

from __future__ import annotations

import fcntl
import mmap
import re
import struct
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ft_transport._device import NOTHING, Copies, Streams, seam
from ft_transport._options import CPU, NUM_BUCKETS
from ft_transport._plan.pages import HUGE_PAGE, Pages
from ft_transport._process import address_of

__all__ = ["FROM_ARENA", "Arena", "Bucket", "ReadOnlyMemory", "aligned", "allocate", "by_turns"]


# Fresh memory of this size and more comes from an arena; smaller storages are torch's own.
FROM_ARENA = 256 << 10
# A bucket of this size and more has huge pages.
_HUGE_FROM = 16 << 20
# What an arena asks for at once. Its memory is given back when nothing in it is referred to any more.
_ARENA_BYTES = 64 << 20


def allocate(nbytes: int, device: torch.device, *, pinned: bool = False) -> torch.Tensor:
    """A flat uint8 tensor of ``nbytes`` with undefined content.

    Raises:
        MemoryError: The device has no room for it.
    """
    try:
        # torch raises RuntimeError for want of memory, and OutOfMemoryError, which is one, on an accelerator; whoever
        # calls us wants to tell that from a bug.
        return seam().pinned(nbytes) if pinned else seam().empty_strided((nbytes,), (1,), torch.uint8, device)
    except RuntimeError as exc:
        raise MemoryError(f"no room for {nbytes} bytes on {device}: {exc}") from exc


class Arena:
    """Fresh memory on the CPU, in huge pages where the system has them.

    A page fault costs as much for 2 MiB as for 4 KiB, but tensors rarely start or end on a huge page. So they are
    placed one behind the other, each a storage of its own.

    Attributes:
        pages: Which pages that memory is made of.
    """

    def __init__(self) -> None:
        self.pages = Pages()
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
        # ``frombuffer`` keeps the mapping alive as long as any tensor made of it is: an arena needs no list of who
        # still uses it. Each tensor is a storage of its own, so that ``resize_`` and pickling of one leaf do not drag
        # the others along.
        taken = torch.frombuffer(self._mapping, dtype=torch.uint8, count=nbytes, offset=self._used)
        self._used += aligned(nbytes)
        return taken

    def _map(self, nbytes: int) -> None:
        nbytes = max(nbytes, _ARENA_BYTES)
        size = nbytes + -nbytes % HUGE_PAGE
        try:
            # The kernel merges only aligned runs of 2 MiB; ``mmap`` aligns to 4 KiB. MAP_POPULATE would fault all of it
            # in at once, for states of which half is never fresh; the advice alone costs nothing until a byte lands.
            # One huge page more, so that the first can be at a multiple of its size.
            mapping = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError) as exc:
            raise MemoryError(f"no room for {size} bytes: {exc}") from exc
        first = address_of(mapping)
        self._used = -first % HUGE_PAGE
        # Fresh memory of 1 GiB by ``torch.empty`` takes 0.4 to 1.6 GB/s, page by page; so it takes 3 and more.
        self.pages.add(first + self._used, first + self._used + size)
        self._mapping = mapping


class ReadOnlyMemory:
    """Which addresses of this process cannot be written to: a write there would kill it.

    A template may be mapped from a file (``safetensors``, ``torch.load(mmap=True)``, ``np.memmap`` with mode ``r``),
    and then a write is SIGSEGV. Neither torch nor NumPy tells through a tensor. The system does (Linux): of one mapping
    (6.11 and later), or of all as a text, which takes a millisecond where torch is loaded. Elsewhere nothing counts as
    read-only.
    """

    def __init__(self) -> None:
        self._last = _Mapping(0, 0, True)
        self._num_asked = 0
        self._all: _Spans | None = None

    def holds(self, address: int) -> bool:
        """Whether the address lies in read-only memory; raises as :meth:`among`."""
        begins, ends = self._spans_of((address,))
        return _is_in(begins, ends, address)

    def among(self, addresses: Sequence[int]) -> list[int]:
        """Which of the addresses, by index, lie in read-only memory.

        Raises:
            OSError: The system does not tell, since no descriptor is to be had.
        """
        # Addresses may be 100,000, and the mappings that they are in are few: so these are looked for among those.
        known = sorted(addresses)
        begins, ends = self._spans_of(known)
        first, last = (bisect_right(ends, known[0]), bisect_right(begins, known[-1])) if known else (0, 0)
        mappings = zip(begins[first:last], ends[first:last], strict=True)
        if all(bisect_left(known, begin) == bisect_left(known, end) for begin, end in mappings):
            return []
        return [index for index, address in enumerate(addresses) if _is_in(begins, ends, address)]

    def _spans_of(self, known: Sequence[int]) -> _Spans:
        """All read-only mappings, or at least those that hold one of these sorted addresses."""
        begins: list[int] = []
        ends: list[int] = []
        at = 0
        while self._all is None and at < len(known):
            begin, end, writable = self._last
            if not begin <= known[at] < end:
                self._look(known[at])
                continue
            if not writable:
                begins.append(begin)
                ends.append(end)
            at = bisect_left(known, end, at)
        return self._all or (begins, ends)

    def _look(self, address: int) -> None:
        """Find the mapping that an address is in, or the gap between two; or all of them."""
        self._num_asked += 1
        try:
            with open("/proc/self/maps", "rb", buffering=0) as maps:
                found = _mapping_behind(maps.fileno(), address) if self._num_asked <= _MOST_ASKED else None
                if found is None:
                    self._all = _read_only(maps.readall())
                    return
        except FileNotFoundError:  # no Linux
            self._all = [], []
            return
        self._last = found if found.begin <= address else _Mapping(address, found.begin, True)


class _Mapping(NamedTuple):
    """One of this process's mappings: where it is, and whether it may be written to."""

    begin: int
    end: int
    writable: bool


# Begins and ends, in the order of addresses.
_Spans = tuple[list[int], list[int]]


def _is_in(begins: Sequence[int], ends: Sequence[int], address: int) -> bool:
    """Whether one of some spans has an address in it."""
    index = bisect_right(begins, address) - 1
    return index >= 0 and address < ends[index]


# So many single ones take half as long as the text. What lies in shared memory has a mapping for each tensor.
_MOST_ASKED = 64
# PROCMAP_QUERY of <linux/fs.h>: its size and flags, the address; begin, end and flags of the mapping that was found;
# what is not asked for.
_QUERY = struct.Struct("@6Q56x")
_PROCMAP_QUERY = 0xC0006611 | _QUERY.size << 16
_WRITABLE, _OR_BEHIND = 2, 16
_NO_MAPPING = _Mapping(1 << 64, 1 << 64, True)


def _mapping_behind(maps: int, address: int) -> _Mapping | None:
    """The mapping that an address is in, or the next one; None if the system has nothing but the text.

    Args:
        maps: Descriptor of the text.
        address: 0 to 2^64 - 1.
    """
    query = bytearray(_QUERY.pack(_QUERY.size, _OR_BEHIND, address, 0, 0, 0))
    try:
        fcntl.ioctl(maps, _PROCMAP_QUERY, query)
    except FileNotFoundError:
        return _NO_MAPPING
    except OSError:  # ENOTTY before Linux 6.11; whatever a sandbox gives
        return None
    _, _, _, begin, end, flags = _QUERY.unpack(query)
    return _Mapping(begin, end, bool(flags & _WRITABLE))


def _read_only(text: bytes) -> _Spans:
    found = _READ_ONLY.findall(text)
    return [int(begin, 16) for begin, _ in found], [int(end, 16) for _, end in found]


# Begin and end of a mapping without the permission to write.
_READ_ONLY = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) .-", re.MULTILINE)


class Bucket:
    """Memory on the wire's device that messages are staged in; grows to what one flight needs, then is reused.

    Args:
        device: Of the wire.
        pinned: Whether an accelerator shall be able to reach it directly.
    """

    __slots__ = ("_copies", "_device", "_flat", "_pinned", "_room", "_used")

    def __init__(self, device: torch.device, *, pinned: bool = False) -> None:
        self._device = device
        self._pinned = pinned
        self._flat: torch.Tensor | None = None
        self._room = 0
        self._used = 0
        self._copies = NOTHING

    def lend(self, copies: Copies) -> None:
        """What is in it is copied elsewhere: :meth:`reset` waits until that is over."""
        self._copies = copies

    def reset(self, nbytes: int) -> None:
        """Give back everything taken: ``nbytes``, in takes of :func:`aligned` sizes, may be taken from now on.

        Raises:
            TransferTimeout: What was in it was still being copied elsewhere at the deadline.
        """
        self._copies.finish()
        self._copies = NOTHING
        self._used = 0
        self._room = nbytes

    def _have_room(self) -> torch.Tensor:
        # Only now: of what is moved as it lies nothing is taken, and whoever resets need not know which that is.
        nbytes = self._room
        # It never shrinks: flights of one transfer are of about one size, and the bucket ends with the transfer.
        if self._flat is None or self._flat.numel() < nbytes:
            assert not self._used, "reset() comes first"
            self._flat = None  # before the new one is allocated
            # In huge pages where nobody else has a say: faults of 64 MiB, page by page, cost more than the copies. Not
            # for a lane's few MiB: one that the system has to provide first takes longer than all of them.
            mine = self._device.type == "cpu" and not self._pinned and nbytes >= _HUGE_FROM
            self._flat = _provided(nbytes) if mine else allocate(nbytes, self._device, pinned=self._pinned)
        return self._flat

    @property
    def untouched(self) -> bool:
        """Whether nothing was taken since the last :meth:`reset`."""
        return self._used == 0

    def give(self) -> torch.Tensor:
        """Its memory, which is not the bucket's any more: that takes other memory at the next :meth:`reset`."""
        assert self._flat is not None, "take() comes first"
        given, self._flat = self._flat, None
        return given

    def adopt(self, flat: torch.Tensor, nbytes: int) -> torch.Tensor:
        """Have the memory that another bucket gave, in place of its own; gives the first ``nbytes`` as taken."""
        self._flat, self._room, self._used = flat, flat.numel(), 0
        return self.take(nbytes)

    def take(self, nbytes: int) -> torch.Tensor:
        """The next ``nbytes`` as a flat uint8 tensor, aligned to 64 bytes.

        Raises:
            MemoryError: There is no room.
        """
        taken = self._have_room()[self._used : self._used + nbytes]
        assert taken.numel() == nbytes, "more taken than asked for in reset()"
        self._used += aligned(nbytes)
        return taken


def _provided(nbytes: int) -> torch.Tensor:
    """Memory as an arena's that is about to be written to."""
    arena = Arena()
    flat = arena.allocate(nbytes)
    arena.pages.provide(flat.data_ptr(), flat.data_ptr() + nbytes)
    return flat


def by_turns(streams: Streams) -> deque[Bucket]:
    """Buckets on the host for who copies one message at a time: the first one's turn is over when it is last.

    One will do. But what crosses between host and accelerator does so while the next message is on the wire: two.
    """
    return deque(Bucket(CPU, pinned=streams.cross) for _ in range(NUM_BUCKETS if streams.cross else 1))


def aligned(nbytes: int) -> int:
    """``nbytes`` rounded up to 64 bytes, what one take from a bucket uses."""
    # A cache line, and what AVX-512 loads at once. torch's own allocator aligns alike.
    return nbytes + -nbytes % 64
