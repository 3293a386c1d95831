"""Accelerators: what is to be waited for before bytes are read or written, and on which streams they are copied.

Strategy: all that asks for a device, its streams, or a wait for it goes through here, over ``torch.accelerator``: one
place to be right, and one to be replaced by a stand-in (``ft_transport.testing.StandInAccelerator``) where there is no
accelerator. A state names the devices that it is on, and no other is touched: to ask one that nobody uses makes a
context on it, some hundred MiB. A state on the CPU alone asks nothing.

Small tensors cross in one copy: packed on the device first, since a copy and a wait for each of five thousand is what
takes the time.

Not here yet: pieces with gaps or other strides, which torch copies one by one (``_plan.blocks``).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from operator import attrgetter
from typing import Any

import torch

from ft_transport._deadline import Deadline
from ft_transport.errors import TransferTimeout

__all__ = [
    "NO_STREAMS",
    "Seam",
    "Streams",
    "devices_of",
    "is_on",
    "replaced",
    "seam",
    "settle",
]

logger = logging.getLogger("ft_transport")

# How soon a wait finds that its call was cancelled.
_SLICE = timedelta(milliseconds=250)


class Seam:
    """What is asked of torch. A stand-in has the same methods.

    Attributes:
        on_host: Whether the CPU can read a tensor's memory.
    """

    # A function of C, asked for each of twenty thousand leaves.
    on_host: Callable[[torch.Tensor], bool] = attrgetter("is_cpu")

    def devices_of(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.device, ...]:
        """The devices that some of the tensors are on, each once; without the CPU, and "meta", which has no bytes."""
        if all(map(self.on_host, tensors)):
            return ()
        found = dict.fromkeys(map(attrgetter("device"), tensors))
        return tuple(device for device in found if device.type not in ("cpu", "meta"))

    def to_host(self, target: torch.Tensor, parts: list[torch.Tensor]) -> None:
        """Copy flat tensors of uint8 on one device, one behind the other, to the host; they are there on return."""
        target.copy_(torch.cat(parts) if len(parts) > 1 else parts[0])

    def to_device(self, parts: list[torch.Tensor], source: torch.Tensor) -> None:
        """The other way round. What ``source`` holds may change once this has returned."""
        if len(parts) == 1:
            parts[0].copy_(source)
            return
        packed = source.to(parts[0].device)
        torch._foreach_copy_(parts, list(torch.split(packed, [part.numel() for part in parts])))

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Memory of the host, flat uint8, that devices reach without the CPU. Raises RuntimeError for want of it."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def synchronize(self, device: torch.device) -> None:
        """Wait until a device has done all that it was told to, on every stream."""
        torch.accelerator.synchronize(device)

    def await_stream(self, stream: Any) -> None:
        """Wait until a stream has done all that it was told to."""
        stream.synchronize()

    def current_stream(self, device: torch.device) -> Any:
        """The calling thread's stream on a device; without an index, on its current one."""
        return torch.accelerator.current_stream(device)

    def set_stream(self, stream: Any) -> None:
        """Make a stream the calling thread's, on its device."""
        torch.accelerator.set_stream(stream)


_seam = Seam()


def replaced(by: Seam) -> Seam:
    """Ask this one from now on; gives the one before."""
    global _seam
    before, _seam = _seam, by
    return before


def seam() -> Seam:
    """What is asked now."""
    return _seam


def devices_of(tensors: Sequence[torch.Tensor]) -> tuple[torch.device, ...]:
    """As ``Seam.devices_of``."""
    return _seam.devices_of(tensors)


def is_on(tensor: torch.Tensor, device_type: str) -> bool:
    """Whether a tensor is on a device of this type, as it is: no copy is needed."""
    return _seam.on_host(tensor) if device_type == "cpu" else tensor.device.type == device_type


class Streams:
    """The streams of the thread that began a transfer, for the threads that it has others do the copying in.

    Args:
        devices: That are copied from, or to; none for a state on the CPU. The last one is the current one of whoever
            enters: to set a stream does that (torch.accelerator).

    Attributes:
        devices: As above.
    """

    def __init__(self, devices: Sequence[torch.device] = ()) -> None:
        self.devices = tuple(devices)
        self._streams = [_seam.current_stream(device) for device in self.devices]

    def enter(self) -> None:
        """Copy in these streams, in the calling thread: one that was started for it."""
        # A new thread has each device's default stream, on which a copy would not wait for what the caller's has begun.
        for stream in self._streams:
            _seam.set_stream(stream)

    def finish(self, deadline: Deadline) -> None:
        """Wait for what was copied in them, so that it is there for other streams, too. Never raises for want of time.

        What others do on these devices, training above all, is not waited for.
        """
        for stream in self._streams:
            if not _in_time(lambda stream=stream: _seam.await_stream(stream), deadline):  # type: ignore[misc]
                logger.warning("copies on an accelerator are not over; other streams must wait for the caller's")


NO_STREAMS = Streams()


def settle(devices: Sequence[torch.device], deadline: Deadline | None = None) -> None:
    """Wait until some devices have done all that they were told to.

    Raises:
        TransferTimeout: The deadline passed. A thread goes on waiting for the device, and touches nothing.
    """
    # The state may still be computed on streams that nobody has told us of, so all of them, and not the current one's
    # event. For all there is no event: torch waits for a whole device, without a limit, and a kernel may hang.
    for device in devices:
        if deadline is None:
            _seam.synchronize(device)
        elif not _in_time(lambda device=device: _seam.synchronize(device), deadline):  # type: ignore[misc]
            seconds = deadline.timeout.total_seconds()
            raise TransferTimeout(
                f"timed out after {seconds:g} s: {device} has not done what it was told before this call"
            )


def _in_time(wait: Callable[[], object], deadline: Deadline) -> bool:
    """Wait in a thread, which may go on when the deadline has passed; gives whether it is over."""
    error: list[BaseException] = []

    def run() -> None:
        try:
            wait()
        except BaseException as exc:
            error.append(exc)

    thread = threading.Thread(target=run, name="ft_transport-settle", daemon=True)
    thread.start()
    while thread.is_alive() and not deadline.expired():
        # In slices: a call is cancelled by way of its deadline.
        thread.join(min(deadline.remaining(), _SLICE).total_seconds())
    if error:
        raise error.pop()
    return not thread.is_alive()
