"""Messages that are asked for at once, and read where they lie: what becomes of each if one is not as it should be."""

from __future__ import annotations

import errno
import socket
import struct
from collections import deque
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
from helpers import CPU, noise, pace, raw_bytes

from ft_transport._deadline import Deadline
from ft_transport._device import NO_STREAMS
from ft_transport._lanes import lane, session
from ft_transport._lanes.fabric import CMA, new_reader, new_shown
from ft_transport._lanes.lane import Lane
from ft_transport._lanes.pending import PendingMessages
from ft_transport._lanes.protocol import HEADER_BYTES, MAX_RUN, LaneFrame, LaneProtocol, Role, encode
from ft_transport._lanes.session import DIRECT_FROM, Session, Unreadable
from ft_transport._lanes.sink import Sink
from ft_transport._lanes.supplier import _Lane as _Supply
from ft_transport._net.cma import PeerMemory
from ft_transport._net.connection import Connection
from ft_transport._net.stall import StallTimer
from ft_transport._plan.blocks import Block, Held, held
from ft_transport._plan.buffers import Bucket
from ft_transport._plan.compare import Targets
from ft_transport._plan.destination import DestinationPlan
from ft_transport._plan.placement import Placement
from ft_transport._process import address_of, memory_at
from ft_transport._state.describe import describe
from ft_transport._telemetry.report import PeerReport, TransferReport
from ft_transport._wire.digest import digest_bytes
from ft_transport._wire.layout import Limits, lay_out
from ft_transport.errors import (
    LocalProtocolError,
    PeerFailure,
    RemoteProtocolError,
    TransferError,
    TransferTimeout,
)

# A message each. A lane that is alone asks for half of what is left: 9 of 20, then 5.
STATE = [noise(DIRECT_FROM // 4, i) for i in range(20)]
LIMITS = Limits(message_bytes=DIRECT_FROM, flight_bytes=DIRECT_FROM, pack_below=0, pack_from=2, window=2)
FIRST, SECOND = list(range(9)), list(range(9, 14))


class Stock:
    """The messages of :data:`STATE`.

    Attributes:
        here: Those that are there; others come when they are waited for.
        staged: Those that are copied into the bucket.
    """

    verified = steady = is_whole_transfer = True
    fabric = CMA

    def __init__(self) -> None:
        self.sizes = [DIRECT_FROM] * len(STATE)
        self.here = set(range(len(STATE)))
        self.staged: set[int] = set()
        self.noted: dict[int, int] = {}

    def has(self, message: int) -> bool:
        return message in self.here

    def await_message(self, message: int) -> bool:
        self.here.add(message)
        return True

    def view(self, message: int, bucket: Bucket) -> memoryview:
        if message not in self.staged:
            return memory_at(STATE[message].data_ptr(), DIRECT_FROM)
        taken = bucket.take(DIRECT_FROM)
        taken[:] = STATE[message].view(torch.uint8)
        return memory_at(taken.data_ptr(), DIRECT_FROM)

    def held(self, message: int) -> Held | None:
        return None

    def note_error(self, error: object) -> None:
        raise NotImplementedError

    def digest(self, message: int) -> int | None:
        return self.noted.get(message)

    def note_digest(self, message: int, digest: int) -> None:
        self.noted[message] = digest


class Pair:
    """Both ends of a lane whose destination reads the supplier's memory: here, this very process's."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            near = socket.create_connection(server.getsockname())
            far, _ = server.accept()
        self.timer = StallTimer(Deadline(timedelta(seconds=10)))
        self.here = Session(Connection(near, "peer"), LaneProtocol(Role.DESTINATION, 1, 7))
        self.there = Session(Connection(far, "peer"), LaneProtocol(Role.SOURCE, 1, 7))
        self.here.send(LaneFrame.ATTACH, self.timer, body=[b"i" * 16])
        self.there.recv(self.timer)
        self.here.reader, self.there.shown = reader, shown = new_reader(CMA, 0), new_shown(CMA)
        reader.reach(shown.answer(reader.hello(lambda job: None), lambda job: None), lambda job: None)
        self.here.send(LaneFrame.DIRECT, self.timer)
        self.there.recv(self.timer)
        manifest, _ = describe(STATE)
        layout = lay_out(manifest, LIMITS)
        report = TransferReport("destination", "test", 7, [PeerReport(0)])
        self.plan = DestinationPlan(manifest, layout, {}, Targets.none(), CPU, report)
        self.pending = PendingMessages(len(STATE))
        self.claims: dict[int, int | None] = {}
        self.lane = Lane(
            self.here,
            Sink(layout, self.plan, self.pending, report, self.claims, verified=True),
            self.timer,
            None,
            by_run=True,
        )
        self.stock = Stock()
        self.supply = _Supply(self.there, self.stock, NO_STREAMS, self.timer, lambda: None)

    def ask(self, *, num_lanes: int = 1) -> list[int]:
        assert self.lane.ask(lambda: False, lambda: num_lanes)
        return list(self.here.protocol.asked)

    def answer(self) -> None:
        """As the supplier does: all that it can say at once."""
        if not self.supply._answers:
            self.supply._begin(waiting=True)
        while self.supply._has_room() and self.supply._begin(waiting=False):
            pass
        self.supply._send(self.supply._answers.popleft())

    @property
    def arrived(self) -> list[int]:
        return sorted(self.pending.digests)

    def rebuilt(self, messages: list[int]) -> list[bytes]:
        return [raw_bytes(self.plan.rebuild()[message]) for message in messages]


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.lane.close()
    made.there.connection.close()


@pytest.mark.parametrize(("num_lanes", "first", "second"), [(1, FIRST, SECOND), (2, FIRST[:4], [4, 5, 6])])
def test_a_lane_asks_for_no_more_than_half_of_its_share(
    pair: Pair, num_lanes: int, first: list[int], second: list[int]
) -> None:
    """Then all lanes end at about the same time."""
    assert pair.ask(num_lanes=num_lanes) == first
    pair.answer()
    pair.lane.take_answer()
    assert pair.arrived == first
    assert pair.ask(num_lanes=num_lanes) == second


def test_a_run_ends_before_what_may_be_here_already(pair: Pair) -> None:
    """That is asked about by its digest."""
    pair.claims.update({4: None, 5: None})
    assert pair.ask() == [0, 1, 2, 3]
    pair.answer()
    pair.lane.take_answer()
    pair.ask()
    header, _ = pair.there.recv(pair.timer)
    assert (header.frame, header.number) == (LaneFrame.CHECK, 4)


def test_what_is_asked_for_at_once_is_told_at_once_and_lands(pair: Pair) -> None:
    pair.ask()
    pair.answer()
    assert pair.stock.noted == {message: digest_bytes(raw_bytes(STATE[message])) for message in FIRST}
    pair.lane.take_answer()
    assert pair.arrived == FIRST
    assert pair.lane.nbytes == len(FIRST) * DIRECT_FROM
    assert pair.rebuilt(FIRST) == [raw_bytes(STATE[message]) for message in FIRST]


@pytest.mark.parametrize("why", ["is not there yet", "is staged"])
def test_what_cannot_be_told_yet_is_told_on_its_own(pair: Pair, why: str) -> None:
    (pair.stock.here.discard if why == "is not there yet" else pair.stock.staged.add)(3)
    pair.ask()
    pair.answer()
    pair.lane.take_answer()
    assert pair.arrived == [0, 1, 2]
    pair.answer()
    pair.lane.take_answer()
    assert pair.arrived[:4] == [0, 1, 2, 3]
    while pair.here.protocol.asked:
        pair.answer()
        pair.lane.take_answer()
    assert pair.rebuilt(FIRST) == [raw_bytes(STATE[message]) for message in FIRST]
    assert pair.here.nbytes_direct == (len(FIRST) - (why == "is staged")) * DIRECT_FROM


@pytest.mark.parametrize("staged", [{0, 2}, {0, 1}, {1, 4, 5, 8}])
def test_two_that_are_staged_there_do_not_share_a_bucket(pair: Pair, staged: set[int]) -> None:
    """As from an accelerator, where there are two, with messages of the host's between them: one would be sent as the
    other, and with its digest."""
    pair.supply._buckets = deque([Bucket(CPU), Bucket(CPU)])
    pair.stock.staged |= staged
    pair.ask()
    while pair.here.protocol.asked:
        pair.answer()
        pair.lane.take_answer()
    assert pair.rebuilt(FIRST) == [raw_bytes(STATE[message]) for message in FIRST]


def test_two_that_are_staged_here_do_not_share_a_bucket(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a template is strided: the second one would land before the first one is copied from there."""
    held = Placement.held
    monkeypatch.setattr(Placement, "held", lambda self, message: None if message in (2, 3) else held(self, message))
    pair.ask()
    pair.answer()
    pair.lane.take_answer()
    assert pair.arrived == FIRST
    assert pair.rebuilt(FIRST) == [raw_bytes(STATE[message]) for message in FIRST]


def test_one_that_came_damaged_is_asked_for_again_and_the_others_are_here(pair: Pair) -> None:
    pair.stock.noted[2] = 5  # as somebody has it who passes it on
    pair.ask()
    pair.answer()
    pair.lane.take_answer()
    assert pair.arrived == [0, 1, *FIRST[3:]]
    assert not pair.here.protocol.asked
    assert pair.pending.take(lambda: False, block=False) == 2


@pytest.mark.parametrize("how", ["its memory is gone", "the lane breaks before the digests"])
def test_of_a_run_that_breaks_off_all_is_still_to_be_fetched(pair: Pair, how: str) -> None:
    asked = pair.ask()
    there = pair.there
    places = [struct.pack("<Q", STATE[message].data_ptr()) for message in asked]
    if how == "its memory is gone":
        places[3] = struct.pack("<Q", 4096)
    there.recv(pair.timer)
    there.send(LaneFrame.PLACE, pair.timer, 0, places)
    there.connection.abort()
    with pytest.raises(Unreadable if how == "its memory is gone" else PeerFailure):
        pair.lane.take_answer()
    assert list(pair.here.protocol.asked) == asked
    assert pair.arrived == []
    pair.lane.close()
    assert pair.pending.num_todo == len(STATE)


@pytest.mark.parametrize("what", ["a damaged body", "no body", "one too many", "none", "a SAME with a body"])
def test_an_answer_that_is_none_leaves_all_to_be_fetched(pair: Pair, what: str) -> None:
    """Its header was good, and what it answers is still owed."""
    if what == "a SAME with a body":
        pair.claims[0] = None
    asked = pair.ask()
    places = [struct.pack("<Q", STATE[message].data_ptr()) for message in asked]
    number = {"one too many": len(asked) + 1, "none": 0}.get(what, len(asked))
    frame = LaneFrame.SAME if what == "a SAME with a body" else LaneFrame.PLACE
    data = bytearray(encode(frame, 1, 7, 0, (places * 2)[:number]))
    if what == "a damaged body":
        data[-1] ^= 1
    elif what == "no body":
        del data[HEADER_BYTES:]
    pair.there.connection.write([bytes(data)], pair.timer)
    pair.there.connection.abort()
    with pytest.raises(TransferError):
        pair.lane.take_answer()
    pair.lane.close()
    assert pair.pending.num_todo == len(STATE)
    assert pair.arrived == []


@pytest.mark.parametrize("verify", [True, False])
def test_memory_that_is_given_back_in_a_run_is_not_written_to(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, verify: bool
) -> None:
    """By the time that its message is read, it may be somebody else's."""
    targets = [torch.zeros(DIRECT_FROM // 4) for _ in STATE]
    blocks = held([Block(tensor) for tensor in targets])
    monkeypatch.setattr(Placement, "held", lambda _, message: Held(blocks[message], 0, DIRECT_FROM))
    pair.lane._sink.verified = verify
    read_into, addresses = PeerMemory.read_into, [tensor.data_ptr() for tensor in targets]
    written: list[int] = []

    def read(self: PeerMemory, address: int, view: memoryview) -> None:
        written.append(addresses.index(address_of(view)))
        read_into(self, address, view)
        if written == [0]:
            targets[5].untyped_storage().resize_(0)

    monkeypatch.setattr(PeerMemory, "read_into", read)
    pair.ask()
    pair.answer()
    with pytest.raises(LocalProtocolError, match="exchanged or given back"):
        pair.lane.take_answer()
    assert written == [0, 1, 2, 3, 4]
    assert pair.arrived == []


@pytest.mark.parametrize("when", ["while it is written to", "once all is written"])
def test_memory_that_is_given_back_is_named_and_not_the_peers(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The system cannot write there either, which is no reason to ask somebody else."""
    target = torch.zeros(DIRECT_FROM // 4)
    (block,) = held([Block(target)])
    placed = Placement.held
    last = FIRST[-1]
    monkeypatch.setattr(
        Placement,
        "held",
        lambda self, message: Held(block, 0, DIRECT_FROM) if message == last else placed(self, message),
    )
    read_into, address = PeerMemory.read_into, target.data_ptr()

    def read(self: PeerMemory, there: int, view: memoryview) -> None:
        if address_of(view) != address:
            read_into(self, there, view)
        elif when == "while it is written to":
            target.data = torch.zeros(4)
            raise OSError(errno.EFAULT, "Bad address")
        else:
            read_into(self, there, view)
            target.data = torch.zeros(4)

    monkeypatch.setattr(PeerMemory, "read_into", read)
    pair.ask()
    pair.answer()
    with pytest.raises(LocalProtocolError, match="exchanged or given back"):
        pair.lane.take_answer()
    assert pair.arrived == []


def test_a_slow_read_is_no_silence(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as some of it comes now and then."""
    read_into = PeerMemory.read_into

    def read(self: PeerMemory, address: int, view: memoryview) -> None:
        read_into(self, address, view)
        pace(0.1)

    pair.lane._timer = StallTimer(Deadline(timedelta(seconds=20)), timedelta(seconds=0.5))
    monkeypatch.setattr(PeerMemory, "read_into", read)
    pair.ask()
    pair.answer()
    pair.lane.take_answer()
    assert pair.arrived == FIRST


def test_digests_are_said_now_and_then_and_not_when_it_is_over(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the destination hears nothing while those of a whole run are taken, and nobody may leave."""
    monkeypatch.setattr(session, "_SAID_BYTES", 2 * DIRECT_FROM)
    taken: list[int] = []
    pair.supply._timer = StallTimer(Deadline(timedelta(seconds=10)))

    def fingerprint(view: memoryview, held: Held | None = None) -> int:
        taken.append(digest_bytes(view))
        if len(taken) == 5:
            pair.supply._timer.deadline.expire()
        return taken[-1]

    monkeypatch.setattr(session, "fingerprint", fingerprint)
    pair.ask()
    with pytest.raises(TransferTimeout):
        pair.answer()
    assert len(taken) == 6
    header = pair.here.recv_header(pair.timer)
    assert len(pair.here.recv_body(header, pair.timer)) == len(FIRST)
    assert pair.here._recv_digests(6, pair.timer) == taken


def test_who_does_not_ask_by_the_run_asks_one_by_one(pair: Pair) -> None:
    """As in a chain, where what is asked for at once is passed on at once."""
    pair.lane._by_run = False
    assert pair.ask() == [0, 1, 2]
    header, body = pair.there.recv(pair.timer)
    assert (header.frame, header.number, body) == (LaneFrame.WANT, 0, (1,))


def test_a_check_is_not_answered_among_places(pair: Pair) -> None:
    """Its digest is to be compared first."""
    pair.claims.update({0: None, 1: None})
    pair.lane._by_run = False
    pair.stock.noted[1] = 5
    pair.stock.noted[0] = 6
    pair.ask()
    pair.answer()
    header = pair.here.recv_header(pair.timer)
    assert len(pair.here.recv_body(header, pair.timer)) == 1


def test_a_run_ends_within_the_state(pair: Pair) -> None:
    pair.here.send(LaneFrame.WANT, pair.timer, len(STATE) - 2, [3])
    with pytest.raises(RemoteProtocolError, match="message 20 of 20"):
        pair.answer()


def test_what_was_asked_for_in_another_order_is_not_told_together(pair: Pair) -> None:
    for message in (3, 4, 6, 5):
        pair.here.send(LaneFrame.WANT, pair.timer, message, [1])
    told = []
    while pair.here.protocol.asked:
        pair.answer()
        header = pair.here.recv_header(pair.timer)
        places = pair.here.recv_body(header, pair.timer)
        pair.here._recv_digests(len(places), pair.timer)
        told.append((header.number, len(places)))
    assert told == [(3, 2), (6, 1), (5, 1)]


def test_what_may_change_before_it_is_read_is_sent(pair: Pair) -> None:
    pair.stock.steady = False
    pair.ask()
    while pair.here.protocol.asked:
        pair.answer()
        pair.lane.take_answer()
    assert pair.here.nbytes_direct == 0
    assert pair.rebuilt(FIRST) == [raw_bytes(STATE[message]) for message in FIRST]


def test_a_run_has_no_more_bytes_than_it_may(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane, "_RUN_BYTES", 4 * DIRECT_FROM)
    assert pair.ask() == [0, 1, 2, 3]


def test_a_lane_that_is_ended_reads_no_further(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads memory, and would not hear of it from its connection before the end of the run."""
    pair.ask()
    pair.answer()
    read_into = PeerMemory.read_into

    def read(self: PeerMemory, address: int, view: memoryview) -> None:
        read_into(self, address, view)
        pair.lane.abort()

    monkeypatch.setattr(PeerMemory, "read_into", read)
    with pytest.raises(PeerFailure, match="the lane was closed"):
        pair.lane.take_answer()
    assert pair.here.nbytes_direct == DIRECT_FROM


def test_no_frame_is_of_more_messages_than_it_may_be(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane, "MAX_RUN", 3)
    assert pair.ask() == [0, 1, 2]
    assert MAX_RUN * (8 + 5) < 64 << 10, "places of a process's memory fit into a frame"
