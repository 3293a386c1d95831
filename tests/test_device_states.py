"""Everything that can be in a state, on accelerators that a stand-in plays: on one end, on both, here and there."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import CPU, Config, Point, difference, ties
from states import STATES
from two_ends import WAYS, ends

from ft_transport._state.describe import describe
from ft_transport.testing import StandInAccelerator

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

ZERO, ONE = torch.device("cuda", 0), torch.device("cuda", 1)
# Where each of a state's tensors is: on the host, or on a device.
Where = Callable[[int], "int | None"]
PLACES: dict[str, tuple[Where, Where]] = {
    "source": (lambda i: 1, lambda i: None),
    "destination": (lambda i: None, lambda i: 0),
    "both": (lambda i: 0, lambda i: 1),
    "here and there": (lambda i: (None, 0, 1)[i % 3], lambda i: (1, None, 0)[i % 3]),
}


@pytest.fixture(autouse=True)
def _allowed() -> Iterator[None]:
    with torch.serialization.safe_globals([Point, Config]):
        yield


def put(devices: StandInAccelerator, state: object, where: Where) -> None:
    for index, tensor in enumerate(describe(state)[1].tensors):
        place = where(index)
        if place is not None:
            devices.put(tensor, place)


@WAYS
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("name", STATES)
def test_in_place(name: str, places: str, way: str) -> None:
    state, template = STATES[name](1), STATES[name](2)
    with StandInAccelerator(2) as devices:
        for each, where in zip((state, template), PLACES[places], strict=True):
            put(devices, each, where)
        with ends(way, template) as moved:
            moved.move(state)
            assert not moved.errors
            report = moved.destination.last_report
            if name != "expanded":  # of which a template overlaps itself
                assert report.nbytes_in_place == report.nbytes_total
                assert report.not_in_place == {}
    # Outside: there the tensors have what the devices had in the end.
    assert difference(moved.result, state) == ""
    assert sorted(ties(moved.result)) == sorted(ties(state))


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("device", [CPU, ONE], ids=str)
def test_fresh(name: str, device: torch.device) -> None:
    """What was on an accelerator lands on the receiver's, and where it has none, on the host; the rest on the host."""
    state = STATES[name](1)
    with StandInAccelerator(2) as devices:
        put(devices, state, lambda i: (None, 0)[i % 2])
        with ends("lanes", device=device) as moved:
            moved.move(state)
            assert not moved.errors
        got, sent = describe(moved.result)[1].tensors, describe(state)[1].tensors
        for mine, theirs in zip(got, sent, strict=True):
            assert devices.device_of(mine) == (CPU if devices.on_host(theirs) else device)
    assert difference(moved.result, state) == ""
    assert sorted(ties(moved.result)) == sorted(ties(state))


@pytest.mark.parametrize("name", ["large", "model_and_optimizer", "many_small", "large_strided"])
@pytest.mark.parametrize("way", ["lanes", "group"])
def test_beside(name: str, way: str) -> None:
    state, template = STATES[name](1), STATES[name](2)
    with StandInAccelerator(2) as devices:
        put(devices, state, lambda i: 0)
        put(devices, template, lambda i: 1)
        with ends(way, template, shadow=True) as moved:
            moved.move(state)
            assert not moved.errors
    assert difference(moved.result, state) == ""
    assert difference(template, state) == ""
