"""Channels whose operations run in the order in which they were posted, without tags, as NCCL's.

A receive that is not at its place meets another message there, and both sides stand still. Here in memory, and over
Gloo under a group that keeps order and drops tags, by which torchft's group over torchcomms is played.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import CPU, PLAIN, Wrapped, succeed, tensors_of, transfer
from torchft.process_group import (
    ErrorSwallowingProcessGroupWrapper,
    FakeProcessGroupWrapper,
    ProcessGroup,
    ProcessGroupGloo,
)

from ft_transport import PGTransport
from ft_transport._group import source
from ft_transport._group.channel import Pending
from ft_transport._options import NUM_BUCKETS, Options
from ft_transport._torchft.pg import _is_in_order
from ft_transport.errors import LocalProtocolError, PeerFailure
from ft_transport.testing import memory_channels

IN_ORDER = replace(PLAIN, in_order=True)
TIMEOUT = timedelta(seconds=30)
# A flight has 64 MiB: one, two and five of them.
SIZES = [63, 65, 300]


def state(mib: int, value: float = 1.0) -> dict[str, Any]:
    """As it lies, in buckets, and with gaps."""
    return {
        "large": torch.full((mib << 18,), value),
        "small": [torch.full((100,), value + i) for i in range(40)],
        "strided": (torch.arange(1 << 20) * value).view(1024, 1024).t(),
    }


def same(got: object, expected: object) -> bool:
    """Whether two states hold the same; ``helpers.bitwise_equal`` looks at each byte in Python."""
    pairs = zip(tensors_of(got), tensors_of(expected), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "fresh"])
@pytest.mark.parametrize("mib", SIZES)
def test_a_state_of_any_size_arrives(mib: int, in_place: bool) -> None:
    template = state(mib, 5.0)
    give = (lambda: template) if in_place else None
    ends = succeed(state(mib), give, options=IN_ORDER, channels=memory_channels(in_order=True))
    assert same(ends.destination.result, state(mib))
    assert ends.destination.report.num_messages > NUM_BUCKETS


def test_a_state_of_which_each_flight_is_staged_arrives() -> None:
    """Then a flight waits for a bucket, on one side or on both, and must not do so out of turn."""
    many = {"strided": [torch.arange(5 << 20).view(5, -1).t() for _ in range(8)]}
    template = {"strided": [torch.zeros(5 << 20, dtype=torch.int64).view(-1, 5) for _ in range(8)]}
    for give in (None, lambda: template):
        ends = succeed(many, give, options=IN_ORDER, channels=memory_channels(in_order=True))
        assert same(ends.destination.result, many)


class Failing(Wrapped):
    """A source's channel on which a send of the state fails."""

    left = 3

    def send(self, tensor: torch.Tensor, tag: int) -> Pending:
        if tensor.numel() > 1 << 20:
            self.left -= 1
            if not self.left:
                raise LocalProtocolError("on purpose")
        return super().send(tensor, tag)


def test_a_source_that_fails_in_mid_state_says_nothing_where_a_message_is_expected() -> None:
    """In memory a word that meets the receive of a message is an assertion; over NCCL it would land in the state."""
    left, right = memory_channels(in_order=True)
    ends = transfer(state(130), options=IN_ORDER, channels=(Failing(left), right), timeout=timedelta(seconds=10))
    assert isinstance(ends.source.error, LocalProtocolError)
    assert isinstance(ends.destination.error, PeerFailure)
    assert "meets a receive" not in str(ends.destination.error)


def test_a_source_that_fails_once_the_destination_has_agreed_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its messages are expected by then, whichever phase the source is in."""
    monkeypatch.setattr(source, "digest_bytes", lambda data: 5)
    ends = transfer(state(1), options=IN_ORDER, channels=memory_channels(in_order=True), timeout=timedelta(seconds=10))
    assert "came damaged" in str(ends.source.error)
    assert isinstance(ends.destination.error, PeerFailure)
    assert "meets a receive" not in str(ends.destination.error)


@pytest.mark.parametrize("seconds", [1.0])
def test_what_is_out_of_order_ends_at_the_deadline(seconds: float) -> None:
    """That the channel of these tests does keep order: a source that posts as over Gloo does not get through."""

    class Eager(Wrapped):
        in_order = False  # type: ignore[assignment]

    left, right = memory_channels(in_order=True)
    ends = transfer(state(1), options=IN_ORDER, channels=(Eager(left), right), timeout=timedelta(seconds=seconds))
    assert ends.source.error is not None
    assert ends.destination.error is not None


# --------------------------------------------------------------------------------------- over Gloo


class _Work:
    def __init__(self) -> None:
        self.over = threading.Event()
        self.error: BaseException | None = None

    def wait(self, timeout: timedelta) -> bool:
        if not self.over.wait(timeout.total_seconds()):
            raise TimeoutError("Timed out waiting")
        if self.error is not None:
            raise self.error
        return True


class ProcessGroupTorchComms(ProcessGroup):
    """Runs the operations of each pair one after the other, and knows no tags, over Gloo."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._gloo, self._rank, self._size = dist.ProcessGroupGloo(store, rank, size, TIMEOUT), rank, size
        self._queues: dict[int, queue.SimpleQueue[Any]] = {}
        self._threads: list[threading.Thread] = []

    def size(self) -> int:
        return self._size

    def send(self, tensors: list[torch.Tensor], dst_rank: int, tag: int) -> Any:
        return self._post(dst_rank, lambda: self._gloo.send(tensors, dst_rank, 0))

    def recv(self, tensors: list[torch.Tensor], src_rank: int, tag: int) -> Any:
        return self._post(src_rank, lambda: self._gloo.recv(tensors, src_rank, 0))

    def _post(self, peer: int, post: Any) -> _Work:
        if peer not in self._queues:
            self._queues[peer] = queue.SimpleQueue()
            self._threads.append(threading.Thread(target=self._run, args=(self._queues[peer],)))
            self._threads[-1].start()
        work = _Work()
        self._queues[peer].put((post, work))
        return work

    def _run(self, posted: queue.SimpleQueue[Any]) -> None:
        while (found := posted.get()) is not None:
            post, work = found
            try:
                post().wait(TIMEOUT)
            except BaseException as exc:
                work.error = exc
            work.over.set()

    def close(self) -> None:
        for posted in self._queues.values():
            posted.put(None)
        for thread in self._threads:
            thread.join(10)


@pytest.fixture
def groups(request: pytest.FixtureRequest) -> Iterator[list[ProcessGroupTorchComms]]:
    """A source, and as many destinations as the test asks for."""
    size, store = 1 + request.param, dist.HashStore()
    made: list[Any] = [None] * size

    def join(rank: int) -> None:
        made[rank] = ProcessGroupTorchComms(store, rank, size)

    _all(join, size)
    with ExitStack() as stack:
        for group in made:
            stack.enter_context(closing(group))
        yield made


def _all(run: Any, number: int, first: int = 0) -> None:
    threads = [threading.Thread(target=run, args=(index,)) for index in range(first, number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)


@pytest.mark.parametrize("mib", SIZES)
@pytest.mark.parametrize("groups", [1, 2], indirect=True, ids=["one destination", "two"])
def test_over_a_group_without_tags(groups: list[ProcessGroupTorchComms], mib: int) -> None:
    transports: list[PGTransport[Any]] = [PGTransport(group, TIMEOUT, CPU) for group in groups]
    found: dict[int, Any] = {}

    def run(rank: int) -> None:
        if rank:
            found[rank] = transports[rank].recv_checkpoint(0, "", 7, TIMEOUT)
        else:
            transports[0].send_checkpoint([*range(1, len(groups))], 7, state(mib), TIMEOUT)

    _all(run, len(groups))
    assert set(found) == {*range(1, len(groups))}
    assert all(same(each, state(mib)) for each in found.values())
    report = transports[0].last_report
    assert report is not None
    assert report.complete


def test_which_groups_run_in_order() -> None:
    group = dist.ProcessGroupGloo(dist.HashStore(), 0, 1, TIMEOUT)
    assert not _is_in_order(group, CPU)
    assert _is_in_order(group, torch.device("cuda", 0))
    inner = ProcessGroupTorchComms(dist.HashStore(), 0, 1)
    assert _is_in_order(inner, CPU)
    assert _is_in_order(ErrorSwallowingProcessGroupWrapper(FakeProcessGroupWrapper(inner)), CPU)
    assert not _is_in_order(ErrorSwallowingProcessGroupWrapper(ProcessGroupGloo()), CPU)
    assert Options(CPU).limits(1).window > NUM_BUCKETS == IN_ORDER.limits(1).window
