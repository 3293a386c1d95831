"""Accelerators that there are not: host memory that plays a device's, whose work runs later, in order."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

import torch

from ft_transport._device import Seam, replaced

__all__ = ["StandInAccelerator"]

A = TypeVar("A", bound="StandInAccelerator")


class _Device:
    """Runs what it is told, one after the other."""

    def __init__(self, index: int, over: threading.Event) -> None:
        self._over = over
        self._told: queue.SimpleQueue[tuple[Callable[[], object], float] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"stand-in device {index}", daemon=True)
        self._thread.start()

    def tell(self, work: Callable[[], object], seconds: float = 0.0) -> None:
        self._told.put((work, seconds))

    def close(self) -> None:
        self._told.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (told := self._told.get()) is not None:
            work, seconds = told
            if seconds:
                self._over.wait(seconds)
            work()


class StandInAccelerator(Seam):
    """Plays accelerators while a block runs, for transports in this process.

    A tensor on the CPU becomes a device's by :meth:`put`. What a kernel would do to it, :meth:`launch` does later:
    whoever reads it without waiting for the device reads what was there before. ::

        with StandInAccelerator(2) as devices:
            weight = devices.put(torch.zeros(1000), 1)
            devices.launch(1, lambda: weight.fill_(7), seconds=0.5)
            source.send_checkpoint([1], step, {"weight": weight}, timeout)  # sends sevens

    Args:
        num_devices: How many there are.

    Attributes:
        synchronized: How often each device was waited for, by index.
        awaited: How often one of its streams was waited for, by index.
        streams: For each thread that was given one, its streams.
        num_copies: Between the host and devices, both ways, so far.
        nbytes_pinned: Host memory that devices can reach, so far.

    Threading: any. Leaving the block ends what its devices still do.
    """

    def __init__(self, num_devices: int = 2) -> None:
        self.synchronized: Counter[int] = Counter()
        self.awaited: Counter[int] = Counter()
        self.streams: dict[int, set[Any]] = {}
        self.nbytes_pinned = self.num_copies = 0
        self._over = threading.Event()
        self._devices = [_Device(index, self._over) for index in range(num_devices)]
        self._places: dict[int, int] = {}
        self._kept: list[torch.Tensor] = []
        self._before: Seam | None = None

    def __enter__(self: A) -> A:
        self._before = replaced(self)
        return self

    def __exit__(
        self, cls: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._before is not None
        replaced(self._before)
        self._over.set()
        for device in self._devices:
            device.close()

    def put(self, tensor: torch.Tensor, index: int) -> torch.Tensor:
        """Let a tensor's memory be a device's; gives the tensor."""
        # Kept, so that its address is nobody else's.
        self._kept.append(tensor)
        self._places[tensor.untyped_storage().data_ptr()] = index
        return tensor

    def launch(self, index: int, work: Callable[[], object], *, seconds: float = 0.0) -> None:
        """Let a device do something, once it has done all before, and that takes a while."""
        self._devices[index].tell(work, seconds)

    # What transports ask; see ``Seam``.

    def on_host(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() not in self._places

    def to_host(self, target: torch.Tensor, parts: list[torch.Tensor]) -> None:
        self.num_copies += 1
        super().to_host(target, parts)

    def to_device(self, parts: list[torch.Tensor], source: torch.Tensor) -> None:
        self.num_copies += 1
        super().to_device(parts, source)

    def devices_of(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.device, ...]:
        found = (self._places.get(tensor.untyped_storage().data_ptr()) for tensor in tensors)
        return tuple(torch.device("cuda", index) for index in dict.fromkeys(found) if index is not None)

    def pinned(self, nbytes: int) -> torch.Tensor:
        self.nbytes_pinned += nbytes
        return torch.empty(nbytes, dtype=torch.uint8)

    def synchronize(self, device: torch.device) -> None:
        self.synchronized[device.index] += 1
        done = threading.Event()
        self._devices[device.index].tell(done.set)
        done.wait()

    def await_stream(self, stream: Any) -> None:
        self.awaited[stream[0].index] += 1

    def current_stream(self, device: torch.device) -> Any:
        return device, threading.get_ident()

    def set_stream(self, stream: Any) -> None:
        self.streams.setdefault(threading.get_ident(), set()).add(stream)
