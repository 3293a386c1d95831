"""Everything that can be in a state, on accelerators: on one end, on both, here and there.

``test_device_states.py`` runs these tests on accelerators that a stand-in plays, ``gpu/test_states.py`` on real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import pytest
import torch
from helpers import CPU, Config, Point, difference, noise, ties
from states import STATES
from two_ends import WAYS, ends

from ft_transport._state.describe import describe

# Where a state's tensors or storages are, one after the other: -1 is the host, else the number of a device.
Where = Callable[[int], int]
PLACES: dict[str, tuple[Where, Where]] = {
    "source": (lambda i: 1, lambda i: -1),
    "destination": (lambda i: -1, lambda i: 0),
    "both": (lambda i: 0, lambda i: 1),
    "here and there": (lambda i: i % 3 - 1, lambda i: (i + 1) % 3 - 1),
}


class Devices(Protocol):
    """Two devices."""

    def moved(self, state: object, where: Where) -> Any:
        """A state, elsewhere. What shares memory still does, and what is one object stays one."""
        ...

    def on_host(self, state: object) -> Any:
        """What a state is, to be compared; no device is asked after that."""
        ...

    def device(self, index: int) -> torch.device:
        """A device by its number, or the host."""
        ...

    def device_of(self, tensor: torch.Tensor) -> torch.device:
        """Where a tensor is."""
        ...


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
class DeviceStates:
    """The tests. Who inherits them has a fixture ``devices``."""

    @pytest.fixture(autouse=True)
    def _allowed(self) -> Any:
        with torch.serialization.safe_globals([Point, Config]):
            yield

    @WAYS
    @pytest.mark.parametrize("places", PLACES)
    @pytest.mark.parametrize("name", STATES)
    def test_in_place(self, devices: Devices, name: str, places: str, way: str) -> None:
        theirs, mine = PLACES[places]
        state, template = devices.moved(STATES[name](1), theirs), devices.moved(STATES[name](2), mine)
        with ends(way, template) as both:
            both.move(state)
            assert not both.errors
            report = both.destination.last_report
            if name != "expanded":  # of which a template overlaps itself
                assert report.nbytes_in_place == report.nbytes_total
                assert report.not_in_place == {}
        got, sent = devices.on_host(both.result), devices.on_host(state)
        assert difference(got, sent) == ""
        assert sorted(ties(got)) == sorted(ties(sent))

    @pytest.mark.parametrize("name", STATES)
    @pytest.mark.parametrize("index", [-1, 1], ids=["host", "device"])
    def test_fresh(self, devices: Devices, name: str, index: int) -> None:
        """What was on an accelerator lands on the receiver's, and where it has none, on the host; the rest there."""
        state, device = devices.moved(STATES[name](1), lambda i: (-1, 0)[i % 2]), devices.device(index)
        with ends("lanes", device=device) as both:
            both.move(state)
            assert not both.errors
        for mine, theirs in zip(describe(both.result)[1].tensors, describe(state)[1].tensors, strict=True):
            assert devices.device_of(mine) == (CPU if devices.device_of(theirs) == CPU else device)
        got, sent = devices.on_host(both.result), devices.on_host(state)
        assert difference(got, sent) == ""
        assert sorted(ties(got)) == sorted(ties(sent))

    @WAYS
    def test_messages_of_both(self, devices: Devices, way: str) -> None:
        """As of a model that is offloaded in part: what is staged, and what is read where it lies, by turns."""
        state = devices.moved([noise(512 << 10, i) for i in range(24)], lambda i: i % 2 - 1)
        with ends(way) as both:
            both.move(state)
            assert not both.errors
        got, sent = devices.on_host(both.result), devices.on_host(state)
        assert difference(got, sent) == ""

    @WAYS
    @pytest.mark.parametrize("name", ["large", "model_and_optimizer", "many_small", "large_strided"])
    def test_beside(self, devices: Devices, name: str, way: str) -> None:
        state = devices.moved(STATES[name](1), lambda i: 0)
        template = devices.moved(STATES[name](2), lambda i: 1)
        with ends(way, template, shadow=True) as both:
            both.move(state)
            assert not both.errors
        got, held, sent = (devices.on_host(each) for each in (both.result, template, state))
        assert difference(got, sent) == ""
        assert difference(held, sent) == ""
