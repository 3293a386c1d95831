"""Memory goes into a TCP connection without a copy, and is left alone once the connection is closed."""

from __future__ import annotations

import mmap
import os
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch

from ft_transport._deadline import Deadline
from ft_transport._lanes.session import _PIECE_BYTES
from ft_transport._net import zero_copy as _zero_copy
from ft_transport._net.connection import Connection
from ft_transport._net.stall import StallTimer
from ft_transport._net.zero_copy import SPLICE_FROM, Splicer
from ft_transport._process import memory_at
from ft_transport.errors import PeerFailure, TransferTimeout

NBYTES = 5 << 20


def timer(seconds: float = 20) -> StallTimer:
    return StallTimer(Deadline(timedelta(seconds=seconds)))


@pytest.fixture
def pair() -> Iterator[tuple[Connection, Connection]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    ends = Connection(ours, "left"), Connection(theirs, "right")
    yield ends
    for end in ends:
        end.close()


def state(begin: int = 0) -> tuple[torch.Tensor, memoryview]:
    tensor = torch.randint(0, 256, (NBYTES + begin,), dtype=torch.uint8)
    return tensor, memory_at(tensor.data_ptr() + begin, NBYTES)


def read(connection: Connection, nbytes: int) -> bytes:
    return bytes(connection.read(nbytes, timer()))


@pytest.mark.parametrize("begin", [0, 1, 4095])
def test_bytes_arrive(pair: tuple[Connection, Connection], begin: int) -> None:
    """Also those that begin anywhere in a page, between others that are copied."""
    ours, theirs = pair
    keep, view = state(begin)

    def write() -> None:
        ours.write([b"before"], timer(), more=True)
        ours.write_zero_copy(view, timer())
        ours.write([b"behind"], timer())

    thread = threading.Thread(target=write)
    thread.start()
    got = read(theirs, NBYTES + 12)
    thread.join()
    assert got == b"before" + bytes(view) + b"behind"
    assert ours.nbytes_wire == theirs.nbytes_wire == NBYTES + 12
    del keep


def test_nothing_is_copied(pair: tuple[Connection, Connection]) -> None:
    """What has been written and not yet read changes with the memory."""
    ours, theirs = pair
    keep, view = state()
    part = view[:SPLICE_FROM]
    ours.write_zero_copy(part, timer())
    keep.fill_(7)
    assert read(theirs, len(part)) == bytes([7]) * len(part)


def test_closing_drops_what_has_not_arrived(pair: tuple[Connection, Connection]) -> None:
    """The system does not send on its own, from memory that may have changed."""
    ours, theirs = pair
    keep, view = state()
    with pytest.raises(TransferTimeout):
        ours.write_zero_copy(view, timer(0.6))  # nobody reads
    ours.close()
    keep.fill_(7)
    with pytest.raises(PeerFailure):
        read(theirs, NBYTES)
    # What had not arrived is gone.
    assert theirs.nbytes_wire < ours.nbytes_wire


def check_arrives(ours: Connection, theirs: Connection) -> None:
    """Memory that is written without a copy, or with one where that cannot be, arrives as it is."""
    keep, view = state()
    thread = threading.Thread(target=ours.write_zero_copy, args=(view, timer()))
    thread.start()
    assert read(theirs, NBYTES) == bytes(view)
    thread.join()
    del keep


def test_without_splice(pair: tuple[Connection, Connection], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Splicer:
        raise OSError("this system cannot splice")

    monkeypatch.setattr(_zero_copy, "Splicer", refuse)
    check_arrives(*pair)


def test_memory_that_cannot_be_referred_to_is_copied(
    pair: tuple[Connection, Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Splicer, view: memoryview) -> int:
        raise OSError("bad address")

    monkeypatch.setattr(Splicer, "fill", refuse)
    check_arrives(*pair)


def test_a_closed_peer_is_a_failure(pair: tuple[Connection, Connection]) -> None:
    ours, theirs = pair
    theirs.close()
    keep, view = state()
    with pytest.raises(PeerFailure):
        ours.write_zero_copy(view, timer())
    del keep


def test_no_descriptor_is_left() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    Splicer().close()
    assert descriptors() == before


@pytest.mark.parametrize("offset", [0, 64, 4095])
def test_a_piece_fits_into_the_pipe(offset: int) -> None:
    """Wherever its memory begins: else each would take a second, tiny step."""
    splicer = Splicer()
    memory = memoryview(mmap.mmap(-1, _PIECE_BYTES + 4096))
    assert splicer.fill(memory[offset : offset + _PIECE_BYTES]) == _PIECE_BYTES
    splicer.close()
