"""Much is read from a TCP connection with few wake-ups, and never more, less or later than was sent."""

from __future__ import annotations

import contextlib
import resource
import select
import signal
import socket
import struct
import threading
import tracemalloc
from collections.abc import Iterator
from datetime import timedelta

import pytest
from helpers import pace

from ft_transport._deadline import Deadline
from ft_transport._net import connection as _connection
from ft_transport._net.connection import Connection
from ft_transport._net.stall import PeerStalled, StallTimer
from ft_transport.errors import PeerFailure, TransferTimeout

MUCH = _connection._MUCH_BYTES


def connected(address: str) -> tuple[socket.socket, socket.socket]:
    """Both ends; the first one has the address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname(), source_address=(address, 0))
        return ours, server.accept()[0]


NEAR, FAR = "127.0.0.1", "127.0.0.2"


@pytest.fixture(params=[FAR, NEAR], ids=["far", "near"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, Connection]]:
    """A peer, and the connection to it; on one machine only if both have the same address."""
    ours, theirs = connected(request.param)
    connection = Connection(ours, "peer")
    with theirs:
        yield theirs, connection
    connection.close()


def noise(nbytes: int) -> bytes:
    return bytes(range(251)) * (nbytes // 251) + bytes(nbytes % 251)


def timer(silence: float | None = None, seconds: float = 20) -> StallTimer:
    return StallTimer(Deadline(timedelta(seconds=seconds)), timedelta(seconds=silence) if silence else None)


@pytest.mark.parametrize("nbytes", [2 * MUCH - 1, 2 * MUCH, 2 * MUCH + 1, 5 * MUCH + 77])
@pytest.mark.parametrize("step", [1 << 30, 100_003], ids=["at once", "in pieces"])
def test_as_much_as_was_asked_for(pair: tuple[socket.socket, Connection], nbytes: int, step: int) -> None:
    """Nothing is coming behind the end, so whoever waited for much would wait in vain."""
    peer, connection = pair
    data = noise(nbytes) + b"behind"

    def write() -> None:
        for begin in range(0, len(data), step):
            peer.sendall(data[begin : begin + step])
            pace(0.001)

    thread = threading.Thread(target=write)
    thread.start()
    assert connection.read(nbytes, timer(silence=2)) == data[:nbytes]
    assert connection.read(6, timer(silence=2)) == b"behind"
    thread.join()
    assert connection.nbytes_wire == len(data)


def test_a_trickle_is_no_silence(pair: tuple[socket.socket, Connection]) -> None:
    peer, connection = pair
    over = threading.Event()

    def trickle() -> None:
        while not over.wait(0.1):
            peer.sendall(bytes(1000))

    thread = threading.Thread(target=trickle)
    thread.start()
    with pytest.raises(TransferTimeout):
        connection.read(4 * MUCH, timer(silence=0.6, seconds=2))
    over.set()
    thread.join()
    assert connection.nbytes_wire > 10_000


@pytest.mark.parametrize("in_steps", [False, True], ids=["at once", "in steps"])
@pytest.mark.parametrize(
    ("nbytes", "seconds"), [(1000, 0.05), (200_000, 0.02)], ids=["a trickle", "as fast as it is read"]
)
def test_what_goes_on_coming_has_a_deadline(
    pair: tuple[socket.socket, Connection], nbytes: int, seconds: float, in_steps: bool
) -> None:
    """However much of it: a slow one is not asked for much, and of a fast one there is always something to read."""
    peer, connection = pair
    times = int(2.5 / seconds)

    def write() -> None:
        with contextlib.suppress(OSError):
            for _ in range(times):
                peer.sendall(bytes(nbytes))
                pace(seconds)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        read = connection.read if in_steps else lambda n, p: connection.read_into(memoryview(bytearray(n)), p)
        with pytest.raises(TransferTimeout):
            read(times * nbytes, timer(seconds=0.5))
    finally:
        connection.abort()
        thread.join()
    assert 0 < connection.nbytes_wire < times * nbytes


def test_silence(pair: tuple[socket.socket, Connection]) -> None:
    peer, connection = pair
    peer.sendall(bytes(MUCH + 1))
    with pytest.raises(PeerStalled):
        connection.read(4 * MUCH, timer(silence=0.5))
    assert connection.nbytes_wire == MUCH + 1


def test_a_silence_begins_when_something_moved_last() -> None:
    """Not when it is asked about, which is a tick later: ticks would add up to more than anybody was promised."""
    silent = timer(silence=0.05)
    silent.check()
    silent.progressed()
    assert silent._silent is not None
    silent._silent.expire()
    with pytest.raises(PeerStalled):
        silent.check()
    silent.progressed()
    silent.check()


def test_a_peer_that_does_not_read_takes_no_more(pair: tuple[socket.socket, Connection]) -> None:
    _, connection = pair
    assert connection.takes_more
    with pytest.raises(PeerStalled):
        connection.write([bytes(64 << 20)], timer(silence=0.5))
    assert not connection.takes_more


@pytest.mark.parametrize("steady", [False, True], ids=["copied", "steady"])
@pytest.mark.parametrize("ended", ["deadline", "cancelled"])
def test_a_peer_that_reads_slowly_has_a_deadline(
    pair: tuple[socket.socket, Connection], steady: bool, ended: str
) -> None:
    peer, connection = pair
    over, memory = threading.Event(), memoryview(bytearray(256 << 20))
    peer.settimeout(5)

    def trickle() -> None:
        while not over.wait(0.01):
            peer.recv(1 << 20)

    limit = timer(silence=1, seconds=0.8 if ended == "deadline" else 20)
    if ended == "cancelled":
        threading.Timer(0.8, limit.cancel, ["enough"]).start()
    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        write = connection.write_zero_copy if steady else lambda view, limit: connection.write([view], limit)
        with pytest.raises(TransferTimeout if ended == "deadline" else PeerFailure):
            write(memory, limit)
    finally:
        over.set()
        thread.join()
    assert 0 < connection.nbytes_wire < len(memory)


def test_whether_it_takes_more_is_known_without_a_free_descriptor(pair: tuple[socket.socket, Connection]) -> None:
    _, connection = pair
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
    try:
        assert connection.takes_more
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_peer_closes(pair: tuple[socket.socket, Connection]) -> None:
    peer, connection = pair
    peer.sendall(bytes(MUCH + 1))
    peer.close()
    with pytest.raises(PeerFailure, match="closed by the peer"):
        connection.read(4 * MUCH, timer())


def test_somebody_aborts(pair: tuple[socket.socket, Connection]) -> None:
    _, connection = pair
    threading.Timer(0.1, connection.abort).start()
    with pytest.raises(PeerFailure):
        connection.read(4 * MUCH, timer())


def test_a_peer_that_is_gone_already() -> None:
    ours, theirs = connected(NEAR)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
    theirs.close()
    select.select([ours], [], [], 10)  # the reset is here
    connection = Connection(ours, "peer")
    with pytest.raises(PeerFailure):
        connection.read(1, timer())
    connection.close()


def test_a_system_that_cannot(pair: tuple[socket.socket, Connection], monkeypatch: pytest.MonkeyPatch) -> None:
    peer, connection = pair
    monkeypatch.setattr("ft_transport._net.connection._wake_up_at", lambda sock, nbytes: False)
    data = noise(4 * MUCH)
    thread = threading.Thread(target=peer.sendall, args=(data,))
    thread.start()
    assert connection.read(len(data), timer()) == data
    thread.join()


# ------------------------------------------------------------------------------------ signals, claims


@pytest.mark.parametrize("way", ["read", "read much", "write", "write steady"])
def test_a_handler_that_runs_again_and_again_does_not_prolong_a_wait(
    pair: tuple[socket.socket, Connection], way: str
) -> None:
    """In the main thread each one begins the kernel's time-out anew."""
    _, connection = pair
    over, main, memory = threading.Event(), threading.main_thread().ident, memoryview(bytearray(32 << 20))
    assert main == threading.get_ident()

    def send() -> None:
        while not over.wait(0.05):
            signal.pthread_kill(main, signal.SIGUSR1)

    earlier = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    sending = threading.Thread(target=send)
    ending = threading.Timer(6, over.set)  # else it would never end
    sending.start()
    ending.start()
    limit = timer(seconds=0.4)
    waits = {
        "read": lambda: connection.read(10, limit),
        "read much": lambda: connection.read(4 * MUCH, limit),
        "write": lambda: connection.write([memory], limit),
        "write steady": lambda: connection.write_zero_copy(memory, limit),
    }
    try:
        with pytest.raises(TransferTimeout):
            waits[way]()
        assert not over.is_set()
    finally:
        ending.cancel()
        over.set()
        ending.join()
        sending.join()
        signal.signal(signal.SIGUSR1, earlier)


def test_what_is_only_claimed_takes_no_memory(pair: tuple[socket.socket, Connection]) -> None:
    peer, connection = pair
    peer.sendall(bytes(100))
    peer.shutdown(socket.SHUT_WR)
    tracemalloc.start()
    try:
        with pytest.raises(PeerFailure):
            connection.read(256 << 20, timer())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
