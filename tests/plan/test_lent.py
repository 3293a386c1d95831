"""A storage that is read is not taken away; see ``_plan.lent``."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from helpers import noise

from ft_transport._plan.lent import readers_of

Take = Callable[[torch.Tensor], object]

TAKES: dict[str, Take] = {
    "resize_": lambda tensor: tensor.untyped_storage().resize_(0),
    "typed": lambda tensor: tensor._typed_storage()._resize_(0),
    "share_memory_": lambda tensor: tensor.share_memory_(),
    "of a view": lambda tensor: tensor[3:].detach().untyped_storage().resize_(0),
    "of a parameter": lambda tensor: torch.nn.Parameter(tensor).data.untyped_storage().resize_(0),
}


@pytest.mark.parametrize("take", TAKES.values(), ids=TAKES)
def test_who_takes_memory_away_waits_for_who_reads_it(take: Take) -> None:
    tensor = noise(1 << 16, 1)
    storage, address = tensor.untyped_storage(), tensor.data_ptr()
    readers = readers_of(storage)
    readers.enter(None)
    readers.enter(None)
    taken = threading.Event()
    thread = threading.Thread(target=lambda: (take(tensor), taken.set()))
    thread.start()
    try:
        while not readers.turn:  # it is on its way
            pass
        assert not taken.wait(0.05)
        readers.leave()
        assert not taken.wait(0.05)
        assert storage.data_ptr() == address
    finally:
        readers.leave()
        thread.join(10)
    assert taken.is_set()
    assert tensor.untyped_storage().data_ptr() != address


def test_memory_is_taken_at_once_where_nobody_reads() -> None:
    tensor, other = noise(100, 1), noise(100, 2)
    readers_of(other.untyped_storage()).enter(None)
    readers = readers_of(tensor.untyped_storage())
    assert readers is readers_of(tensor.untyped_storage())
    assert tensor.untyped_storage().resize_(800) is tensor.untyped_storage()
    assert tensor.untyped_storage().nbytes() == 800
    assert readers.turn == 2
    with pytest.raises((RuntimeError, TypeError)):
        tensor.untyped_storage().resize_("nonsense")  # type: ignore[arg-type]
    tensor.untyped_storage().resize_(0)
    assert tensor.untyped_storage().nbytes() == 0


def test_storages_that_were_read_are_freed_without_a_collection() -> None:
    tensor = noise(100, 1)
    readers = weakref.ref(readers_of(tensor.untyped_storage()))
    storage = weakref.ref(tensor.untyped_storage())
    del tensor
    assert storage() is None
    assert readers() is None


def test_a_child_does_not_wait_for_its_parent() -> None:
    tensor = noise(100, 1)
    readers = readers_of(tensor.untyped_storage())
    readers.enter(None)
    child = os.fork()
    if child == 0:
        tensor.untyped_storage().resize_(0)
        os._exit(int(tensor.untyped_storage().nbytes() != 0))
    readers.leave()
    _, status = os.waitpid(child, 0)
    assert status == 0
