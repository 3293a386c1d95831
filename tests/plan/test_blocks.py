"""Blocks, buckets, copies of any strides, and fresh memory."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import CPU, noise, raw_bytes
from states import DTYPES

from ft_transport._plan.blocks import Block, Held, Places, copy_blocks, copy_elements, held, storage_as
from ft_transport._plan.buffers import Arena, Bucket, aligned, allocate
from ft_transport._process import no_collection, physical_bytes, room
from ft_transport._state.describe import describe
from ft_transport.errors import LocalProtocolError

STRIDED = {
    "contiguous": lambda: noise((3, 4, 5), 1),
    "permuted": lambda: noise((3, 4, 5), 1).permute(2, 0, 1),
    "gaps": lambda: noise((6, 8, 10), 1)[::2, 1:5, ::2],
    "one dimension": lambda: noise(30, 1)[::3],
    "no dimension": lambda: noise(5, 1)[3],
    "size one": lambda: noise((4, 1, 3), 1).transpose(0, 1),
}


@pytest.mark.parametrize("name", STRIDED)
def test_elements_from_any_place_there_and_back(name: str) -> None:
    strided = STRIDED[name]()
    flat = strided.reshape(-1).clone()
    for begin in range(flat.numel()):
        for count in {0, 1, 2, 7, 19, flat.numel() - begin}:
            if begin + count > flat.numel() or (count == 0 and strided.dim() == 0):
                continue
            got = torch.zeros(count)
            copy_elements(strided, begin, got, to_flat=True)
            assert raw_bytes(got) == raw_bytes(flat[begin : begin + count])
            target = torch.zeros_like(strided).as_strided(strided.shape, torch.zeros(strided.shape).stride())
            copy_elements(target, begin, flat[begin : begin + count], to_flat=False)
            expected = torch.zeros_like(flat)
            expected[begin : begin + count] = flat[begin : begin + count]
            assert raw_bytes(target.reshape(-1)) == raw_bytes(expected)


def test_scattering_leaves_the_gaps_alone() -> None:
    base = noise(40, 1)
    before = raw_bytes(base[1::2])
    copy_elements(base[::2], 3, noise(10, 2), to_flat=False)
    assert raw_bytes(base[1::2]) == before
    assert raw_bytes(base[::2][3:13]) == raw_bytes(noise(10, 2))


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 8, 16])
def test_blocks_of_every_dtype_at_every_alignment(name: str, offset: int) -> None:
    dtype = DTYPES[name]
    dense, gaps = noise(8, 1, dtype), noise((4, 4), 2, dtype)[:, :2]
    blocks = [Block(dense), Block(gaps, dense=False)]
    nbytes = 8 * dtype.itemsize
    parts = [(block, 0, nbytes) for block in blocks]
    staged = torch.zeros(2 * nbytes + offset, dtype=torch.uint8)[offset:]
    copy_blocks(parts, staged, gather=True)
    assert raw_bytes(staged) == raw_bytes(dense) + raw_bytes(gaps)
    other = [noise(8, 3, dtype), noise((4, 4), 4, dtype)[:, :2]]
    copy_blocks([(Block(other[0]), 0, nbytes), (Block(other[1], dense=False), 0, nbytes)], staged, gather=False)
    assert [raw_bytes(tensor) for tensor in other] == [raw_bytes(dense), raw_bytes(gaps)]


def test_parts_of_blocks() -> None:
    dense, gaps = noise((4, 8), 1).t(), noise((8, 8), 2)[:, ::2]
    staged = torch.zeros(40, dtype=torch.uint8)
    copy_blocks([(Block(dense), 5, 8), (Block(gaps, dense=False), 12, 32)], staged, gather=True)
    assert raw_bytes(staged) == raw_bytes(dense.t())[5:13] + raw_bytes(gaps)[12:44]


def test_the_bytes_of_a_dense_block_share_its_memory() -> None:
    base = noise(20, 1)
    part = Block(base[4:10].view(2, 3).t()).bytes(4, 12)
    part.zero_()
    assert raw_bytes(base[5:7]) == bytes(8)
    assert bytes(4) not in (raw_bytes(base[4]), raw_bytes(base[7]))


def test_a_storage_as_another_dtype() -> None:
    base = noise(9, 1)
    whole = storage_as(base[3:5], torch.uint8)
    assert raw_bytes(whole) == raw_bytes(base)
    assert whole.data_ptr() == base.data_ptr()
    assert storage_as(base, torch.int64).numel() == 4
    assert storage_as(torch.nn.Parameter(base), torch.uint8).numel() == 36
    with pytest.raises(TypeError, match="plain tensor"):
        storage_as(torch.ones(2).as_subclass(type("Sub", (torch.Tensor,), {})), torch.uint8)


def test_allocate() -> None:
    assert allocate(0, CPU).numel() == 0
    assert allocate(5, CPU).dtype == torch.uint8
    with pytest.raises(MemoryError, match=f"no room for {1 << 60} bytes"):
        allocate(1 << 60, CPU)
    assert physical_bytes() > 1 << 20


VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = ("memory.max", "memory.current", "inactive_file")


def cgroups(root: Path, version: int, path: str, limits: dict[str, tuple[object, int, int]], mounted: str = "/") -> str:
    """A tree as the kernel shows it: for each folder below the mount, limit, bytes in use, bytes of page cache."""
    mount = "/sys/fs/cgroup" if version == 2 else "/sys/fs/cgroup/memory"
    kind = "cgroup2 cgroup2 rw" if version == 2 else "cgroup cgroup rw,memory"
    (root / "proc/self").mkdir(parents=True)
    lines = f"0::{path}" if version == 2 else f"9:name=systemd:/\n5:cpu:/other\n4:hugetlb,memory:{path}\n0::/"
    (root / "proc/self/cgroup").write_text(f"{lines}\n")
    (root / "proc/self/mountinfo").write_text(
        f"31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n"
        f"33 31 0:30 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n"
        f"35 31 0:32 {mounted} {mount} rw,relatime shared:9 - {kind}\n"
    )
    limit_file, current_file, cache = VERSION_2 if version == 2 else VERSION_1
    for below, (limit, used, cached) in limits.items():
        folder = root / mount.lstrip("/") / below
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit_file).write_text(f"{limit}\n")
        (folder / current_file).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\n{cache} {cached}\nshmem 5\n")
    return str(root)


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_memory_cgroup_counts(version: int, tmp_path: Path) -> None:
    none = "max" if version == 2 else (1 << 63) - 4096
    root = cgroups(tmp_path, version, "/job/task", {"job/task": (1 << 20, 600_000, 100_000), "job": (none, 0, 0)})
    assert physical_bytes(root) == 1 << 20
    # The page cache is given back before anybody is killed.
    assert room(root).nbytes == (1 << 20) - 500_000
    assert f"cgroup/{'memory/' if version == 1 else ''}job/task has left" in room(root).of


@pytest.mark.parametrize("version", [1, 2])
def test_the_least_of_a_cgroup_and_its_ancestors_counts(version: int, tmp_path: Path) -> None:
    limits = {"a/b/c": (5 << 20, 0, 0), "a/b": (6 << 20, 6 << 20, 0), "a": (4 << 20, 1 << 20, 0)}
    root = cgroups(tmp_path, version, "/a/b/c", limits)
    assert physical_bytes(root) == 4 << 20
    assert room(root).nbytes == 0  # a brother of c has taken what b may have


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("path", "mounted"), [("/docker/x/y", "/docker/x"), ("/docker/x/y", "/"), ("/../../host", "/")]
)
def test_in_a_container_only_a_part_of_the_tree_is_mounted(
    path: str, mounted: str, version: int, tmp_path: Path
) -> None:
    root = cgroups(tmp_path, version, path, {"": (3 << 20, 1 << 20, 0)}, mounted)
    assert room(root).nbytes == 2 << 20


@pytest.mark.parametrize("text", [None, "", "damaged", "0::", "4:memory:/gone\n0::/gone", "x:y:z\n1"])
def test_without_a_limit_the_machine_counts(text: str | None, tmp_path: Path) -> None:
    root = cgroups(tmp_path, 2, "/a", {"a": (1 << 60, 0, 0)})
    if text is not None:
        (tmp_path / "proc/self/cgroup").write_text(text)
    (tmp_path / "proc/self/mountinfo").write_text(
        "35 31 0:32 / /sys rw -\n1\n36 31 0:32 / /sys/fs/cgroup rw - cgroup2\n"
    )
    assert physical_bytes(root) == room(root).nbytes == physical_bytes(str(tmp_path / "none"))
    assert room(root).of == "this machine has"


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


def test_a_bucket_gives_no_more_than_asked_for() -> None:
    bucket = Bucket(CPU)
    with pytest.raises(AssertionError):
        bucket.take(1)
    bucket.reset(64)
    bucket.take(64)
    with pytest.raises(AssertionError):
        bucket.take(1)


def test_the_collector_is_as_it_was_afterwards() -> None:
    assert gc.isenabled()
    with no_collection():
        assert not gc.isenabled()
        with no_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ValueError, match="inside"), no_collection():
        raise ValueError("inside")
    assert gc.isenabled()
    gc.disable()
    try:
        with no_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_collector_is_held_back_until_the_last_thread_is_done() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with no_collection():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    with no_collection():
        pass
    assert not gc.isenabled()
    leave.set()
    thread.join(10)
    assert gc.isenabled()


MOVES: dict[str, Callable[[torch.Tensor], object]] = {
    "exchanged": lambda tensor: setattr(tensor, "data", torch.zeros_like(tensor)),
    "set": lambda tensor: tensor.set_(torch.zeros(3)),  # type: ignore[call-overload]
    "given back": lambda tensor: tensor.untyped_storage().resize_(0),
    "smaller": lambda tensor: tensor.untyped_storage().resize_(40),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_memory_that_was_taken_away_is_neither_read_nor_written(move: Callable[[torch.Tensor], object]) -> None:
    kept, moved = noise(300_000, 1), noise(300_000, 2)
    blocks, (manifest, _) = held([Block(kept), Block(moved)]), describe({"kept": kept, "moved": moved})
    places = Places.of(blocks, manifest, lambda: [0, 1])
    nbytes = moved.numel() * 4
    before, staged = raw_bytes(kept), torch.full((2 * nbytes,), 7, dtype=torch.uint8)
    view = Held(blocks[1], 0, nbytes).view
    places.check()
    move(moved)
    with pytest.raises(LocalProtocolError, match="exchanged or given back while the state was moved: moved;"):
        places.check()
    read: list[memoryview] = []
    for act in (
        Held(blocks[1], 0, nbytes).check,
        lambda: Held(blocks[1], 0, nbytes).reads(read.append)(view),
        lambda: copy_blocks([(block, 0, nbytes) for block in blocks], staged, gather=True),
        lambda: copy_blocks([(block, 0, nbytes) for block in blocks], staged, gather=False),
    ):
        with pytest.raises(LocalProtocolError, match="exchanged or given back"):
            act()
    assert read == []
    assert raw_bytes(staged) == bytes([7]) * (2 * nbytes)
    assert raw_bytes(kept) == before


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_memory_that_is_taken_away_between_two_reads_is_not_read_again(move: Callable[[torch.Tensor], object]) -> None:
    tensor = noise(300_000, 1)
    (block,) = held([Block(tensor)])
    pieces: list[bytes] = []
    part = Held(block, 5, 200_003)
    read = part.reads(lambda piece: pieces.append(bytes(piece)))
    read(part.view)
    move(tensor)
    if move in (MOVES["given back"], MOVES["smaller"]):
        with pytest.raises(LocalProtocolError, match="exchanged or given back"):
            read(part.view)
    else:
        read(part.view)  # the old memory is kept; whoever reads looks once more at the end
        assert pieces[0] == pieces.pop()
        with pytest.raises(LocalProtocolError, match="exchanged or given back"):
            part.check()
    assert len(pieces) == 1
    assert len(pieces[0]) == 199_998
