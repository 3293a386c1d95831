"""Accelerators: what is to be waited for before bytes are read or written, and on which streams they are copied.

Strategy: all that asks for a device, its streams, or a wait for it goes through here, over ``torch.accelerator``: one
place to be right, and one to be replaced by a stand-in (``ft_transport.testing.StandInAccelerator``) where there is no
accelerator. A state names the devices that it is on, and no other is touched: to ask one that nobody uses makes a
context on it, some hundred MiB. A state on the CPU alone asks nothing.

A transfer copies in streams of its own: in the caller's, copies would wait for the step that training is in. They are
begun, and waited for by an event that is looked at again and again, since torch waits for none with a limit.

Small tensors cross in one copy: packed on the device first, since a copy and a wait for each of five thousand is what
takes the time.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from operator import attrgetter
from typing import Any

import torch

from ft_transport._deadline import MAX_WAIT, Deadline
from ft_transport.errors import TransferTimeout

__all__ = [
    "NOTHING",
    "NO_STREAMS",
    "Copies",
    "Seam",
    "Streams",
    "brought",
    "is_on",
    "replaced",
    "seam",
    "settle",
    "wait_for",
]

logger = logging.getLogger("ft_transport")

# How soon a wait finds that its call was cancelled.
_SLICE = timedelta(milliseconds=250)
# How long a call that has failed waits for copies that it has begun.
_LAST_COPIES = timedelta(seconds=0.5)
_CPU = torch.device("cpu")


class Seam:
    """What is asked of torch. A stand-in has the same methods.

    Attributes:
        on_host: Whether the CPU can read a tensor's memory.
        device_of: The device that a tensor's memory is on.
    """

    # Functions of C, asked for each of twenty thousand leaves.
    on_host: Callable[[torch.Tensor], bool] = attrgetter("is_cpu")
    device_of: Callable[[torch.Tensor], torch.device] = attrgetter("device")

    # -------------------------------------------------------------------------------------- memory

    def reach(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor as work on its device finds it: for what is given to :meth:`run`."""
        return tensor

    def empty_strided(
        self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """A tensor without content, on a device or the host. Raises RuntimeError for want of memory."""
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Memory of the host, flat uint8, that devices reach without the CPU. Raises RuntimeError for want of it."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    # -------------------------------------------------------------------------------------- copies

    def run(self, device: torch.device, work: Callable[[], object]) -> None:
        """Let a device do something, in the calling thread's stream: it is begun on return."""
        # torch has each operation done there anyway, and in that stream; a stand-in has to be told.
        work()

    def to_host(self, target: torch.Tensor, parts: list[torch.Tensor], gaps: Sequence[int]) -> None:
        """Copy flat tensors of uint8 on one device to the host, packed as they lie there. Within :meth:`run`.

        Args:
            target: Where they go: its first byte is that of the first part, its last one that of the last part.
            parts: What is copied.
            gaps: Bytes of the target between each part and the next one, which keep what they hold.
        """
        self.hold(parts)
        if len(parts) == 1:
            target.copy_(parts[0], non_blocking=True)
        elif not any(gaps):
            target.copy_(torch.cat(parts), non_blocking=True)
        else:
            # What lies between them goes there and back: two copies, where there would be one for each part.
            packed = target.to(parts[0].device, non_blocking=True)
            torch._foreach_copy_(_split(packed, parts, gaps), parts)
            target.copy_(packed, non_blocking=True)

    def to_device(self, parts: list[torch.Tensor], source: torch.Tensor, gaps: Sequence[int]) -> None:
        """The other way round."""
        self.hold(parts)
        if len(parts) == 1:
            parts[0].copy_(source, non_blocking=True)
            return
        packed = source.to(parts[0].device, non_blocking=True)
        torch._foreach_copy_(parts, _split(packed, parts, gaps))

    def hold(self, tensors: Sequence[torch.Tensor]) -> None:
        """The calling thread's streams work on these tensors of devices. Within, or before, :meth:`run`."""
        # Who gives memory back (FSDP's resize_ to nothing) gives it to the allocator, and the next one to take it may
        # be on another stream than this work: the allocator is to wait for it.
        for tensor in tensors:
            tensor.record_stream(torch.accelerator.current_stream(tensor.device))

    # ----------------------------------------------------------------------------- streams and waits

    def synchronize(self, device: torch.device) -> None:
        """Wait until a device has done all that it was told to, on every stream. In a thread of ours."""
        # First: a new thread's device is number 0, and to go back to that makes a context there, on a card that may be
        # another rank's.
        torch.accelerator.set_device_index(device)
        torch.accelerator.synchronize(device)

    def new_stream(self, device: torch.device) -> Any:
        """A stream beside all others."""
        return torch.Stream(device)

    def current_stream(self, device: torch.device) -> Any:
        """The calling thread's stream on a device; without an index, on its current one."""
        return torch.accelerator.current_stream(device)

    def adopt(self, streams: Sequence[Any]) -> None:
        """Let these be those of a thread of ours, as long as it lives; the last one's device is its current one."""
        for stream in streams:
            torch.accelerator.set_stream(stream)

    @contextlib.contextmanager
    def use(self, streams: Sequence[Any]) -> Iterator[None]:
        """Let these be the calling thread's while a block runs, each on its device."""
        # Not ``with stream:``, which keeps what was current before in the stream itself: these are used by several
        # threads at once.
        index = torch.accelerator.current_device_index()
        before = [torch.accelerator.current_stream(stream.device) for stream in streams]
        try:
            self.adopt(streams)
            yield
        finally:
            # To set a stream makes its device the current one.
            self.adopt(before)
            torch.accelerator.set_device_index(index)

    def record(self, stream: Any) -> Any:
        """An event behind all that a stream was told so far."""
        return stream.record_event()

    def is_over(self, event: Any) -> bool:
        """Whether what is before an event is done. Raises what a device raises."""
        return bool(event.query())


def _split(packed: torch.Tensor, parts: Sequence[torch.Tensor], gaps: Sequence[int]) -> list[torch.Tensor]:
    """The places of some parts in what is packed, with gaps between them."""
    sizes = [size for part, gap in zip(parts, [*gaps, 0], strict=True) for size in (part.numel(), gap)]
    return list(torch.split(packed, sizes)[::2])


_seam = Seam()


def replaced(by: Seam) -> Seam:
    """Ask this one from now on; gives the one before."""
    global _seam
    before, _seam = _seam, by
    return before


def seam() -> Seam:
    """What is asked now."""
    return _seam


def on_host(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the CPU can read all of them."""
    return all(map(_seam.on_host, tensors))


def type_of(tensor: torch.Tensor) -> str:
    """The type of the device that a tensor is on."""
    return _seam.device_of(tensor).type


def _devices_of(tensors: Sequence[torch.Tensor]) -> tuple[torch.device, ...]:
    """The devices that some of the tensors are on, each once; without the CPU, and "meta", which has no bytes."""
    if on_host(tensors):
        return ()
    found = dict.fromkeys(map(_seam.device_of, tensors))
    return tuple(device for device in found if device.type not in ("cpu", "meta"))


def is_on(tensor: torch.Tensor, device_type: str) -> bool:
    """Whether a tensor is on a device of this type, as it is: no copy is needed."""
    return _seam.on_host(tensor) if device_type == "cpu" else type_of(tensor) == device_type


def copy(target: torch.Tensor, source: torch.Tensor, *, begin: bool = False) -> None:
    """Copy a tensor to another one of its shape, wherever they are, in the calling thread's streams.

    Args:
        begin: Only begin it, where an accelerator takes part; see :class:`Copies`. Else it is over where the host does.
    """
    for tensor in (target, source):
        if not _seam.on_host(tensor):
            _seam.hold([each for each in (target, source) if not _seam.on_host(each)])

            def run() -> None:
                _seam.reach(target).copy_(_seam.reach(source), non_blocking=begin)

            _seam.run(_seam.device_of(tensor), run)
            return
    target.copy_(source)


def brought(tensor: torch.Tensor, deadline: Deadline) -> torch.Tensor:
    """A small tensor on the host, once the calling thread's stream has come to where it was filled.

    Raises:
        TransferTimeout: That was not by the deadline.
    """
    if not _seam.on_host(tensor):
        # ``item()`` and ``cpu()`` wait without a limit for all that was told to the stream before.
        device = _seam.device_of(tensor)
        Copies(deadline, [device], [_seam.current_stream(device)]).finish()
    return tensor.cpu()


class Copies:
    """What was begun on some streams up to now, to be waited for.

    Args:
        deadline: Until when.
        devices: That the streams are of.
        streams: One for each.
    """

    def __init__(self, deadline: Deadline, devices: Sequence[torch.device] = (), streams: Sequence[Any] = ()) -> None:
        self._deadline = deadline
        self._events = [(device, _seam.record(stream)) for device, stream in zip(devices, streams, strict=True)]

    def finish(self) -> None:
        """Wait until it is done.

        Raises:
            TransferTimeout: The deadline passed; a copy may still be under way.
        """
        deadline = self._deadline
        for device, event in self._events:
            if not deadline.poll(lambda event=event: _seam.is_over(event)):  # type: ignore[misc]
                seconds = deadline.timeout.total_seconds()
                raise TransferTimeout(f"timed out after {seconds:g} s: copies of {device} are not over")


class Streams:
    """A transfer's own streams, one for each device that its state is on.

    They are of the calling thread's device context, and are used by all threads of the transfer: what is copied in one
    runs in order, so what is read back from a device is what was copied there before.

    Args:
        devices: That are copied from, or to; none for a state on the CPU.
        deadline: Until when copies may take; None: as long as they take.
        wire: Where messages live. If that is an accelerator it is the current device of who uses these streams, for
            what is made there without an index.

    Attributes:
        devices: Of all these the accelerators, with their indices.
        cross: Whether messages live on the host, and what they are of does not. Then they pass through pinned memory,
            and whoever sends them waits for their copies; a wire of an accelerator comes behind them by itself.
    """

    def __init__(
        self, devices: Sequence[torch.device] = (), deadline: Deadline | None = None, wire: torch.device = _CPU
    ) -> None:
        found: dict[torch.device, None] = {}
        for device in (*devices, wire):
            if device.type != "cpu":
                device = _seam.current_stream(device).device  # "cuda" is one of the others
                found.pop(device, None)
                found[device] = None
        self.devices = tuple(found)
        self.cross = bool(found) and wire.type == "cpu"
        self._deadline = deadline or Deadline(MAX_WAIT)
        self._own = [_seam.new_stream(device) for device in self.devices]

    def use(self, *, for_good: bool = False) -> contextlib.AbstractContextManager[None]:
        """Let the calling thread copy in them while a block runs.

        Args:
            for_good: It is a thread of ours, that does nothing else: it keeps them.
        """
        if not self.devices:
            return contextlib.nullcontext()
        # A new thread's device is number 0. To set that back would make a context there, see ``Seam.synchronize``.
        if for_good:
            _seam.adopt(self._own)
            return contextlib.nullcontext()
        return _seam.use(self._own)

    def begun(self) -> Copies:
        """What was copied in them so far."""
        return Copies(self._deadline, self.devices, self._own) if self.devices else NOTHING

    def abandon(self) -> None:
        """After an error: let what was begun come to an end, a moment beyond the deadline, or say that it has not."""
        # It cannot be called back, and writes to the user's memory until then. Nothing keeps a copy in a stream of its
        # own but a device that hangs.
        for deadline in (self._deadline, Deadline(_LAST_COPIES)):
            try:
                Copies(deadline, self.devices, self._own).finish()
                return
            except TransferTimeout:
                pass
        logger.warning("copies on an accelerator were begun and are not over: they may still write to the template")


# Of a state on the CPU.
NO_STREAMS = Streams()
# Nothing to wait for.
NOTHING = Copies(Deadline(MAX_WAIT))


def settle(tensors: Sequence[torch.Tensor], deadline: Deadline | None = None, wire: torch.device = _CPU) -> Streams:
    """Wait until the devices of some tensors have done all that they were told to; gives streams to copy in.

    Args:
        tensors: What is to be read or written.
        deadline: Until when; also of the copies. None: as long as it takes.
        wire: Where messages live; see :class:`Streams`.

    Raises:
        TransferTimeout: The deadline passed. A thread goes on waiting for the device, and touches nothing.
    """
    devices = wait_for(tensors, deadline)
    return Streams(devices, deadline, wire) if devices or wire.type != "cpu" else NO_STREAMS


def wait_for(tensors: Sequence[torch.Tensor], deadline: Deadline | None = None) -> tuple[torch.device, ...]:
    """As :func:`settle`, of who copies nothing: gives the devices that were waited for."""
    deadline = deadline or Deadline(MAX_WAIT)
    # The state may still be computed on streams that nobody has told us of, so all of them, and not the current one's
    # event. For all there is no event: torch waits for a whole device, without a limit, and a kernel may hang.
    devices = _devices_of(tensors)
    for device in devices:
        if not _in_time(lambda device=device: _seam.synchronize(device), deadline):  # type: ignore[misc]
            seconds = deadline.timeout.total_seconds()
            raise TransferTimeout(
                f"timed out after {seconds:g} s: {device} has not done what it was told before this call"
            )
    return devices


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
