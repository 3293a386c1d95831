"""Everything that can be in a state, on accelerators: on one end, on both, here and there."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import CPU, Config, Point, difference, ties
from states import STATES
from two_ends import WAYS, ends

from ft_transport._state.describe import describe

pytestmark = [
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
]

# Where the storages of a state are, one after the other: -1 is the host.
Where = Callable[[int], int]
PLACES: dict[str, tuple[Where, Where]] = {
    "source": (lambda i: 1, lambda i: -1),
    "destination": (lambda i: -1, lambda i: 0),
    "both": (lambda i: 0, lambda i: 1),
    "here and there": (lambda i: i % 3 - 1, lambda i: (i + 1) % 3 - 1),
}


def device(index: int) -> torch.device:
    """A device by its number; with fewer of them than asked for, another one."""
    found = torch.accelerator.current_accelerator()
    assert found is not None
    return torch.device(found.type, index % torch.accelerator.device_count()) if index >= 0 else CPU


class _Mover:
    """Puts a state's storages elsewhere. What shares memory still does, and what is one object stays one."""

    def __init__(self, where: Where) -> None:
        self._where = where
        self._tensors: list[torch.Tensor] = []
        self._index: dict[int, int] = {}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def move(self, state: object) -> Any:
        buffer = io.BytesIO()
        pickler = pickle.Pickler(buffer)
        pickler.persistent_id = self._note  # type: ignore[method-assign]
        pickler.dump(state)
        buffer.seek(0)
        unpickler = pickle.Unpickler(buffer)
        made = [self._elsewhere(tensor) for tensor in self._tensors]
        unpickler.persistent_load = made.__getitem__  # type: ignore[method-assign]
        return unpickler.load()

    def _note(self, value: object) -> int | None:
        if not isinstance(value, torch.Tensor):
            return None
        if id(value) not in self._index:
            self._index[id(value)] = len(self._tensors)
            self._tensors.append(value)
        return self._index[id(value)]

    def _elsewhere(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        there = self._storages.get(storage._cdata)
        if there is None:
            flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),), (1,))
            target = torch.empty_like(flat, device=device(self._where(len(self._storages))))
            there = self._storages[storage._cdata] = target.copy_(flat).untyped_storage()
        found = torch.empty(0, dtype=tensor.dtype, device=there.device)
        found.set_(there, tensor.storage_offset(), tensor.shape, tensor.stride())
        if isinstance(tensor, torch.nn.Parameter):
            return torch.nn.Parameter(found, tensor.requires_grad)
        return found.requires_grad_(tensor.requires_grad)


def moved(state: object, where: Where) -> Any:
    """The same state, elsewhere."""
    return _Mover(where).move(state)


def on_host(state: object) -> Any:
    return moved(state, lambda i: -1)


@pytest.fixture(autouse=True)
def _allowed() -> Iterator[None]:
    with torch.serialization.safe_globals([Point, Config]):
        yield


@WAYS
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("name", STATES)
def test_in_place(name: str, places: str, way: str) -> None:
    theirs, mine = PLACES[places]
    state, template = moved(STATES[name](1), theirs), moved(STATES[name](2), mine)
    with ends(way, template) as both:
        both.move(state)
        assert not both.errors
        report = both.destination.last_report
        if name != "expanded":  # of which a template overlaps itself
            assert report.nbytes_in_place == report.nbytes_total
            assert report.not_in_place == {}
    assert difference(on_host(both.result), on_host(state)) == ""
    assert sorted(ties(on_host(both.result))) == sorted(ties(on_host(state)))


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("index", [-1, 1], ids=["host", "device"])
def test_fresh(name: str, index: int) -> None:
    """What was on an accelerator lands on the receiver's, and where it has none, on the host; the rest on the host."""
    state = moved(STATES[name](1), lambda i: (-1, 0)[i % 2])
    with ends("lanes", device=device(index)) as both:
        both.move(state)
        assert not both.errors
    for mine, theirs in zip(describe(both.result)[1].tensors, describe(state)[1].tensors, strict=True):
        assert mine.device == (CPU if theirs.is_cpu else device(index))
    assert difference(on_host(both.result), on_host(state)) == ""
    assert sorted(ties(on_host(both.result))) == sorted(ties(on_host(state)))


@WAYS
@pytest.mark.parametrize("name", ["large", "model_and_optimizer", "many_small", "large_strided"])
def test_beside(name: str, way: str) -> None:
    state, template = moved(STATES[name](1), lambda i: 0), moved(STATES[name](2), lambda i: 1)
    with ends(way, template, shadow=True) as both:
        both.move(state)
        assert not both.errors
    assert difference(on_host(both.result), on_host(state)) == ""
    assert difference(on_host(template), on_host(state)) == ""
