"""The seam to a process group: what is called, and what its exceptions become."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from helpers import CPU

from ft_transport import PeerFailure, TransferError, TransferTimeout
from ft_transport._deadline import Deadline
from ft_transport._group.channel import Channel, GroupChannel
from ft_transport.testing import FaultyChannel, MemoryChannel

LONG = timedelta(seconds=60)


class Work:
    """Does what it is told when waited for."""

    def __init__(self, outcome: Callable[[], None]) -> None:
        self._outcome = outcome
        self.waits: list[timedelta] = []

    def wait(self, timeout: timedelta) -> bool:
        self.waits.append(timeout)
        self._outcome()
        return True


class Group:
    def __init__(self, outcome: Callable[[], None] = lambda: None, lock: Any = None) -> None:
        self.calls: list[tuple[str, torch.Tensor, int, int]] = []
        self.works: list[Work] = []
        self._outcome = outcome
        self._lock = lock

    def _post(self, what: str, tensors: list[torch.Tensor], rank: int, tag: int) -> Work:
        assert self._lock is None or self._lock.locked()
        (tensor,) = tensors
        self.calls.append((what, tensor, rank, tag))
        work = Work(self._outcome)
        self.works.append(work)
        return work

    def send(self, tensors: list[torch.Tensor], rank: int, tag: int) -> Work:
        return self._post("send", tensors, rank, tag)

    def recv(self, tensors: list[torch.Tensor], rank: int, tag: int) -> Work:
        return self._post("recv", tensors, rank, tag)


def raising(error: Exception) -> Callable[[], None]:
    def outcome() -> None:
        raise error

    return outcome


def failed_wait(error: Exception, deadline: Deadline | None = None) -> tuple[GroupChannel, TransferError]:
    channel = GroupChannel(Group(raising(error)), 3, CPU)
    pending = channel.recv(torch.zeros(4), 5)
    with pytest.raises(TransferError) as caught:
        channel.wait(pending, deadline or Deadline(LONG))
    assert pending.work is None
    assert pending.tensor is None
    return channel, caught.value


def test_operations_reach_the_group() -> None:
    group = Group()
    channel = GroupChannel(group, 3, CPU)
    ours, theirs = torch.zeros(4), torch.zeros(2, dtype=torch.int64)
    channel.wait(channel.send(ours, 7), Deadline(LONG))
    pending = channel.recv(theirs, 8)
    assert channel.nbytes_wire == 16, "what is only posted has not been there"
    channel.wait(pending, Deadline(LONG))
    assert [(what, rank, tag) for what, _, rank, tag in group.calls] == [("send", 3, 7), ("recv", 3, 8)]
    assert group.calls[0][1] is ours
    assert channel.nbytes_wire == 32
    assert channel.peer_rank == 3
    assert not channel.broken


def test_a_wait_takes_what_is_left_and_never_less_than_a_millisecond() -> None:
    group = Group()
    channel = GroupChannel(group, 1, CPU)
    channel.wait(channel.send(torch.zeros(1), 1), Deadline(LONG))
    channel.wait(channel.send(torch.zeros(1), 1), Deadline(timedelta(0)))
    assert timedelta(seconds=59) < group.works[0].waits[0] <= LONG
    assert group.works[1].waits == [timedelta(milliseconds=1)]


@pytest.mark.parametrize(
    "text",
    [
        "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:133] Timed out waiting 1000ms for recv operation",
        "[x.cc:1] Timed out waiting 60000ms for send operation to complete",
    ],
)
def test_our_own_time_out(text: str) -> None:
    channel, error = failed_wait(RuntimeError(text))
    assert isinstance(error, TransferTimeout)
    assert "timed out after 60 s" in str(error)
    assert channel.broken


@pytest.mark.parametrize("error", [RuntimeError("anything"), TimeoutError(), ValueError("Connection closed by peer")])
def test_whatever_comes_after_the_deadline_is_our_time_out(error: Exception) -> None:
    channel, translated = failed_wait(error, Deadline(timedelta(0)))
    assert isinstance(translated, TransferTimeout)
    assert channel.broken


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[pair.cc:1] Application timeout caused pair closure"),
        TimeoutError("the whole group"),
        RuntimeError("Operation timed out!"),
    ],
)
def test_a_time_out_of_somebody_else_breaks_the_group(error: Exception) -> None:
    channel, translated = failed_wait(error)
    assert isinstance(translated, PeerFailure)
    assert "configured anew" in str(translated)
    assert translated.peer_rank == 3
    assert channel.broken


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[pair.cc:1] Connection closed by peer [127.0.0.1]:1234\nand a second line"),
        RuntimeError("Connection reset by peer"),
        OSError("broken pipe"),
        AssertionError(),
    ],
)
def test_a_dead_peer_does_not_break_the_group(error: Exception) -> None:
    channel, translated = failed_wait(error)
    assert isinstance(translated, PeerFailure)
    assert not isinstance(translated, TransferTimeout)
    assert type(error).__name__ in str(translated)
    assert "second line" not in str(translated)
    assert translated.peer_rank == 3
    assert not channel.broken


def test_an_operation_that_another_thread_has_dropped_is_not_waited_for() -> None:
    """As after Ctrl-C, which aborts the channels of all destinations."""
    channel = GroupChannel(Group(), 3, CPU)
    pending = channel.send(torch.zeros(4), 1)
    channel.drop()
    with pytest.raises(PeerFailure, match="the channel was aborted"):
        channel.wait(pending, Deadline(LONG))
    assert channel.nbytes_wire == 0


class Refusing(Group):
    def send(self, tensors: list[torch.Tensor], rank: int, tag: int) -> Work:
        raise RuntimeError("Connection closed by peer")


def test_a_post_that_fails_leaves_nothing_posted() -> None:
    channel = GroupChannel(Refusing(), 3, CPU)
    with pytest.raises(PeerFailure, match="Connection closed by peer"):
        channel.send(torch.zeros(5), 1)
    assert channel.nbytes_wire == 0


def test_what_is_no_exception_passes_through() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    channel = GroupChannel(Group(interrupt), 1, CPU)
    pending = channel.recv(torch.zeros(1), 1)
    with pytest.raises(KeyboardInterrupt):
        channel.wait(pending, Deadline(LONG))
    assert pending.work is None


@pytest.mark.parametrize("where", ["wait", "post"])
def test_a_kept_error_keeps_neither_work_nor_foreign_frames(where: str) -> None:
    class Big:
        pass

    held: list[weakref.ref[Any]] = []

    class Holding(Group):
        def _post(self, what: str, tensors: list[torch.Tensor], rank: int, tag: int) -> Work:
            big = Big()
            held.append(weakref.ref(big))
            if where == "post":
                raise RuntimeError("Connection reset by peer")
            work = super()._post(what, tensors, rank, tag)
            held.append(weakref.ref(work))
            self.works.clear()
            self.calls.clear()
            return work

    def reset() -> None:
        raise RuntimeError("Connection reset by peer")

    channel = GroupChannel(Holding(reset), 1, CPU)
    tensor = torch.zeros(3)
    if where == "wait":
        held.append(weakref.ref(tensor))
    kept = []
    try:
        channel.wait(channel.recv(tensor, 1), Deadline(LONG))
    except PeerFailure as exc:
        kept.append(exc)
    del tensor
    gc.collect()
    assert len(kept) == 1
    assert kept[0].__context__ is None
    assert kept[0].__cause__ is None
    assert [reference() for reference in held] == [None] * (3 if where == "wait" else 1)


def test_drop_lets_go_of_everything() -> None:
    group = Group()
    channel = GroupChannel(group, 1, CPU)
    pendings = [channel.recv(torch.zeros(2), tag) for tag in range(3)]
    channel.drop()
    assert all(pending.work is None and pending.tensor is None for pending in pendings)


def test_abort_lets_a_short_wait_expire() -> None:
    """The only thing that stops late writes of gloo: see what it is for in ``_group.channel``."""
    group = Group(raising(RuntimeError("Timed out waiting 1ms for recv operation to complete")))
    channel = GroupChannel(group, 2, CPU)
    pending = channel.recv(torch.zeros(2), 4)
    channel.abort()
    assert channel.broken
    assert [(what, rank) for what, _, rank, _ in group.calls] == [("recv", 2), ("recv", 2)]
    assert group.calls[1][3] == (1 << 30) - 1
    assert group.works[1].waits == [timedelta(milliseconds=1)]
    assert group.works[0].waits == []
    assert pending.work is None


def test_abort_never_raises() -> None:
    class Gone(Group):
        def recv(self, tensors: list[torch.Tensor], rank: int, tag: int) -> Work:
            raise RuntimeError("no group any more")

    channel = GroupChannel(Gone(), 2, CPU)
    channel.abort()
    channel.abort()
    assert channel.broken


def test_the_lock_is_held_in_every_call() -> None:
    lock = threading.Lock()

    def outcome() -> None:
        assert lock.locked()

    channel = GroupChannel(Group(outcome, lock), 1, CPU, lock)
    channel.wait(channel.send(torch.zeros(1), 1), Deadline(LONG))
    channel.wait(channel.recv(torch.zeros(1), 1), Deadline(LONG))
    channel.abort()
    assert not lock.locked()


def test_all_channels_have_what_the_protocol_asks_for() -> None:
    wanted = {name for name in vars(Channel) if not name.startswith("_")} | set(Channel.__annotations__)
    assert wanted == {"send", "recv", "wait", "drop", "abort", "peer_rank", "nbytes_wire", "broken", "in_order"}
    for cls in (GroupChannel, MemoryChannel, FaultyChannel):
        for name in wanted - set(Channel.__annotations__):
            assert callable(getattr(cls, name))
