"""The in-memory channel behaves as a pair of a process group does, and the faulty one as it is told."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch
from helpers import noise

from ft_transport import PeerFailure, TransferTimeout
from ft_transport._deadline import Deadline
from ft_transport.testing import FaultyChannel, memory_channels

LONG = timedelta(seconds=30)


def ones(n: int = 4) -> torch.Tensor:
    return torch.ones(n, dtype=torch.uint8)


def zeros(n: int = 4) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.uint8)


def test_bytes_arrive_whichever_side_is_first() -> None:
    left, right = memory_channels()
    for first, second in ((left, right), (right, left)):
        got = zeros()
        sending = first.send(ones(), 1)
        second.wait(second.recv(got, 1), Deadline(LONG))
        first.wait(sending, Deadline(LONG))
        assert torch.equal(got, ones())
        got = zeros()
        receiving = first.recv(got, 1)
        second.wait(second.send(ones(), 1), Deadline(LONG))
        first.wait(receiving, Deadline(LONG))
        assert torch.equal(got, ones())
    assert left.num_posted == right.num_posted == 0
    assert left.nbytes_wire == right.nbytes_wire == 16
    assert (left.peer_rank, right.peer_rank) == (1, 0)


def test_messages_of_one_tag_arrive_in_order() -> None:
    left, right = memory_channels()
    for i in range(5):
        left.send(torch.full((2,), i, dtype=torch.uint8), 7)
    got = [zeros(2) for _ in range(5)]
    for tensor in got:
        right.wait(right.recv(tensor, 7), Deadline(LONG))
    assert [int(tensor[0]) for tensor in got] == [0, 1, 2, 3, 4]


def test_tags_do_not_mix() -> None:
    left, right = memory_channels()
    left.send(ones(), 1)
    left.send(zeros(2), 2)
    got = ones(2)
    right.wait(right.recv(got, 2), Deadline(LONG))
    assert torch.equal(got, zeros(2))


def test_a_send_takes_the_bytes_when_the_receive_is_there() -> None:
    """A rendezvous, as gloo's: what is changed before then is what arrives."""
    left, right = memory_channels()
    message = ones()
    left.send(message, 1)
    message.fill_(9)
    got = zeros()
    right.wait(right.recv(got, 1), Deadline(LONG))
    assert got.tolist() == [9] * 4


def test_a_receive_of_another_length_is_a_mistake_of_ours() -> None:
    left, right = memory_channels()
    left.send(ones(4), 1)
    with pytest.raises(AssertionError, match="4 bytes meets a receive of 5"):
        right.recv(zeros(5), 1)


def test_a_time_out_closes_the_pair() -> None:
    left, right = memory_channels()
    with pytest.raises(TransferTimeout, match="timed out"):
        left.wait(left.recv(zeros(), 1), Deadline(timedelta(0)))
    assert left.broken
    with pytest.raises(PeerFailure):
        right.send(ones(), 1)


def test_closing_wakes_who_waits() -> None:
    left, right = memory_channels()
    caught: list[Exception] = []
    pending = left.recv(zeros(), 1)

    def wait() -> None:
        try:
            left.wait(pending, Deadline(LONG))
        except PeerFailure as exc:
            caught.append(exc)

    thread = threading.Thread(target=wait)
    thread.start()
    right.abort()
    thread.join(10)
    assert "closed by the peer" in str(caught[0])


def test_what_has_arrived_before_the_close_has_arrived() -> None:
    left, right = memory_channels()
    pending = right.recv(zeros(), 1)
    left.send(ones(), 1)
    left.abort()
    right.wait(pending, Deadline(LONG))


def test_nothing_moves_after_abort() -> None:
    left, right = memory_channels()
    target = zeros()
    right.recv(target, 1)
    left.abort()
    with pytest.raises(PeerFailure):
        left.send(ones(), 1)
    assert torch.equal(target, zeros())
    right.drop()
    assert left.num_posted == right.num_posted == 0


def test_an_operation_is_waited_for_once() -> None:
    left, right = memory_channels()
    pending = left.send(ones(), 1)
    right.recv(zeros(), 1)
    left.wait(pending, Deadline(LONG))
    assert pending.tensor is None
    with pytest.raises(ValueError, match="not in list"):
        left.wait(pending, Deadline(LONG))


@pytest.mark.parametrize("operation", range(4))
def test_die_at(operation: int) -> None:
    left, right = memory_channels()
    faulty = FaultyChannel(left).die_at(operation)
    post = [faulty.recv, faulty.send] * 2
    for i in range(operation):
        post[i](ones(), i)
    with pytest.raises(PeerFailure):
        post[operation](ones(), operation)
    assert faulty.num_operations == operation + 1
    with pytest.raises(PeerFailure):
        right.send(ones(), 1)


def test_corrupt_at_flips_one_bit_of_one_send_and_not_in_the_source() -> None:
    left, right = memory_channels()
    faulty = FaultyChannel(left).corrupt_at(1)
    message = noise(5, 1, torch.uint8)
    before = message.tolist()
    got = [zeros(5), zeros(5)]
    for tensor in got:
        faulty.send(message, 1)
        right.recv(tensor, 1)
    assert message.tolist() == before == got[0].tolist()
    assert got[1].tolist() == [before[0] ^ 1, *before[1:]]


def test_a_faulty_channel_without_a_fault_passes_everything_on() -> None:
    left, right = memory_channels()
    faulty = FaultyChannel(left)
    got = zeros()
    pending = faulty.send(ones(), 1)
    right.recv(got, 1)
    faulty.wait(pending, Deadline(LONG))
    assert torch.equal(got, ones())
    assert (faulty.peer_rank, faulty.nbytes_wire, faulty.broken) == (1, 4, False)
    faulty.recv(zeros(), 2)
    faulty.drop()
    assert left.num_posted == 0
    faulty.abort()
    assert faulty.broken
