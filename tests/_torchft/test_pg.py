"""Which ranks a PGTransport takes, and which of its destinations' errors are its own."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import CPU
from torchft.process_group import ProcessGroupDummy, ProcessGroupGloo

from ft_transport import (
    LocalProtocolError,
    PeerFailure,
    PGTransport,
    RemoteProtocolError,
    TransferError,
    TransferTimeout,
)
from ft_transport._torchft.pg import _own_rank, _raise_own

SECOND = timedelta(seconds=1)


class Group:
    """One of three ranks; whoever posts anything has looked at the ranks too late: torchft's group would crash."""

    _rank = 1

    def __init__(self) -> None:
        self.tags: list[int] = []

    def recv(self, tensors: list[torch.Tensor], rank: int, tag: int) -> None:
        self.tags.append(tag)
        raise RuntimeError("not connected")

    def size(self) -> int:
        return 3


def transport() -> Any:
    group: Any = Group()
    return PGTransport(group, SECOND, CPU)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([0, 3], "rank 3: expected 0 to 2"),
        ([-1], "rank -1: expected 0 to 2"),
        ([0, 1], "rank 1: expected another rank than this side's own"),
        ([2, 0, 2], "expected each once"),
    ],
)
def test_ranks_that_cannot_be(ranks: list[int], message: str) -> None:
    with pytest.raises(LocalProtocolError, match=message):
        transport().send_checkpoint(ranks, 7, {}, SECOND)
    if len(ranks) == 1:
        with pytest.raises(LocalProtocolError, match=message):
            transport().recv_checkpoint(ranks[0], "", 7, SECOND)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("<n/a>", "expected the metadata of ft_transport's PGTransport, got '<n/a>': all replicas need the same trans"),
        ("ft-lanes://10.0.0.1:80/5/00", "got 'ft-lanes': all replicas need the same transport"),
        ("http://me:secret@host:80/checkpoint/", "got 'http': all replicas need the same transport"),
        (
            "ft-group/1",
            "expected version 2 of a state over a group, got 'ft-group/1': all replicas need the same release",
        ),
    ],
)
def test_the_metadata_of_a_source_that_would_be_waited_for_in_vain(metadata: str, message: str) -> None:
    made = transport()
    assert made.metadata() == "ft-group/2"
    with pytest.raises(RemoteProtocolError, match=message):
        made.recv_checkpoint(2, metadata, 7, SECOND)
    (peer,) = made.last_report.peers
    assert (peer.outcome, peer.phase) == ("refused", "agree")
    assert made._pg.tags == [(1 << 30) - 1], "the group is broken: in this step nobody waits for this replica"
    with pytest.raises(RemoteProtocolError, match="cannot be healed from the others"):
        made.disallow_checkpoint()


def test_a_native_group_says_its_own_rank() -> None:
    """torchft's nightly takes those of torch, which have no ``_rank``."""
    assert _own_rank(torch.distributed.ProcessGroup(1, 3)) == 1
    assert _own_rank(ProcessGroupDummy(0, 1)) == 0
    assert _own_rank(ProcessGroupGloo()) is None, "not configured yet"


def test_nobody_to_send_to() -> None:
    made = transport()
    made.send_checkpoint([], 7, {"a": 1}, SECOND)
    assert made.last_report.complete
    assert made.last_report.peers == []


TIMEOUT, GONE, REFUSED, OWN = TransferTimeout("t"), PeerFailure("g"), RemoteProtocolError("r"), LocalProtocolError("o")


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([(None, False), (None, False)], None),
        ([(GONE, False), (None, False)], None),
        ([(GONE, False), (REFUSED, False)], None),
        ([(GONE, False), (OWN, False)], OWN),
        ([(GONE, True), (OWN, False)], OWN),
        ([(GONE, True), (None, False)], GONE),
        ([(GONE, True), (TIMEOUT, True)], TIMEOUT),
        ([(REFUSED, True), (GONE, True)], REFUSED),
    ],
)
def test_only_what_is_this_sides_own_trouble_is_raised(
    ends: list[tuple[TransferError | None, bool]], expected: TransferError | None
) -> None:
    """A destination that dies costs the others nothing, unless the group is unusable after it."""
    channels: list[Any] = [SimpleNamespace(broken=broken) for _, broken in ends]
    errors = [error for error, _ in ends]
    if expected is None:
        _raise_own(channels, errors)  # type: ignore[arg-type]
        return
    with pytest.raises(type(expected)) as caught:
        _raise_own(channels, errors)  # type: ignore[arg-type]
    assert caught.value is expected
