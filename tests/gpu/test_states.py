"""Everything that can be in a state, on accelerators."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from device_states import Devices, DeviceStates, Where
from helpers import CPU


class _Accelerators:
    """Those of this machine; if there is one, it is both."""

    def moved(self, state: object, where: Where) -> Any:
        return _Mover(lambda i: self.device(where(i))).move(state)

    def on_host(self, state: object) -> Any:
        return self.moved(state, lambda i: -1)

    def device(self, index: int) -> torch.device:
        found = torch.accelerator.current_accelerator()
        assert found is not None
        return torch.device(found.type, index % torch.accelerator.device_count()) if index >= 0 else CPU

    def device_of(self, tensor: torch.Tensor) -> torch.device:
        return tensor.device


class _Mover:
    """Puts a state's storages elsewhere."""

    def __init__(self, where: Callable[[int], torch.device]) -> None:
        self._where = where
        self._tensors: list[torch.Tensor] = []
        self._index: dict[int, int] = {}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def move(self, state: object) -> Any:
        buffer, note = io.BytesIO(), self._note

        # By classes: Python 3.13.0 lets nobody give an instance these functions.
        class Pickler(pickle.Pickler):
            def persistent_id(self, value: object) -> int | None:
                return note(value)

        class Unpickler(pickle.Unpickler):
            def persistent_load(self, index: Any) -> torch.Tensor:
                return made[index]

        Pickler(buffer).dump(state)
        buffer.seek(0)
        made = [self._elsewhere(tensor) for tensor in self._tensors]
        return Unpickler(buffer).load()

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
            target = torch.empty_like(flat, device=self._where(len(self._storages)))
            there = self._storages[storage._cdata] = target.copy_(flat).untyped_storage()
        found = torch.empty(0, dtype=tensor.dtype, device=there.device)
        found.set_(there, tensor.storage_offset(), tensor.shape, tensor.stride())
        if isinstance(tensor, torch.nn.Parameter):
            return torch.nn.Parameter(found, tensor.requires_grad)
        return found.requires_grad_(tensor.requires_grad)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
class TestOnAccelerators(DeviceStates):
    @pytest.fixture
    def devices(self) -> Devices:
        return _Accelerators()
