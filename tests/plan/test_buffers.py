"""Fresh memory, arenas, and buckets."""

from __future__ import annotations

import builtins
import gc
import mmap
import os
import tempfile
from typing import NoReturn

import numpy as np
import pytest
import torch
from helpers import CPU

from ft_transport._plan import buffers
from ft_transport._plan.buffers import Arena, Bucket, ReadOnlyMemory, aligned, allocate
from ft_transport._plan.pages import Pages
from ft_transport._process import physical_bytes


def test_allocate() -> None:
    assert allocate(0, CPU).numel() == 0
    assert allocate(5, CPU).dtype == torch.uint8
    with pytest.raises(MemoryError, match=f"no room for {1 << 60} bytes"):
        allocate(1 << 60, CPU)
    assert physical_bytes() > 1 << 20


def test_storages_from_an_arena_are_apart_aligned_and_of_their_own_size() -> None:
    arena = Arena()
    sizes = [300_001, 5, 40 << 20, 30 << 20, 256 << 10, 100 << 20]
    taken = [arena.allocate(nbytes) for nbytes in sizes]
    assert [tensor.untyped_storage().nbytes() for tensor in taken] == sizes
    for value, tensor in enumerate(taken):
        tensor.fill_(value)
    assert all(bool((tensor == value).all()) for value, tensor in enumerate(taken))
    assert all(tensor.data_ptr() % 64 == 0 for tensor in taken)
    assert taken[0].data_ptr() % (2 << 20) == 0


def test_the_memory_of_an_arena_lives_as_long_as_what_is_in_it() -> None:
    arena = Arena()
    first, second = arena.allocate(1 << 20), arena.allocate(1 << 20)
    first.fill_(3)
    del arena, second
    gc.collect()
    assert bool((first == 3).all())


def test_an_arena_without_room() -> None:
    with pytest.raises(MemoryError, match="no room for"):
        Arena().allocate(1 << 60)


@pytest.mark.parametrize(("nbytes", "expected"), [(0, 0), (1, 64), (63, 64), (64, 64), (65, 128)])
def test_aligned(nbytes: int, expected: int) -> None:
    assert aligned(nbytes) == expected


def test_takes_from_a_bucket_are_apart_and_aligned() -> None:
    bucket = Bucket(CPU)
    bucket.reset(aligned(10) + aligned(64) + aligned(1))
    takes = [bucket.take(nbytes) for nbytes in (10, 64, 1)]
    first = takes[0].data_ptr()
    assert [take.data_ptr() - first for take in takes] == [0, 64, 128]
    assert [take.numel() for take in takes] == [10, 64, 1]


def test_a_bucket_is_reused_and_grows() -> None:
    bucket = Bucket(CPU)
    bucket.reset(128)
    first = bucket.take(64).data_ptr()
    bucket.reset(64)
    assert bucket.take(64).data_ptr() == first
    bucket.reset(1024)
    assert bucket.take(1024).numel() == 1024
    bucket.reset(0)


def test_a_large_bucket_and_its_pages_are_there_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[tuple[int, int]]()
    monkeypatch.setattr(Pages, "provide", lambda _, begin, end: asked.append((begin, end)))
    bucket, large = Bucket(CPU), 16 << 20
    bucket.reset(large - 64)
    bucket.take(large - 64)  # as small ones come from the allocator
    bucket.reset(large)
    assert asked == [], "nothing was taken"
    begin = bucket.take(large).data_ptr()
    assert asked == [(begin, begin + large)]
    bucket.reset(large - 64)
    assert bucket.take(1).data_ptr() == begin
    assert len(asked) == 1, "it is the same memory"


def test_a_bucket_gives_no_more_than_asked_for() -> None:
    bucket = Bucket(CPU)
    with pytest.raises(AssertionError):
        bucket.take(1)
    bucket.reset(64)
    bucket.take(64)
    with pytest.raises(AssertionError):
        bucket.take(1)


def test_memory_goes_from_one_bucket_to_another() -> None:
    given, adopting = Bucket(CPU), Bucket(CPU)
    given.reset(1000)
    given.take(1000).fill_(7)
    flat = given.give()
    adopting.reset(2000)
    taken = adopting.adopt(flat, 1000)
    assert not adopting.untouched
    given.reset(1000)
    given.take(1000).fill_(8)
    assert taken.unique().tolist() == [7]
    adopting.reset(1000)
    assert adopting.untouched
    assert adopting.take(1000).data_ptr() == taken.data_ptr()


MAPPINGS = [(10, 20, False), (20, 30, True), (30, 40, False), (50, 60, False), (70, 80, True)]


def tell_one_by_one(descriptor: int, address: int) -> buffers._Mapping:
    return next((buffers._Mapping(*each) for each in MAPPINGS if address < each[1]), buffers._NO_MAPPING)


# By the newer call, by the text that older systems have alone, and by one after the other.
@pytest.mark.parametrize("most_asked", [64, 0, 1])
@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        ([5, 35, 45], [1]),
        ([25, 15], [1]),
        ([25, 59], [1]),
        ([40, 49], []),
        ([10, 20, 60], [0]),
        ([90, 75, 5], []),
        ([52, 11, 45, 39, 10, 90, 25], [0, 1, 3, 4]),
        ([], []),
    ],
)
def test_read_only_memory_before_between_and_behind(
    monkeypatch: pytest.MonkeyPatch, most_asked: int, addresses: list[int], expected: list[int]
) -> None:
    monkeypatch.setattr(buffers, "_MOST_ASKED", most_asked)
    spans = [(begin, end) for begin, end, writable in MAPPINGS if not writable]
    monkeypatch.setattr(buffers, "_mapping_behind", tell_one_by_one)
    monkeypatch.setattr(buffers, "_read_only", lambda text: tuple(map(list, zip(*spans, strict=True))))
    found = ReadOnlyMemory()
    assert found.among(addresses) == expected
    # Whatever was asked before, and in whatever order.
    assert [index for index, address in enumerate(addresses) if found.holds(address)] == expected
    again = [address for address in reversed(addresses) if found.holds(address)]
    assert again == [addresses[index] for index in reversed(expected)]


def test_the_system_tells_the_same_of_each_mapping_in_either_way() -> None:
    if tuple(map(int, os.uname().release.split(".")[:2])) < (6, 11):
        pytest.skip("this system has nothing but the text")
    with open("/proc/self/maps", "rb", buffering=0) as maps:
        spans = [*zip(*buffers._read_only(maps.readall()), strict=True)]
        assert spans
        # The last page of the text (vsyscall) is the kernel's, and no mapping.
        for begin, end in [(begin, end) for begin, end in spans if end < 1 << 63]:
            for address in (begin, end - 1):
                assert buffers._mapping_behind(maps.fileno(), address) == (begin, end, False)
        mine = torch.zeros(4).data_ptr()
        found = buffers._mapping_behind(maps.fileno(), mine)
        assert found is not None
        assert found.writable
        assert found.begin <= mine < found.end
        behind = buffers._mapping_behind(maps.fileno(), 0)
        assert behind is not None
        assert behind.begin > 0
        assert buffers._mapping_behind(maps.fileno(), (1 << 64) - 1) == buffers._NO_MAPPING


@pytest.mark.parametrize("error", [FileNotFoundError, OSError])
def test_a_system_that_does_not_tell_has_no_read_only_memory_and_one_that_cannot_is_an_error(
    monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    monkeypatch.setattr(builtins, "open", fail)
    found = ReadOnlyMemory()
    if error is FileNotFoundError:
        assert found.among([4096]) == []
        return
    with pytest.raises(OSError, match=r"^$"):
        found.among([4096])
    # Not for ever: there may be a descriptor by then.
    monkeypatch.undo()
    assert found.among([4096]) == []


def test_read_only_memory_is_found_among_many_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryFile() as file:
        file.truncate(mmap.PAGESIZE)
        with mmap.mmap(file.fileno(), mmap.PAGESIZE, prot=mmap.PROT_READ) as mapping:
            array = np.frombuffer(mapping, dtype=np.uint8)
            begin = array.ctypes.data
            mine = [tensor.data_ptr() for tensor in (torch.zeros(4), torch.zeros(5))]
            # The address of what has no elements, at which there is nothing.
            none = torch.empty(0).data_ptr()
            for most_asked in (64, 0):
                monkeypatch.setattr(buffers, "_MOST_ASKED", most_asked)
                found = ReadOnlyMemory()
                assert found.among([mine[0], begin, none, mine[1], begin + mmap.PAGESIZE - 1]) == [1, 4]
                assert found.among([none, begin]) == [1]
                assert found.among(mine) == []
            del array
