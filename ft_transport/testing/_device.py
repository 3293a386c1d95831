"""Accelerators that there are not: memory that the CPU must not touch, and streams whose work runs later, in order."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch

from ft_transport._device import Seam, replaced

__all__ = ["StandInAccelerator"]

A = TypeVar("A", bound="StandInAccelerator")

# What is to be seen of a device's memory from the host.
_VEIL = 0xA5


class _Stream:
    """Does what it is told, one thing after the other, in a thread of its own."""

    def __init__(self, device: torch.device, over: threading.Event) -> None:
        self.device = device
        self.errors: list[BaseException] = []
        self._over = over
        self._told: queue.SimpleQueue[tuple[Callable[[], object], float] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"stand-in {device}", daemon=True)
        self._thread.start()

    def tell(self, work: Callable[[], object], seconds: float = 0.0) -> None:
        self._told.put((work, seconds))

    def record(self) -> threading.Event:
        event = threading.Event()
        self.tell(event.set)
        return event

    def close(self) -> None:
        self._told.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (told := self._told.get()) is not None:
            work, seconds = told
            if seconds:
                self._over.wait(seconds)
            try:
                work()
            except BaseException as exc:
                self.errors.append(exc)


class _Memory(NamedTuple):
    """A storage that is a device's.

    Attributes:
        device: The device.
        host: What the CPU sees of it: nothing that means anything.
        bytes: What the device has there.
    """

    device: torch.device
    host: torch.Tensor
    bytes: torch.Tensor


def _device(index: int) -> torch.device:
    return torch.device("cuda", index)


class StandInAccelerator(Seam):
    """Plays accelerators while a block runs, for transports in this process.

    A tensor on the CPU becomes a device's by :meth:`put`: its bytes go to where only work on the device finds them, and
    in their place is a pattern. So who reads it on the CPU reads nonsense, and who writes to it is found when the block
    ends. What a kernel would do, :meth:`launch` does later: whoever copies without waiting for the device copies what
    was there before. ::

        with StandInAccelerator(2) as devices:
            weight = devices.put(torch.zeros(1000), 1)
            devices.launch(1, lambda: devices.reach(weight).fill_(7), seconds=0.5)
            source.send_checkpoint([1], step, {"weight": weight}, timeout)  # sends sevens

    Args:
        num_devices: How many there are.

    Attributes:
        synchronized: How often each device was waited for, by index.
        events: How often an event was waited for, or was over when it was looked at, by index of its device.
        streams: The streams that copies ran in, the caller's among them.
        num_copies: Between the host and devices, both ways, so far.
        nbytes_pinned: Host memory that devices can reach, so far.
        nbytes_allocated: Memory of devices that transports have taken, so far.

    Threading: any. Leaving the block ends what its devices still do, and gives the tensors their bytes.
    """

    def __init__(self, num_devices: int = 2) -> None:
        self.synchronized: Counter[int] = Counter()
        self.events: Counter[int] = Counter()
        self.streams: set[Any] = set()
        self.num_copies = self.nbytes_pinned = self.nbytes_allocated = 0
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._all = {device: [_Stream(device, self._over)] for device in map(_device, range(num_devices))}
        self._memory: dict[int, _Memory] = {}
        self._current = threading.local()
        self._before: Seam | None = None

    def __enter__(self: A) -> A:
        self._before = replaced(self)
        return self

    def __exit__(
        self, cls: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._before is not None
        self._over.set()
        streams = [stream for streams in self._all.values() for stream in streams]
        for stream in streams:
            stream.close()
        replaced(self._before)
        touched = [memory.host for memory in self._memory.values() if not (memory.host == _VEIL).all()]
        for memory in self._memory.values():
            memory.host.copy_(memory.bytes)
        if exc is None:
            _raise(streams)
            if touched:
                raise AssertionError(f"the CPU has written to {len(touched)} storages of a device")

    # ------------------------------------------------------------------------------- what a test does

    def put(self, tensor: torch.Tensor, index: int) -> torch.Tensor:
        """Let a tensor's memory be a device's; gives the tensor."""
        if not tensor.untyped_storage().nbytes():
            # What has no bytes has a device. It is told by the address of the storage, so it gets one.
            one = torch.empty(1, dtype=tensor.dtype).untyped_storage()
            tensor.data = torch.empty(0, dtype=tensor.dtype).set_(one, 0, tensor.shape, tensor.stride())
        storage = tensor.untyped_storage()
        if self._of(tensor) is not None:
            return tensor  # by another view of it
        with self._lock:
            host = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
            # Kept, so that its address is nobody else's.
            self._memory[storage.data_ptr()] = _Memory(_device(index), host, host.clone())
            host.fill_(_VEIL)
        return tensor

    def launch(self, index: int, work: Callable[[], object], *, seconds: float = 0.0) -> None:
        """Let a device do something in its default stream, once that has done all before, and that takes a while.

        What it does to tensors it does to :meth:`reach` of them.
        """
        self._all[_device(index)][0].tell(work, seconds)

    def get(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor on the host, once its device has done all that it was told to."""
        memory = self._of(tensor)
        if memory is None:
            return tensor.clone()
        self._wait_for(memory.device)
        return self.reach(tensor).clone()

    # ------------------------------------------------------------------ what transports ask; see ``Seam``

    def on_host(self, tensor: torch.Tensor) -> bool:
        return self.device_of(tensor).type == "cpu"

    def device_of(self, tensor: torch.Tensor) -> torch.device:
        memory = self._of(tensor)
        return tensor.device if memory is None else memory.device

    def _of(self, tensor: torch.Tensor) -> _Memory | None:
        return self._memory.get(tensor.untyped_storage().data_ptr())

    def reach(self, tensor: torch.Tensor) -> torch.Tensor:
        memory = self._of(tensor)
        if memory is None:
            return tensor
        # With a version counter of its own, as what transports write through.
        there = torch.empty(0, dtype=tensor.dtype)
        storage = memory.bytes.untyped_storage()
        there = there.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
        there = there.conj() if tensor.is_conj() else there
        return there._neg_view() if tensor.is_neg() else there

    def empty_strided(
        self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        tensor = torch.empty_strided(shape, stride, dtype=dtype)
        if device.type == "cpu":
            return tensor
        self.nbytes_allocated += tensor.untyped_storage().nbytes()
        return self.put(tensor, device.index or 0)

    def pinned(self, nbytes: int) -> torch.Tensor:
        self.nbytes_pinned += nbytes
        return torch.empty(nbytes, dtype=torch.uint8)

    def run(self, device: torch.device, work: Callable[[], object]) -> None:
        stream = self.current_stream(device)
        self.streams.add(stream)
        stream.tell(work)

    def to_host(self, target: torch.Tensor, parts: list[torch.Tensor], gaps: Sequence[int]) -> None:
        self.num_copies += 2 if any(gaps) else 1
        super().to_host(target, parts, gaps)

    def to_device(self, parts: list[torch.Tensor], source: torch.Tensor, gaps: Sequence[int]) -> None:
        self.num_copies += 1
        super().to_device(parts, source, gaps)

    def hold(self, tensors: Sequence[torch.Tensor]) -> None:
        pass  # memory here is nobody else's before the block ends

    def synchronize(self, device: torch.device) -> None:
        self.synchronized[device.index] += 1
        self._wait_for(device)

    def _wait_for(self, device: torch.device) -> None:
        streams = list(self._all[device])
        for event in [stream.record() for stream in streams]:
            event.wait()
        _raise(streams)

    def new_stream(self, device: torch.device) -> Any:
        stream = _Stream(device, self._over)
        self._all[device].append(stream)
        return stream

    def current_stream(self, device: torch.device) -> Any:
        device = _device(device.index or 0)
        current = self._current_streams()
        return current.get(device, self._all[device][0])

    def _current_streams(self) -> dict[torch.device, Any]:
        """Of the calling thread, where they are not the devices' own."""
        if not hasattr(self._current, "streams"):
            self._current.streams = {}
        found: dict[torch.device, Any] = self._current.streams
        return found

    def adopt(self, streams: Sequence[Any]) -> None:
        self._current_streams().update({stream.device: stream for stream in streams})

    @contextlib.contextmanager
    def use(self, streams: Sequence[Any]) -> Iterator[None]:
        current = self._current_streams()
        before = dict(current)
        current.update({stream.device: stream for stream in streams})
        try:
            yield
        finally:
            current.clear()
            current.update(before)

    def record(self, stream: Any) -> Any:
        return stream, stream.record()

    def is_over(self, event: Any) -> bool:
        stream, reached = event
        over: bool = reached.is_set()
        if over:
            self.events[stream.device.index] += 1
            _raise([stream])
        return over


def _raise(streams: Sequence[_Stream]) -> None:
    for stream in streams:
        for error in stream.errors:
            raise error
