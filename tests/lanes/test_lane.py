"""Messages that are asked for at once, and read where they lie: what becomes of each if one is not as it should be."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
from helpers import CPU, noise, raw_bytes

from ft_transport._deadline import Deadline
from ft_transport._device import NO_STREAMS
from ft_transport._lanes.fabric import CMA, new_reader, new_shown
from ft_transport._lanes.lane import Lane
from ft_transport._lanes.pending import PendingMessages
from ft_transport._lanes.protocol import MAX_RUN, LaneFrame, LaneProtocol, Role
from ft_transport._lanes.session import DIRECT_FROM, Session, Unreadable
from ft_transport._lanes.sink import Sink
from ft_transport._lanes.supplier import _Lane as _Supply
from ft_transport._net.cma import PeerMemory
from ft_transport._net.connection import Connection
from ft_transport._net.stall import StallTimer
from ft_transport._plan.blocks import Held
from ft_transport._plan.buffers import Bucket
from ft_transport._plan.compare import Targets
from ft_transport._plan.destination import DestinationPlan
from ft_transport._plan.placement import Placement
from ft_transport._process import memory_at
from ft_transport._state.describe import describe
from ft_transport._telemetry.report import PeerReport, TransferReport
from ft_transport._wire.digest import digest_bytes
from ft_transport._wire.layout import Limits, lay_out
from ft_transport.errors import PeerFailure

# A message each. A lane that is alone asks for half of what is left: 9 of 20, then 5.
STATE = [noise(DIRECT_FROM // 4, i) for i in range(20)]
LIMITS = Limits(message_bytes=DIRECT_FROM, flight_bytes=DIRECT_FROM, pack_below=0, pack_from=2, window=2)
FIRST, SECOND = list(range(9)), list(range(9, 14))


class Stock:
    """The messages of :data:`STATE`.

    Attributes:
        here: Those that are there; others come when they are waited for.
        staged: Those that are copied into the bucket.
        false: Those whose place is wrong.
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
            self.here, Sink(layout, self.plan, self.pending, report, self.claims, verified=True), self.timer, None
        )
        self.stock = Stock()
        self.supply = _Supply(self.there, self.stock, NO_STREAMS, self.timer, lambda: None)

    def ask(self, *, num_lanes: int = 1) -> list[int]:
        assert self.lane.ask(lambda: False, lambda: num_lanes)
        return list(self.here.protocol.asked)

    def answer(self) -> None:
        """As the supplier does: all that it can say at once."""
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
    monkeypatch.setattr("ft_transport._lanes.lane.MAX_RUN", 3)
    assert pair.ask() == [0, 1, 2]
    assert MAX_RUN * (8 + 5) < 64 << 10, "places of a process's memory fit into a frame"
