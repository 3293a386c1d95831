"""What the unit tests share: random states, bit for bit comparison, and a whole transfer in two threads."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

import torch

from ft_transport._deadline import Deadline
from ft_transport._group.channel import Channel, GroupChannel, Pending
from ft_transport._group.destination import receive
from ft_transport._group.source import serve
from ft_transport._options import Options
from ft_transport._plan.source import SourcePlan
from ft_transport._state.tree import flatten, format_path, paths_of
from ft_transport._telemetry.report import PeerReport, TransferReport
from ft_transport._wire.layout import Limits
from ft_transport.testing import MemoryChannel, memory_channels

CPU = torch.device("cpu")
TIMEOUT = timedelta(seconds=20)


class Point(NamedTuple):
    """A namedtuple that a receiver must allow first."""

    x: Any
    y: Any


@dataclass(frozen=True)
class Config:
    """A plain value of a class that a receiver must allow first."""

    width: int = 3


# --------------------------------------------------------------------------------------------- bytes


def storage_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The whole storage of a tensor as flat uint8; shares the memory."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage())


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The bytes of the elements of a plain tensor in row-major order, whatever its dtype makes of them."""
    tensor = tensor.detach()
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    if tensor.numel() == 0:
        return b""
    size = tensor.dtype.itemsize
    begin = tensor.storage_offset() * size
    if tensor.is_contiguous():
        return bytes(storage_bytes(tensor)[begin : begin + tensor.numel() * size].tolist())
    strides = [stride * size for stride in tensor.stride()]
    flat = storage_bytes(tensor).as_strided([*tensor.shape, size], [*strides, 1], begin)
    return bytes(flat.reshape(-1).tolist())


def difference(got: object, expected: object) -> str:
    """The first difference in structure, type, dtype, shape or raw bytes; empty if there is none."""
    (nodes, leaves, _), (other_nodes, other_leaves, _) = flatten(got), flatten(expected)
    if nodes != other_nodes:
        return f"structure: {nodes} against {other_nodes}"
    for index, (leaf, other) in enumerate(zip(leaves, other_leaves, strict=True)):
        if reason := _leaf_difference(leaf, other):
            return f"{format_path(paths_of(nodes)[index])}: {reason}"
    return ""


def bitwise_equal(got: object, expected: object) -> bool:
    """Whether structure, types, dtypes, shapes and raw bytes agree, NaN payloads included."""
    return not difference(got, expected)


def _leaf_difference(leaf: Any, other: Any) -> str:
    if type(leaf) is not type(other):
        return f"{type(leaf).__name__} against {type(other).__name__}"
    if not isinstance(leaf, torch.Tensor):
        same = leaf == other or (leaf != leaf and other != other)
        return "" if same and repr(leaf) == repr(other) else f"{leaf!r} against {other!r}"
    if leaf.dtype != other.dtype or leaf.shape != other.shape:
        return f"{leaf.dtype} {tuple(leaf.shape)} against {other.dtype} {tuple(other.shape)}"
    if leaf.requires_grad != other.requires_grad:
        return f"requires_grad {leaf.requires_grad} against {other.requires_grad}"
    return "" if raw_bytes(leaf) == raw_bytes(other) else "bytes differ"


def randomized(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """The tensor, its whole storage filled with random bytes; bit patterns, not numbers."""
    if tensor.untyped_storage().nbytes():
        storage_bytes(tensor).random_(0, 256, generator=torch.Generator().manual_seed(seed))
    return tensor


def noise(shape: int | tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A new contiguous tensor of random bytes."""
    return randomized(torch.empty(shape, dtype=dtype), seed)


def tensors_of(state: object) -> list[torch.Tensor]:
    """The tensor leaves in order."""
    return [leaf for leaf in flatten(state).leaves if isinstance(leaf, torch.Tensor)]


def snapshot(state: object) -> list[bytes]:
    """The bytes of every storage behind the state, neighbours included."""
    return [bytes(storage_bytes(tensor).tolist()) for tensor in tensors_of(state)]


def byte_addresses(tensor: torch.Tensor) -> frozenset[int]:
    """The address of every byte of every element."""
    if tensor.numel() == 0:
        return frozenset()
    places = torch.zeros(tuple(tensor.shape), dtype=torch.int64)
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        steps = torch.arange(size) * stride
        places = places + steps.view([-1 if d == dim else 1 for d in range(tensor.dim())])
    size = tensor.dtype.itemsize
    starts = set((places.reshape(-1) * size + tensor.data_ptr()).tolist())
    return frozenset(start + byte for start in starts for byte in range(size))


def distinct_nbytes(state: object) -> int:
    """How many distinct bytes of memory the state's tensors refer to."""
    return len(frozenset().union(*map(byte_addresses, tensors_of(state))))


def ties(state: object) -> list[tuple[int, int, int]]:
    """Pairs of tensor leaves that share memory, with the distance of their first elements in bytes."""
    tensors = tensors_of(state)
    addresses = list(map(byte_addresses, tensors))
    return [
        (i, j, tensors[j].data_ptr() - tensors[i].data_ptr())
        for i in range(len(tensors))
        for j in range(i)
        if addresses[i] & addresses[j]
    ]


# ------------------------------------------------------------------------------------------ transfer


class SmallOptions(Options):
    """Options with messages so small that a small state takes several flights."""

    def limits(self, nbytes: int) -> Limits:
        return Limits(message_bytes=1024, flight_bytes=1024, pack_below=256, pack_from=4, window=2)


SMALL = SmallOptions(CPU)
PLAIN = Options(CPU)


@dataclass
class Side:
    """How a transfer ended on one side."""

    report: TransferReport
    channel: Channel
    result: Any = None
    written: list[torch.Tensor] = field(default_factory=list)
    error: BaseException | None = None

    @property
    def peer(self) -> PeerReport:
        return self.report.peers[0]

    @property
    def text(self) -> str:
        return str(self.error)


@dataclass
class Ends:
    """Both sides of a transfer that is over."""

    source: Side
    destination: Side
    frame_nbytes: int


def transfer(
    state: object,
    template: Callable[[], object] | None = None,
    *,
    options: Options = PLAIN,
    destination_options: Options | None = None,
    step: int | None = 7,
    expected_step: int | None = 7,
    channels: tuple[Channel, Channel] | None = None,
    timeout: timedelta = TIMEOUT,
    destination_timeout: timedelta | None = None,
) -> Ends:
    """Move a state from one thread to another. What either side raises is in the result."""
    ends = channels or memory_channels()
    source = Side(TransferReport("source", "test", step, [PeerReport(1)]), ends[0])
    destination = Side(TransferReport("destination", "test", step, [PeerReport(0)]), ends[1])
    outbound = SourcePlan(state, step, options, source.report)

    def run_destination() -> None:
        try:
            received = receive(
                ends[1],
                expected_step,
                template,
                destination_options or options,
                Deadline(destination_timeout or timeout),
                destination.report,
            )
            destination.result, destination.written = received.state, received.written
        except BaseException as exc:
            destination.error = exc
        destination.report.finish(1.0, destination.error)

    thread = threading.Thread(target=run_destination, daemon=True)
    thread.start()
    try:
        serve(ends[0], outbound, Deadline(timeout), source.peer)
    except BaseException as exc:
        source.error = exc
    source.report.finish(1.0, source.error)
    thread.join(timeout.total_seconds() + 1)
    assert not thread.is_alive(), "the destination has outlasted its deadline"
    return Ends(source, destination, len(outbound.frame))


def succeed(state: object, template: Callable[[], object] | None = None, **kwargs: Any) -> Ends:
    """A transfer that must succeed on both sides and leave nothing posted."""
    ends = transfer(state, template, **kwargs)
    for side in (ends.destination, ends.source):
        if side.error is not None:
            raise side.error
        assert side.report.complete
        assert num_posted(side.channel) == 0
    return ends


def num_posted(channel: Any) -> int:
    """Operations that the in-memory channel at the bottom still holds."""
    while not isinstance(channel, MemoryChannel):
        channel = channel._channel
    return channel.num_posted


# --------------------------------------------------------------------------------------------- time


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Look again and again until it holds: for what happens in a thread that tells nobody."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        pace(0.001)


def pace(seconds: float) -> None:
    """Let a peer that a test plays take its time, as a slow one does.

    For that alone: never to give something time to happen, which it may not take, or take longer.
    """
    threading.Event().wait(seconds)


# -------------------------------------------------------------------------------------------- fakes


class Wrapped:
    """A channel that passes everything on; tests override what they want to see."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    @property
    def peer_rank(self) -> int:
        return self._channel.peer_rank

    @property
    def nbytes_wire(self) -> int:
        return self._channel.nbytes_wire

    @property
    def broken(self) -> bool:
        return self._channel.broken

    @property
    def in_order(self) -> bool:
        return self._channel.in_order

    def send(self, tensor: torch.Tensor, tag: int) -> Pending:
        return self._channel.send(tensor, tag)

    def recv(self, tensor: torch.Tensor, tag: int) -> Pending:
        return self._channel.recv(tensor, tag)

    def wait(self, pending: Pending, deadline: Deadline) -> None:
        self._channel.wait(pending, deadline)

    def drop(self) -> None:
        self._channel.drop()

    def abort(self) -> None:
        self._channel.abort()


class Recorded(Wrapped):
    """Notes every operation: what, tag, bytes, and the tensor's address."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel)
        self.operations: list[tuple[str, int, int, int]] = []

    def send(self, tensor: torch.Tensor, tag: int) -> Pending:
        self._note("send", tensor, tag)
        return super().send(tensor, tag)

    def recv(self, tensor: torch.Tensor, tag: int) -> Pending:
        self._note("recv", tensor, tag)
        return super().recv(tensor, tag)

    def _note(self, what: str, tensor: torch.Tensor, tag: int) -> None:
        self.operations.append((what, tag, tensor.numel() * tensor.element_size(), tensor.data_ptr()))


class FakeWork:
    """What a process group returns for a posted operation; Python all the way, as torchft's wrappers are."""

    def __init__(self, channel: MemoryChannel, pending: Pending) -> None:
        self._channel = channel
        self._pending = pending

    def wait(self, timeout: timedelta) -> bool:
        try:
            self._channel.wait(self._pending, Deadline(timeout))
        except Exception as exc:
            raise RuntimeError(f"{type(exc).__name__}: {exc}") from None
        return True


class FakeGroup:
    """One rank of a group of two, with p2p calls as a process group has them."""

    def __init__(self, channel: MemoryChannel) -> None:
        self.channel = channel
        self.works: list[weakref.ref[FakeWork]] = []

    def send(self, tensors: list[torch.Tensor], rank: int, tag: int) -> FakeWork:
        return self._work(self.channel.send(tensors[0], tag))

    def recv(self, tensors: list[torch.Tensor], rank: int, tag: int) -> FakeWork:
        return self._work(self.channel.recv(tensors[0], tag))

    def _work(self, pending: Pending) -> FakeWork:
        work = FakeWork(self.channel, pending)
        self.works.append(weakref.ref(work))
        return work


def group_channels() -> tuple[tuple[FakeGroup, FakeGroup], tuple[GroupChannel, GroupChannel]]:
    """Two connected fake groups, and the real channel over each."""
    groups = tuple(map(FakeGroup, memory_channels()))
    channels = tuple(GroupChannel(group, 1 - rank, CPU) for rank, group in enumerate(groups))
    return groups, channels  # type: ignore[return-value]


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error with everything that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
