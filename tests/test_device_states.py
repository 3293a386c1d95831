"""Everything that can be in a state, on accelerators that a stand-in plays."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from device_states import Devices, DeviceStates, Where
from helpers import CPU

from ft_transport._state.describe import describe
from ft_transport.testing import StandInAccelerator


class _StandIn:
    """A state's own tensors are said to be on a device, so their contents are seen once the stand-in has ended."""

    def __init__(self) -> None:
        self._devices = StandInAccelerator(2)
        self._devices.__enter__()
        self._is_open = True

    def moved(self, state: object, where: Where) -> object:
        for index, tensor in enumerate(describe(state)[1].tensors):
            place = where(index)
            if place >= 0:
                self._devices.put(tensor, place)
        return state

    def on_host(self, state: object) -> object:
        self.close()
        return state

    def device(self, index: int) -> torch.device:
        return torch.device("cuda", index) if index >= 0 else CPU

    def device_of(self, tensor: torch.Tensor) -> torch.device:
        return self._devices.device_of(tensor)

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._devices.__exit__(None, None, None)


class TestOnStandIn(DeviceStates):
    @pytest.fixture
    def devices(self) -> Iterator[Devices]:
        devices = _StandIn()
        try:
            yield devices
        finally:
            devices.close()
