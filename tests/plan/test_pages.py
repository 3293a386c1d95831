"""Which pages fresh memory is made of: what the system is asked for, and what is there afterwards."""

from __future__ import annotations

import ctypes
import mmap
import threading

import pytest

from ft_transport._plan import pages
from ft_transport._plan.pages import HUGE_PAGE, Pages
from ft_transport._process import address_of

MIB = 1 << 20
HUGE, SMALL, PROVIDE = 14, 15, 23


class System:
    """Linux, and how long its pages take: whoever has provided some is told so by the clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[int, int, int]] = []  # advice, MiB from the mapping's begin, MiB
        self.seconds: list[float] = []  # what each of the next huge pages' worth takes, the last of them for ever
        self.knows = True
        self._spent = 0.0
        self._real = pages._madvise
        self._mapping = mmap.mmap(-1, 1024 * MIB + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.begin = address_of(self._mapping) + -address_of(self._mapping) % HUGE_PAGE
        monkeypatch.setattr(pages, "_madvise", self._advise)
        monkeypatch.setattr(pages, "processor_seconds", lambda: self._spent)

    def _advise(self, begin: int, nbytes: int, advice: int) -> int:
        self.asked.append((advice, (begin - self.begin) // MIB, nbytes // MIB))
        if advice == PROVIDE:
            self._spent += self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]
            if not self.knows:
                return -1
        assert self._real is not None
        return self._real(begin, nbytes, advice)

    def provide(self, fresh: Pages, first: int, nbytes: int, *, ahead: bool = False) -> list[tuple[int, int, int]]:
        """What is asked for when some MiB are about to be written to."""
        self.asked.clear()
        fresh.provide(self.begin + first * MIB, self.begin + (first + nbytes) * MIB, ahead=ahead)
        return self.asked

    def resident(self, first: int, nbytes: int) -> int:
        """How many of some MiB are in memory, in bytes."""
        flags = (ctypes.c_ubyte * (nbytes * MIB // mmap.PAGESIZE))()
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(self.begin + first * MIB), ctypes.c_size_t(nbytes * MIB), flags) == 0
        return sum(flag & 1 for flag in flags) * mmap.PAGESIZE

    def write(self, first: int, data: bytes) -> None:
        ctypes.memmove(self.begin + first * MIB, data, len(data))

    def read(self, first: int, nbytes: int) -> bytes:
        return ctypes.string_at(self.begin + first * MIB, nbytes)


def _provides() -> bool:
    with mmap.mmap(-1, HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapping:
        begin = address_of(mapping)
        return pages._populate(begin, begin + mmap.PAGESIZE)


if not _provides():
    pytest.skip("this system provides no pages ahead", allow_module_level=True)


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> System:
    return System(monkeypatch)


@pytest.fixture
def fresh(system: System) -> Pages:
    made = Pages()
    made.add(system.begin, system.begin + 1024 * MIB)
    assert system.asked == [(HUGE, 0, 1024)]
    return made


def test_pages_at_hand_are_left_to_who_writes(system: System, fresh: Pages) -> None:
    """Of each stretch one is tried, the first time that it is asked for."""
    system.seconds = [0.0003]
    assert system.provide(fresh, 0, 4) == [(PROVIDE, 0, 2)]
    assert system.provide(fresh, 4, 4) == []
    assert system.provide(fresh, 8, 4) == [(PROVIDE, 8, 2)]
    assert system.resident(0, 16) == 4 * MIB


def test_ahead_of_who_writes_nothing_is_left(system: System, fresh: Pages) -> None:
    """What one in four says of the others holds for the moment: by the time that bytes come, it may not."""
    system.seconds = [0.0003]
    assert system.provide(fresh, 0, 4, ahead=True) == [(PROVIDE, 0, 2), (PROVIDE, 0, 2), (PROVIDE, 2, 2)]
    assert system.provide(fresh, 4, 4, ahead=True) == [(PROVIDE, 4, 2), (PROVIDE, 6, 2)]
    assert system.resident(0, 16) == 8 * MIB


def test_slow_huge_pages_give_way_to_small_ones(system: System, fresh: Pages) -> None:
    system.seconds = [0.006, 0.001]
    asked = system.provide(fresh, 0, 4)
    assert asked[:4] == [(PROVIDE, 0, 2), (SMALL, 2, 2), (PROVIDE, 2, 2), (HUGE, 2, 2)]
    assert asked[4:] == [(SMALL, 0, 256), (PROVIDE, 0, 2), (PROVIDE, 2, 2)]
    assert system.provide(fresh, 4, 4) == [(PROVIDE, 4, 2), (PROVIDE, 6, 2)]
    assert system.resident(0, 8) == 8 * MIB
    assert system.resident(8, 8) == 0
    # All that goes by one try, and no more.
    assert all(advice == PROVIDE for advice, *_ in system.provide(fresh, 8, 248))
    system.seconds = [0.0003]
    assert system.provide(fresh, 256, 4) == [(PROVIDE, 256, 2)]
    assert system.provide(fresh, 260, 4) == []


def test_slow_huge_pages_where_small_ones_are_slower(system: System, fresh: Pages) -> None:
    system.seconds = [0.006, 0.007]
    asked = system.provide(fresh, 0, 8)
    assert asked[3:] == [(HUGE, 2, 2), *[(PROVIDE, first, 2) for first in (0, 2, 4, 6)]]
    assert system.provide(fresh, 8, 4) == [(PROVIDE, 8, 2), (PROVIDE, 10, 2)]


def test_what_a_try_says_holds_for_the_next_mapping(system: System) -> None:
    fresh = Pages()
    # In the order of addresses or not.
    for first in (64, 0, 128):
        fresh.add(system.begin + first * MIB, system.begin + (first + 64) * MIB)
    system.seconds = [0.006, 0.001]
    system.provide(fresh, 0, 4)
    assert (SMALL, 0, 64) in system.asked
    assert system.provide(fresh, 64, 2) == [(SMALL, 64, 64), (PROVIDE, 64, 2)]
    assert system.provide(fresh, 190, 2) == [(SMALL, 184, 8), (PROVIDE, 190, 2)]


def test_a_system_that_provides_nothing_ahead(system: System, fresh: Pages) -> None:
    """An older Linux: huge pages, by whoever writes."""
    system.knows, system.seconds = False, [0.006]
    assert system.provide(fresh, 0, 8) == [(PROVIDE, 0, 2)]
    assert system.resident(0, 8) == 0
    fresh.allow_huge()
    assert len(system.asked) == 1


@pytest.mark.usefixtures("system")
def test_a_system_without_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_madvise", None)
    fresh = Pages()
    fresh.add(0, 64 * MIB)
    fresh.provide(0, 64 * MIB)
    fresh.allow_huge()


@pytest.mark.parametrize(("first", "nbytes"), [(0, 64), (60, 8), (120, 16), (128, 8), (200, 8)])
def test_memory_from_elsewhere(system: System, first: int, nbytes: int) -> None:
    fresh = Pages()
    assert not fresh.any
    fresh.add(system.begin + 64 * MIB, system.begin + 128 * MIB)
    assert fresh.any
    assert system.provide(fresh, first, nbytes) == []


def test_what_was_written_stays(system: System, fresh: Pages) -> None:
    """A message may be fetched again, and messages share pages."""
    system.write(0, b"a" * 5000)
    system.write(3, b"b" * 5000)
    system.write(9, b"c" * 5000)
    system.seconds = [0.006, 0.001]
    begin = system.begin + 4321
    fresh.provide(begin, begin + 10 * MIB)
    assert system.resident(0, 10) == 10 * MIB
    assert system.read(0, 5001) == b"a" * 5000 + bytes(1)
    assert system.read(3, 5001) == b"b" * 5000 + bytes(1)
    assert system.read(9, 5001) == b"c" * 5000 + bytes(1)


def test_no_more_is_provided_than_was_asked_for(system: System, fresh: Pages) -> None:
    """But for the two that are tried."""
    system.seconds = [0.006, 0.001]
    begin = system.begin + 20 * MIB + 5
    fresh.provide(begin, begin + MIB)
    assert system.resident(16, 4) == 4 * MIB
    assert system.resident(0, 16) == 0
    assert system.resident(20, 12) == MIB + mmap.PAGESIZE


def test_in_the_end_the_system_may_make_huge_pages(system: System, fresh: Pages) -> None:
    system.seconds = [0.0003]
    system.provide(fresh, 0, 4)
    system.asked.clear()
    fresh.allow_huge()
    assert system.asked == [], "nobody has said otherwise"
    system.seconds = [0.006, 0.001]
    system.provide(fresh, 8, 4)
    system.asked.clear()
    fresh.allow_huge()
    assert system.asked == [(HUGE, 0, 1024)]


def test_several_threads_provide_all_of_it(system: System, fresh: Pages) -> None:
    """The lanes of a destination, each for other messages."""
    system.seconds = [0.006]
    begin = threading.Barrier(4)

    def run(first: int) -> None:
        begin.wait(10)
        for at in range(first, 256, 16):
            fresh.provide(system.begin + at * MIB, system.begin + (at + 4) * MIB)

    threads = [threading.Thread(target=run, args=(first,)) for first in (0, 4, 8, 12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert system.resident(0, 256) == 256 * MIB
