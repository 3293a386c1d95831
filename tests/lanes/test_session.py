"""Frames and messages over a connection: in order, of the length that was said, with the digest of what was read."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
from helpers import noise

from ft_transport._deadline import Deadline
from ft_transport._lanes.fabric import CMA, Wait, new_reader, new_shown
from ft_transport._lanes.protocol import HEADER_BYTES, TRAILER, LaneFrame, LaneProtocol, Role, encode
from ft_transport._lanes.session import _PIECE_BYTES, _READ_BYTES, DIRECT_FROM, Session, Target, Unreadable, fingerprint
from ft_transport._net.cma import PeerMemory
from ft_transport._net.connection import Connection
from ft_transport._net.one_sided import Job
from ft_transport._net.stall import PeerStalled, StallTimer
from ft_transport._plan.blocks import Block, Held, held
from ft_transport._wire.digest import digest_bytes
from ft_transport.errors import LocalProtocolError, PeerFailure, RemoteProtocolError, TransferTimeout


def timer() -> StallTimer:
    return StallTimer(Deadline(timedelta(seconds=10)))


def at_once(job: Job[Any]) -> None:
    raise AssertionError("a process reads another one's memory at once")


class Lane:
    """A lane between two ends in this process: the destination, and who supplies it."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            near = socket.create_connection(server.getsockname())
            far, _ = server.accept()
        self.destination, self.supplier = (
            Session(Connection(sock, "peer"), LaneProtocol(role, 1, 7))
            for sock, role in ((near, Role.DESTINATION), (far, Role.SOURCE))
        )
        self.destination.send(LaneFrame.ATTACH, timer(), body=[b"i" * 16])
        self.supplier.recv(timer())

    def ask(self, number: int, num: int = 1) -> None:
        self.destination.send(LaneFrame.WANT, timer(), number, [num])
        header, body = self.supplier.recv(timer())
        assert (header.frame, header.number, body) == (LaneFrame.WANT, number, (num,))


@pytest.fixture
def lane() -> Iterator[Lane]:
    made = Lane()
    yield made
    for session in (made.destination, made.supplier):
        session.connection.close()


def moved(lane: Lane, data: bytes, *, digest: int | None = None, verify: bool = True) -> tuple[int, Any, bytes]:
    """A message there: what was sent as its digest, what came of it, and where it landed."""
    lane.ask(3)
    sent: list[int] = []
    thread = threading.Thread(
        target=lambda: sent.append(lane.supplier.send_message(3, memoryview(data), digest, timer()))
    )
    thread.start()
    landed = bytearray(len(data))
    header = lane.destination.recv_header(timer())
    found = lane.destination.recv_message(header, Target(memoryview(landed)), verify=verify, timer=timer())
    thread.join(10)
    return sent[0], found, bytes(landed)


@pytest.mark.parametrize("nbytes", [1, _PIECE_BYTES - 1, _PIECE_BYTES, _PIECE_BYTES + 1, 3 * _PIECE_BYTES + 77])
def test_the_digest_in_pieces_is_that_of_the_whole(lane: Lane, nbytes: int) -> None:
    """It is taken on the way, on both sides, while each piece is in the cache."""
    data = bytes(range(256)) * (nbytes // 256) + bytes(nbytes % 256)
    assert moved(lane, data) == (digest_bytes(data), digest_bytes(data), data)
    assert fingerprint(memoryview(data)) == digest_bytes(data)
    assert lane.destination.connection.nbytes_wire == lane.supplier.connection.nbytes_wire


@pytest.mark.parametrize("verify", [True, False])
def test_bytes_that_are_not_what_was_fingerprinted_are_damaged(lane: Lane, verify: bool) -> None:
    """A supplier that has a message from another passes on the digest that came with it, right or wrong."""
    sent, found, landed = moved(lane, b"data", digest=5, verify=verify)
    assert sent == 5
    assert found == (None if verify else 5)
    assert landed == b"data"


def test_a_message_of_another_length_is_refused_before_it_is_read(lane: Lane) -> None:
    lane.ask(3)
    lane.supplier.send_message(3, memoryview(b"12345"), None, timer())
    header = lane.destination.recv_header(timer())
    with pytest.raises(RemoteProtocolError, match="message 3: expected 4 bytes, got 5"):
        lane.destination.recv_message(header, Target(memoryview(bytearray(4))), verify=True, timer=timer())
    rest = lane.destination.connection.read(5 + TRAILER.size, timer())
    assert bytes(rest[:5]) == b"12345"


def test_a_message_where_none_may_be(lane: Lane) -> None:
    lane.ask(3)
    lane.supplier.send_message(3, memoryview(b"x"), None, timer())
    with pytest.raises(RemoteProtocolError, match="message 3 is out of order"):
        lane.destination.recv(timer())


def test_the_conversation_is_held_to_its_table(lane: Lane) -> None:
    """On the side that says it before a byte leaves, and on the other before the body is read."""
    before = lane.supplier.connection.nbytes_wire
    with pytest.raises(LocalProtocolError):
        lane.supplier.send(LaneFrame.SAME, timer(), 5)
    assert lane.supplier.connection.nbytes_wire == before
    lane.ask(3)
    forged = LaneProtocol(Role.SOURCE, 1, 7)
    forged.received = lambda header: None  # type: ignore[method-assign]
    forged.sent = lambda frame, number=0, num=1: None  # type: ignore[method-assign]
    Session(lane.supplier.connection, forged).send(LaneFrame.SAME, timer(), 5)
    with pytest.raises(RemoteProtocolError):
        lane.destination.recv(timer())


def test_memory_that_was_taken_away_is_named_in_place_of_a_broken_connection(lane: Lane) -> None:
    tensor = noise(300_000, 1)
    (block,) = held([Block(tensor)])
    part = Held(block, 0, tensor.numel() * 4)
    view = part.view
    tensor.untyped_storage().resize_(0)
    lane.ask(3)
    with pytest.raises(LocalProtocolError, match="exchanged or given back"):
        lane.supplier.send_message(3, view, None, timer(), held=part)


def test_an_end_in_mid_message_is_a_failure_of_the_peer(lane: Lane) -> None:
    lane.ask(3)
    data = torch.zeros(100, dtype=torch.uint8)
    lane.supplier.send_message(3, memoryview(data.numpy()), None, timer())
    header = lane.destination.recv_header(timer())
    assert lane.destination.connection.nbytes_wire >= HEADER_BYTES
    lane.destination.connection.read(50, timer())
    lane.supplier.connection.close()
    with pytest.raises(PeerFailure):
        lane.destination.recv_message(header, Target(memoryview(bytearray(100))), verify=True, timer=timer())


# ------------------------------------------------------------------------------- told by their place


@pytest.fixture
def direct(lane: Lane) -> Lane:
    """A lane whose destination has found that it can read the supplier's memory: here, this very process's."""
    lane.destination.reader, lane.supplier.shown = reader, shown = new_reader(CMA, 0), new_shown(CMA)
    reader.reach(shown.answer(reader.hello(at_once), at_once), at_once)
    lane.destination.send(LaneFrame.DIRECT, timer())
    lane.supplier.recv(timer())
    lane.ask(3)
    return lane


def tells(lane: Lane, *messages: bytes | bytearray, digest: int | None = None) -> list[int]:
    """The supplier says where these are; gives their digests."""
    views = [memoryview(data) for data in messages]
    places = [lane.supplier.place(view, timer(), None) for view in views]
    assert None not in places
    return lane.supplier.send_places(3, places, [(view, digest, None) for view in views], timer())  # type: ignore[arg-type]


def arrive(lane: Lane, *nbytes: int, verify: bool = True, until: StallTimer | None = None) -> list[tuple[Any, bytes]]:
    """The destination reads messages of so many bytes; gives for each what was found of its digest, and its bytes."""
    landed = [bytearray(each) for each in nbytes]
    header = lane.destination.recv_header(timer())
    assert (header.frame, header.number) == (LaneFrame.PLACE, 3)
    places = lane.destination.recv_body(header, timer())
    targets = [Target(memoryview(data)) for data in landed]
    found = lane.destination.read_messages(places, targets, verify=verify, timer=until or timer())
    return list(zip(found, map(bytes, landed), strict=True))


@pytest.mark.parametrize("digest", [None, "known"])
@pytest.mark.parametrize("nbytes", [DIRECT_FROM, _READ_BYTES + 1, 3 * _READ_BYTES + 77])
def test_a_message_is_read_where_it_lies(direct: Lane, nbytes: int, digest: str | None) -> None:
    data = bytearray(noise(nbytes // 4 + 1, 1).view(torch.uint8)[:nbytes].tolist())
    known = digest_bytes(data) if digest else None
    assert tells(direct, data, digest=known) == [digest_bytes(data)]
    assert arrive(direct, nbytes) == [(digest_bytes(data), data)]
    assert direct.destination.nbytes_direct == nbytes
    assert direct.destination.connection.nbytes_wire == direct.supplier.connection.nbytes_wire > nbytes


def test_messages_that_are_asked_for_at_once_are_told_at_once(direct: Lane) -> None:
    direct.ask(4, 2)
    sizes = (DIRECT_FROM, _READ_BYTES + 1, DIRECT_FROM + 3)
    messages = [
        bytearray(noise(nbytes, number).view(torch.uint8)[:nbytes].tolist()) for number, nbytes in enumerate(sizes)
    ]
    digests = tells(direct, *messages)
    messages[1][-1] ^= 1
    assert arrive(direct, *sizes) == [(digests[0], messages[0]), (None, messages[1]), (digests[2], messages[2])]
    assert not direct.destination.protocol.asked
    assert direct.destination.nbytes_direct == sum(sizes)


def test_memory_is_provided_right_before_it_is_written_to(direct: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    read_into = PeerMemory.read_into
    monkeypatch.setattr(
        PeerMemory, "read_into", lambda self, *where: (log.append("read"), read_into(self, *where), None)[2]
    )
    direct.ask(4, 2)
    tells(direct, *(bytearray(DIRECT_FROM) for _ in range(2)))
    header = direct.destination.recv_header(timer())
    places = direct.destination.recv_body(header, timer())
    targets = [
        Target(memoryview(bytearray(DIRECT_FROM)), None, lambda number=number: log.append(f"provide {number}"))
        for number in range(2)
    ]
    direct.destination.read_messages(places, targets, verify=True, timer=timer())
    assert log == ["provide 0", "read", "provide 1", "read"]
    direct.supplier.send_message(5, memoryview(bytearray(1)), None, timer())
    landed = bytearray(b"x")
    provided: list[bytes] = []
    target = Target(memoryview(landed), None, lambda: provided.append(bytes(landed)))
    direct.destination.recv_message(direct.destination.recv_header(timer()), target, verify=True, timer=timer())
    assert provided == [b"x"]


def test_what_is_small_is_sent(direct: Lane) -> None:
    assert direct.supplier.place(memoryview(bytearray(DIRECT_FROM)), timer(), None) is not None
    assert direct.supplier.place(memoryview(bytearray(DIRECT_FROM - 1)), timer(), None) is None


@pytest.mark.parametrize("verify", [True, False])
def test_memory_that_changes_before_it_is_read_is_damage(direct: Lane, verify: bool) -> None:
    """As damage on the way: it is asked for again. Without digests it is for the source to have the last word."""
    data = bytearray(DIRECT_FROM)
    (digest,) = tells(direct, data)
    data[-1] = 1
    ((found, _),) = arrive(direct, DIRECT_FROM, verify=verify)
    assert found == (None if verify else digest)


def test_memory_that_is_not_there_any_more_is_no_protocol_of_its_own(direct: Lane) -> None:
    """A failure of the peer's, after which it is asked elsewhere, or over the connection."""
    protocol = direct.supplier.protocol
    protocol.sent(LaneFrame.PLACE, 3)
    direct.supplier.connection.write([encode(LaneFrame.PLACE, 1, 7, 3, [struct.pack("<Q", 4096)])], timer())
    with pytest.raises(Unreadable, match="the supplier's memory cannot be read") as info:
        arrive(direct, DIRECT_FROM)
    assert isinstance(info.value, PeerFailure)


class Unwilling:
    """What is shown by a backend that takes no more memory, and its time to end."""

    waits = True
    closed = awaited = False

    def answer(self, hello: bytes, wait: Wait) -> bytes:
        return b""

    def place(self, view: memoryview, held: Held | None, wait: Wait) -> bytes:
        raise OSError("no more memory can be locked")

    def close(self) -> None:
        self.closed = True

    def await_closed(self) -> None:
        assert self.closed
        self.awaited = True


def test_what_cannot_be_shown_any_more_is_sent_and_its_end_not_waited_for_in_silence(direct: Lane) -> None:
    """The other side would take this one for dead meanwhile. Before the lane is over, it is waited for."""
    assert direct.supplier.tells_places
    direct.supplier.shown = unwilling = Unwilling()
    assert not direct.supplier.tells_places, "one by one, as it waits"
    assert direct.supplier.place(memoryview(bytearray(DIRECT_FROM)), timer(), None) is None
    assert unwilling.closed
    asking = threading.Thread(target=direct.supplier.await_question, args=(timer(),))
    asking.start()
    assert direct.destination.recv_header(timer()).frame is LaneFrame.WAIT, "as was agreed when it was shown"
    direct.destination.send(LaneFrame.WANT, timer(), 4, [1])
    asking.join(10)
    assert not unwilling.awaited
    direct.supplier.end()
    assert unwilling.awaited


def test_a_read_that_goes_on_is_no_sign_of_life(direct: Lane) -> None:
    """A network card goes on with the memory of a process that is stopped."""
    job = Job(lambda: None)
    with pytest.raises(PeerStalled):
        direct.destination.hear(job, StallTimer(Deadline(timedelta(seconds=10)), timedelta(seconds=0.2)))


def test_who_says_nothing_but_that_it_lives_does_not_outlast_the_deadline(direct: Lane) -> None:
    """However often it says so: there is something to read each time."""
    late, job = timer(), Job(lambda: None)
    late.deadline.expire()
    for _ in range(100):
        direct.supplier.send(LaneFrame.WAIT, timer())
    with pytest.raises(TransferTimeout):
        direct.destination.hear(job, late)
    assert not direct.destination.connection.idle, "it has not read all of it first"


def test_memory_that_was_taken_away_is_told_to_nobody(direct: Lane) -> None:
    tensor = noise(300_000, 1)
    (block,) = held([Block(tensor)])
    part = Held(block, 0, tensor.numel() * 4)
    view = part.view
    before = direct.supplier.connection.nbytes_wire
    tensor.untyped_storage().resize_(0)
    with pytest.raises(LocalProtocolError, match="exchanged or given back"):
        direct.supplier.place(view, timer(), part)
    assert direct.supplier.connection.nbytes_wire == before


def test_the_deadline_holds_between_two_reads(direct: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(3 * _READ_BYTES)
    tells(direct, data)
    late = timer()

    def read_into(self: PeerMemory, address: int, view: memoryview) -> None:
        read(self, address, view)
        late.deadline.expire()

    read = PeerMemory.read_into
    monkeypatch.setattr(PeerMemory, "read_into", read_into)
    with pytest.raises(TransferTimeout):
        arrive(direct, len(data), until=late)
    assert direct.destination.nbytes_direct == _READ_BYTES
