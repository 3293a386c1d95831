"""What the process may take of the machine's memory, and when the collector runs."""

from __future__ import annotations

import gc
import sys
import threading
from pathlib import Path

import pytest
import torch

from ft_transport._process import address_of, let_others_run, memory_at, no_collection, physical_bytes, room

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


def test_an_address_is_that_of_the_memory_itself() -> None:
    tensor = torch.arange(8, dtype=torch.uint8)
    view = memory_at(tensor.data_ptr() + 3, 5)
    assert address_of(view) == tensor.data_ptr() + 3
    assert address_of(view[1:]) == tensor.data_ptr() + 4
    assert bytes(memory_at(address_of(view), 5)) == bytes([3, 4, 5, 6, 7])


def test_who_waits_for_the_interpreter_gets_it() -> None:
    """Else it waits for the end of the interval, or of what the other thread does in one step of C."""
    go, ran, before = threading.Lock(), threading.Event(), sys.getswitchinterval()
    go.acquire()
    other = threading.Thread(target=lambda: go.acquire() and ran.set())
    other.start()
    sys.setswitchinterval(60)
    try:
        go.release()
        assert not any(ran.is_set() for _ in range(100_000))
        assert any(let_others_run() or ran.is_set() for _ in range(100_000))
    finally:
        sys.setswitchinterval(before)
    other.join()
