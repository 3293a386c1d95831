"""Accelerators: what is to be waited for before bytes are read or written, and on which streams they are copied.

Strategy: all that asks for a device, its streams, or a wait for it goes through here, over ``torch.accelerator``: one
place to be right, and one to be replaced by a stand-in (``ft_transport.testing.StandInAccelerator``) where there is no
accelerator. A state names the devices that it is on, and no other is touched: to ask one that nobody uses makes a
context on it, some hundred MiB. A state on the CPU alone asks nothing.

Not here yet: copies between host and device, which are torch's own (``_plan.blocks``).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

import torch

from ft_transport._deadline import Deadline
from ft_transport.errors import TransferTimeout

__all__ = ["NO_STREAMS", "Seam", "Streams", "devices_of", "pinned", "replaced", "settle"]


class Seam:
    """What is asked of torch. A stand-in has the same methods."""

    def devices_of(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.device, ...]:
        """The devices that some of the tensors are on, each once; without the CPU, and "meta", which has no bytes."""
        if all(map(attrgetter("is_cpu"), tensors)):  # one call of C for each of twenty thousand
            return ()
        found = dict.fromkeys(map(attrgetter("device"), tensors))
        return tuple(device for device in found if device.type not in ("cpu", "meta"))

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Memory of the host, flat uint8, that devices reach without the CPU. Raises RuntimeError for want of it."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def synchronize(self, device: torch.device) -> None:
        """Wait until a device has done all that it was told to, on every stream."""
        torch.accelerator.synchronize(device)

    def current_stream(self, device: torch.device) -> Any:
        """The calling thread's stream on a device."""
        return torch.accelerator.current_stream(device)

    def set_stream(self, stream: Any) -> None:
        """Make a stream the calling thread's, on its device."""
        torch.accelerator.set_stream(stream)


_seam = Seam()


def replaced(seam: Seam) -> Seam:
    """Ask this one from now on; gives the one before."""
    global _seam
    before, _seam = _seam, seam
    return before


def devices_of(tensors: Iterable[torch.Tensor]) -> tuple[torch.device, ...]:
    """As ``Seam.devices_of``."""
    return _seam.devices_of(tensors if isinstance(tensors, Sequence) else list(tensors))


def pinned(nbytes: int) -> torch.Tensor:
    """As ``Seam.pinned``."""
    return _seam.pinned(nbytes)


class Streams:
    """The streams of the thread that began a transfer, for the threads that it has others do the copying in.

    Attributes:
        devices: On which they are; none for a state on the CPU.
    """

    def __init__(self, devices: Sequence[torch.device] = ()) -> None:
        self.devices = tuple(devices)
        self._streams = [_seam.current_stream(device) for device in self.devices]

    def enter(self) -> None:
        """Copy in these streams, in the calling thread."""
        # A new thread has each device's default stream, on which a copy would not wait for what the caller's has begun.
        for stream in self._streams:
            _seam.set_stream(stream)


NO_STREAMS = Streams()


def settle(devices: Sequence[torch.device], deadline: Deadline | None = None) -> Streams:
    """Wait until some devices have done all that they were told to; gives the caller's streams on them.

    Raises:
        TransferTimeout: The deadline passed. A thread goes on waiting for the device, and touches nothing.
    """
    # The state may still be computed on streams that nobody has told us of, so all of them, and not the current one's
    # event. For all there is no event: torch waits for a whole device, without a limit, and a kernel may hang. So it
    # waits in a thread, and the call's deadline holds here.
    for device in devices:
        if deadline is None:
            _seam.synchronize(device)
        else:
            _wait(device, deadline)
    return Streams(devices) if devices else NO_STREAMS


def _wait(device: torch.device, deadline: Deadline) -> None:
    error: list[BaseException] = []

    def synchronize() -> None:
        try:
            _seam.synchronize(device)
        except BaseException as exc:
            error.append(exc)

    thread = threading.Thread(target=synchronize, name="ft_transport-settle", daemon=True)
    thread.start()
    thread.join(deadline.remaining().total_seconds())
    if thread.is_alive():
        seconds = deadline.timeout.total_seconds()
        raise TransferTimeout(f"timed out after {seconds:g} s: {device} has not done what it was told before this call")
    if error:
        raise error.pop()
