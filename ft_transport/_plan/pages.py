"""Which pages fresh memory is made of, and who waits until the system has provided them.

Strategy: a huge page that the system has at hand takes as long as clearing it, and is left to whoever writes to it
first: it is in the processor's cache then. One that has to be put together, or that a hypervisor has taken back and
must provide again, takes many times as long as its bytes on the wire. So now and then one is tried. If it is slow,
small ones are tried, which the system may have in fragments that nobody has taken back; the rest is made of what was
quicker, and provided before bytes come for it.
"""

from __future__ import annotations

import ctypes
import enum
import mmap
import sys
import threading
from bisect import bisect_right
from collections.abc import Callable

from ft_transport._deadline import processor_seconds

__all__ = ["HUGE_PAGE", "Pages"]

# Of x86-64 and of arm64 with pages of 4 KiB; where it is another size the advice is ignored, and nothing is wrong but
# the speed.
HUGE_PAGE = 2 << 20
# What a huge page may take that counts as at hand, 2.5 GB/s. To clear one takes 0.25 ms; one that a hypervisor had to
# provide was seen to take 6 ms, and as many bytes in small pages 1 ms.
_AT_HAND_S = 800e-6
# What is decided at once: a try for each.
_STRETCH = 8 << 20
# But so much goes by one that was slow.
_SLOW_FOR = 256 << 20


class _Way(enum.Enum):
    """How memory is provided."""

    LEFT = enum.auto()  # by whoever writes first, in huge pages
    HUGE = enum.auto()
    SMALL = enum.auto()


class _Mapping:
    """Fresh memory, in stretches; for each how it is provided, None until that is known."""

    __slots__ = ("begin", "end", "ways")

    def __init__(self, begin: int, end: int) -> None:
        self.begin = begin
        self.end = end
        self.ways: list[_Way | None] = [None] * -(-(end - begin) // _STRETCH)

    def stretches(self, begin: int, end: int) -> range:
        """Those that have any of these bytes."""
        return range((begin - self.begin) // _STRETCH, -(-(min(end, self.end) - self.begin) // _STRETCH))

    def bytes_of(self, stretches: range) -> tuple[int, int]:
        """Where these begin and end."""
        return self.begin + stretches.start * _STRETCH, min(self.begin + stretches.stop * _STRETCH, self.end)


class Pages:
    """The pages of some mappings. One thread adds them, before any has them provided."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._mappings: list[_Mapping] = []
        self._lock = threading.Lock()
        self._way = _Way.LEFT
        self._untried = 0  # bytes that still go by the last try

    @property
    def any(self) -> bool:
        """Whether there are mappings at all."""
        return bool(self._mappings)

    def add(self, begin: int, end: int) -> None:
        """Take in a mapping that nobody has touched. Its addresses are multiples of a huge page."""
        _advise(begin, end, _HUGEPAGE)
        index = bisect_right(self._begins, begin)
        self._begins.insert(index, begin)
        self._mappings.insert(index, _Mapping(begin, end))

    def provide(self, begin: int, end: int, *, ahead: bool = False) -> None:
        """Have the system provide memory that is about to be written to, unless that is better left to whoever writes.

        Of memory from elsewhere it does nothing. What is there already stays as it is. Any thread.

        Args:
            begin: The first byte's address.
            end: Behind the last byte's.
            ahead: Whether others will have taken memory before it is written to: then nothing is left.
        """
        index = bisect_right(self._begins, begin) - 1
        if index < 0 or end > self._mappings[index].end:
            return
        mapping = self._mappings[index]
        for stretch in mapping.stretches(begin, end):
            with self._lock:
                way = mapping.ways[stretch] or self._decide(mapping, stretch)
            # The system gives out first what was used last. Tries that run ahead have all that is at hand, and leave to
            # whoever writes what is not.
            if ahead or way is not _Way.LEFT:
                first, last = mapping.bytes_of(range(stretch, stretch + 1))
                _populate(max(first, begin), min(last, end))

    def _decide(self, mapping: _Mapping, stretch: int) -> _Way:
        """Find out how a stretch is provided, and those behind it that go by the same try."""
        first, last = mapping.bytes_of(range(stretch, stretch + 1))
        if self._untried <= 0 and last - first >= 2 * HUGE_PAGE:
            self._try(first)
        following = mapping.stretches(first, first + max(self._untried, 1))
        first, last = mapping.bytes_of(following)
        if self._way is _Way.SMALL:
            # All at once: the system lets nobody advise while a thread is provided with pages, and the other way round.
            _advise(first, last, _NOHUGEPAGE)
        self._untried -= last - first
        mapping.ways[following.start : following.stop] = [self._way] * len(following)
        return self._way

    def _try(self, first: int) -> None:
        huge = _cost(first)
        if huge < _AT_HAND_S:
            self._way = _Way.LEFT
            return
        first += HUGE_PAGE
        _advise(first, first + HUGE_PAGE, _NOHUGEPAGE)
        small = _cost(first)
        _advise(first, first + HUGE_PAGE, _HUGEPAGE)
        self._way, self._untried = _Way.SMALL if small < huge else _Way.HUGE, _SLOW_FOR

    def allow_huge(self) -> None:
        """Let the system make huge pages of all, when it has time for that."""
        if _Way.SMALL in {way for mapping in self._mappings for way in mapping.ways}:
            for mapping in self._mappings:
                _advise(mapping.begin, mapping.end, _HUGEPAGE)


def _cost(begin: int) -> float:
    """Seconds of this thread's that the pages of one huge page take; none where they cannot be asked for."""
    # Of a processor, not of a clock: a thread that had to wait for its turn says nothing of the pages.
    before = processor_seconds()
    return processor_seconds() - before if _populate(begin, begin + HUGE_PAGE) else 0.0


# -------------------------------------------------------------------------------------------- advice


def _populate(begin: int, end: int) -> bool:
    """Have the system provide the pages that these bytes lie in; gives whether it did."""
    begin, end = begin - begin % mmap.PAGESIZE, end + -end % mmap.PAGESIZE
    # Piece by piece: who maps or unmaps memory meanwhile (any large malloc) waits for the end of the call.
    pieces = range(begin, end, HUGE_PAGE)
    return all(_advise(piece, min(piece + HUGE_PAGE, end), _POPULATE_WRITE) for piece in pieces)


def _advise(begin: int, end: int, advice: int) -> bool:
    """Tell the system about memory of this process; gives whether it was heard."""
    # One that does not know the advice, or has no memory, says so, and then the faults come one by one.
    return _madvise is not None and _madvise(begin, end - begin, advice) == 0


def _find_madvise() -> Callable[[int, int, int], int] | None:
    # Not mmap's own method: that keeps the interpreter's lock.
    if sys.platform != "linux":
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    madvise.restype = ctypes.c_int
    return madvise


_madvise = _find_madvise()
# Of Linux. Python names the first two, and the last one from 3.14 on.
_HUGEPAGE, _NOHUGEPAGE = 14, 15
# Linux 5.14; older ones do not know it.
_POPULATE_WRITE = 23
