"""What belongs to the whole process: its garbage collector, its forks, its memory, torch's modes.

Strategy: what acts on everybody in the process (the collector is off for all, a fork takes all descriptors along) is in
one file, so that two rooms that do it at once know of each other. Nothing here knows what a state or a transfer is.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import mmap
import os
import threading
import time
import weakref
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils._python_dispatch import _disable_current_modes

__all__ = [
    "NO_COLLECTION",
    "NoCollection",
    "Room",
    "address_of",
    "keep_out_of_forks",
    "let_others_run",
    "memory_at",
    "no_collection",
    "physical_bytes",
    "room",
    "undisturbed",
]


# The one way to a tensor's bytes that needs no NumPy and makes no tensor. Nothing keeps the memory alive but whoever
# has the address.
def memory_at(address: int, nbytes: int) -> memoryview:
    """Memory of this process, whose owner the caller keeps."""
    view: memoryview = _view_of_memory(address, nbytes, _PyBUF_WRITE)
    return view


def address_of(view: memoryview | mmap.mmap) -> int:
    """The other way round: where some memory that can be written to begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


# An array of ctypes would be a new class for each length.
_view_of_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_view_of_memory.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int]
_view_of_memory.restype = ctypes.py_object
_PyBUF_WRITE = 0x200


# How long a transfer may hold back Python's collector: what it makes is gone when it is over, mostly, and need not be
# walked through before. One that lasts longer is bound by what it moves, and the trainer's cycles, which may hold an
# accelerator's memory, are not to wait for it.
NO_COLLECTION = timedelta(seconds=1)

# Counted, since a source and a destination in one process (and tests) may hold it back at once; whoever is last puts it
# back as it was, off if the trainer had turned it off.
_collection_lock = threading.Lock()
_collection_holders = 0
_collection_was_on = False


class NoCollection:
    """Holds back Python's cyclic garbage collector, from now on until :meth:`end`.

    Describing a state makes hundreds of thousands of small objects and no cycle; the collector would walk through all
    of them, again and again, which takes longer than the describing. And once more at the end, for what is still there:
    so whoever can lets go of all that it has made before.
    """

    def __init__(self) -> None:
        global _collection_holders, _collection_was_on
        self._ended = False
        with _collection_lock:
            if _collection_holders == 0:
                # Some trainers run with the collector off, and collect at a step of their choice.
                _collection_was_on = gc.isenabled()
                gc.disable()
            _collection_holders += 1

    def end(self) -> None:
        """Let it go on, unless somebody else holds it back as well. May be called twice, and from any thread."""
        global _collection_holders
        with _collection_lock:
            if not self._ended:
                self._ended = True
                _collection_holders -= 1
                if _collection_holders == 0 and _collection_was_on:
                    gc.enable()


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """A :class:`NoCollection` while the block runs."""
    held_back = NoCollection()
    try:
        yield
    finally:
        held_back.end()


def let_others_run() -> None:
    """Give the interpreter's lock to whoever waits for it; else they get it at most every 5 ms.

    Loops of C over thousands of objects are one step for Python each, and threads that answer a peer need the lock
    several times for each answer.
    """
    time.sleep(0)


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


# Asked once: a machine's memory does not change, but for hotplugging, which no trainer waits for.
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
    # Not what is free: memory that caches hold is given back, and a bound against lies need not be tight.
    return min([_machine_bytes(), *(group.limit for group in _cgroups(root))])


def room(root: str = "/") -> Room:
    """What this process may take now without being killed for it: the least of the machine's memory and what each of
    its memory cgroups has left.

    A cgroup's use counts without the page cache and what else its kernel gives back under pressure. Swap does not
    count. Of the machine all memory counts, whoever uses it now.
    """
    # A container that takes more than its cgroup allows is not told so by an error: the kernel kills it. So it is asked
    # before.
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
    # A process is in one cgroup of version 2, and in one for each controller of version 1; both may be mounted
    # (hybrid).
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
        # Version 1 writes "no limit" as a number near 2^63, version 2 as "max".
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


class _Closes(Protocol):
    def close(self) -> None: ...


# A process that was forked (a DataLoader's worker) would keep a connection open that this one has closed, and a port
# that it listens on taken.
_not_in_forks: weakref.WeakSet[_Closes] = weakref.WeakSet()


def keep_out_of_forks(held: _Closes) -> None:
    """Let processes that are forked from this one close it first of all."""
    _not_in_forks.add(held)


def _close_in_fork() -> None:
    for held in list(_not_in_forks):
        held.close()


os.register_at_fork(after_in_child=_close_in_fork)
