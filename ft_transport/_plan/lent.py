"""Storages of a user that are read while no lock keeps the interpreter's other threads from giving them back.

Torch holds a tensor's memory for whoever holds the tensor, but for one thing: a storage can be resized (FSDP and
offloading do it, to nothing), and its old memory is gone at once, whoever reads it. A read of unmapped memory ends the
process. A read under the interpreter's lock would be safe from Python's threads, and would keep all of them from
everything: lanes that take fingerprints waited for each other, and a transfer took a tenth longer.

So the few methods that take memory away from a storage wait, on the storages that are being read, until they are not.
They are shadowed in the instance: ``Tensor.untyped_storage()`` gives the same object as long as somebody has it.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["Readers", "kept", "readers_of"]

# ``share_memory_()`` and a queue of torch.multiprocessing move a storage by one of the last two.
_TAKE_AWAY = ("resize_", "_share_fd_cpu_", "_share_filename_cpu_")
_ATTRIBUTE = "_ft_transport_readers"
# Who takes memory away looks so often whether it is still read: it is rare, and waits for less than a millisecond.
_LOOK_AGAIN_S = 50e-6


class Readers:
    """Who reads a storage. A read enters, looks whether the memory is taken, reads, and leaves.

    There is no lock, which a read of a few microseconds would feel: a reader says that it reads, and then looks whether
    the memory is taken; whoever takes it says so, and then looks whether anybody reads. Each step is one for Python.

    Attributes:
        turn: Grows whenever the memory begins to be taken away, and when it was; odd in between, when nobody may begin.
        enter: Called first, with anything.
        leave: Called last.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget who reads, and who takes it away."""
        self.turn = 0
        self._inside: list[object] = []
        self.enter = self._inside.append
        self.leave = self._inside.pop
        self._one = threading.Lock()
        self._nobody = threading.Condition()  # never notified: a reader has no time for that

    def take_away(self, act: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``act``, once nobody reads; gives what it gives. Who comes meanwhile finds it taken."""
        # Two who take memory away at once: the second one finds the first one's turn over.
        with self._one:
            self.turn += 1
            try:
                with self._nobody:
                    # A wait with a time-out in place of a notification, so that the reader pays nothing. Who waits here
                    # is about to free gigabytes, and has 50 us.
                    while not self._nobody.wait_for(lambda: not self._inside, _LOOK_AGAIN_S):
                        pass
                return act(*args, **kwargs)
            finally:
                self.turn += 1


def readers_of(storage: torch.UntypedStorage) -> Readers:
    """The readers of a storage, for whom those methods of it wait from now on.

    Reads should be short. They are safe from other threads of Python; neither C++ nor ``Tensor.resize_``, which go past
    Python's storages, wait for anybody.
    """
    known = vars(storage).get(_ATTRIBUTE)
    if known is None:
        with _lock:
            known = vars(storage).get(_ATTRIBUTE)
            if known is None:
                # Shadowing in the instance works because torch hands out one Python object for one storage as long as
                # anybody holds it, and we do.
                # What is put there stays: another thread may have looked up the class's own just before, and is about
                # to call it, but not the next time. A reference to the storage in itself would be a cycle.
                known = Readers()
                _all.add(known)
                for name in _TAKE_AWAY:
                    act = functools.partial(_act, weakref.ref(storage), name)
                    setattr(storage, name, functools.partial(known.take_away, act))
                setattr(storage, _ATTRIBUTE, known)
    return known


@contextmanager
def kept(storages: Iterable[torch.UntypedStorage]) -> Iterator[bool]:
    """While a block runs, nobody takes the memory of these away; gives whether all of them had theirs at its begin.

    For work that torch does by steps, between which other threads run: it looks at bounds in one and uses the address
    in another, and an address of nothing ends the process, or on an accelerator the context.
    """
    readers = set(map(readers_of, storages))
    try:
        for each in readers:
            each.enter(None)
        yield not any(each.turn % 2 for each in readers)
    finally:
        for each in readers:
            each.leave()


def _act(reference: weakref.ref[torch.UntypedStorage], name: str, *args: Any, **kwargs: Any) -> Any:
    storage = reference()
    return getattr(type(storage), name)(storage, *args, **kwargs)


_lock = threading.Lock()
_all: weakref.WeakSet[Readers] = weakref.WeakSet()


def _reset_in_fork() -> None:
    # The threads that read are not in the child, and cannot say that they are done.
    global _lock
    _lock = threading.Lock()
    for readers in list(_all):
        readers.reset()


os.register_at_fork(after_in_child=_reset_in_fork)
