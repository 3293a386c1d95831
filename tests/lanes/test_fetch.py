"""Lanes to one supplier: each message comes once, whichever lanes break, and what keeps one from opening is known."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import CPU, noise, raw_bytes, until

from ft_transport._deadline import Deadline
from ft_transport._lanes import fetch, opening
from ft_transport._lanes.chain import Route
from ft_transport._lanes.fabric import new_shown
from ft_transport._lanes.fetch import Fetcher
from ft_transport._lanes.lane import Lane
from ft_transport._lanes.pending import PendingMessages
from ft_transport._lanes.protocol import LaneFrame, LaneHeader, LaneProtocol, Role
from ft_transport._lanes.session import Session
from ft_transport._lanes.sink import Sink
from ft_transport._net import connection as _connection
from ft_transport._net.connection import Connection, Wakeup
from ft_transport._net.endpoint import Endpoint
from ft_transport._net.stall import PeerStalled, StallTimer
from ft_transport._options import Fabric, LaneOptions
from ft_transport._plan.compare import Targets
from ft_transport._plan.destination import DestinationPlan
from ft_transport._state.describe import describe
from ft_transport._telemetry.report import PeerReport, TransferReport
from ft_transport._wire.layout import Limits, lay_out
from ft_transport.errors import PeerFailure, TransferError

STATE = [noise(256, i) for i in range(12)]  # a message each
LIMITS = Limits(message_bytes=1024, flight_bytes=1024, pack_below=0, pack_from=2, window=2)


def timer(label: str = "the source") -> StallTimer:
    return StallTimer(Deadline(timedelta(seconds=20)), None, label)


class Supplier:
    """Lets lanes in, and answers so many questions on each before it closes it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answers: list[int]) -> None:
        self.asked: list[int] = []
        self.honest = True  # about where its memory is
        self.num_direct = 0  # lanes whose destination reads it
        self._answers = list(answers)
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        monkeypatch.setattr(opening, "dial", self._dial)

    def _dial(self, *_: object) -> Connection:
        if not self._answers:
            raise PeerFailure("nobody answers")
        with socket.create_server(("127.0.0.1", 0)) as server:
            near, (far, _) = socket.create_connection(server.getsockname()), server.accept()
        lane = Connection(far, "lane"), self._answers.pop(0)
        self._threads.append(threading.Thread(target=self._supply, args=lane))
        self._threads[-1].start()
        return Connection(near, "127.0.0.1")

    def _supply(self, connection: Connection, answers: int) -> None:
        session = Session(connection, LaneProtocol(Role.SOURCE, 1, 7))
        session.protocol.received(LaneHeader(LaneFrame.ATTACH, 1, 7))
        with contextlib.suppress(TransferError):
            while answers:
                header, body = session.recv(timer())
                if header.frame is LaneFrame.LOCATE:
                    fabric, token = body
                    session.shown = new_shown(fabric)
                    location = session.shown.answer(token if self.honest else bytes(16), lambda job: None)
                    session.send(LaneFrame.LOCATION, timer(), body=[location])
                    continue
                if header.frame is LaneFrame.DIRECT:
                    self.num_direct += 1
                    continue
                answers -= 1
                with self._lock:
                    self.asked.append(header.number)
                session.send_message(header.number, memoryview(raw_bytes(STATE[header.number])), None, timer())
        connection.close()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(10)


@pytest.fixture
def into() -> tuple[PendingMessages, Any, Any]:
    """What is pending, where it lands, and what has landed."""
    report = TransferReport("destination", "test", 7, [PeerReport(0)])
    manifest, _ = describe(STATE)
    layout = lay_out(manifest, LIMITS)
    assert len(layout.messages) == len(STATE)
    landing, work = DestinationPlan(manifest, layout, {}, Targets.none(), CPU, report), PendingMessages(len(STATE))
    return work, Sink(layout, landing, work, report, {}, verified=True), landing.rebuild


def fetched(
    supplier: Supplier,
    into: tuple[PendingMessages, Any, Any],
    lanes: int,
    num_messages: int | None = None,
    *,
    fabric: Fabric = "auto",
    direct: bool = True,
    from_source: bool = True,
) -> Fetcher:
    work, sink, _ = into
    with contextlib.closing(Wakeup()) as bell:
        options = LaneOptions(CPU, lanes=lanes, fabric=fabric)
        fetcher = Fetcher(sink, bell, options, 1, 7, num_messages=num_messages, direct=direct)
        route = Route(Endpoint(("127.0.0.1",), 9, bytes(32), False), b"i", from_source)
        fetcher.open(route, None, timer)
        until(lambda: not fetcher.alive or work.complete)
        fetcher.close()
        fetcher.close()
    supplier.join()
    assert not fetcher.alive
    return fetcher


@pytest.mark.parametrize("lanes", [1, 3])
def test_every_message_is_asked_for_once(
    monkeypatch: pytest.MonkeyPatch, into: tuple[PendingMessages, Any, Any], lanes: int
) -> None:
    supplier = Supplier(monkeypatch, [100] * lanes)
    fetcher = fetched(supplier, into, lanes)
    assert sorted(supplier.asked) == list(range(12))
    assert [raw_bytes(tensor) for tensor in into[2]()] == [raw_bytes(tensor) for tensor in STATE]
    assert fetcher.error is None
    assert fetcher.nbytes == 12 * 1024


def test_no_more_lanes_are_opened_than_there_are_messages(
    monkeypatch: pytest.MonkeyPatch, into: tuple[PendingMessages, Any, Any]
) -> None:
    work, *_ = into
    taken = [work.take(lambda: False, block=False) for _ in range(10)]  # two are left
    for message in taken:
        work.landed(message or 0, 0)
    fetcher = fetched(Supplier(monkeypatch, [100] * 5), into, 5)
    assert fetcher.num_lanes <= 2
    assert work.complete


def test_what_a_broken_lane_owes_comes_over_the_others(
    monkeypatch: pytest.MonkeyPatch, into: tuple[PendingMessages, Any, Any]
) -> None:
    fetched(Supplier(monkeypatch, [1, 2, 100]), into, 3)
    assert into[0].complete
    assert [raw_bytes(tensor) for tensor in into[2]()] == [raw_bytes(tensor) for tensor in STATE]


def test_when_all_lanes_have_broken_the_rest_is_still_to_be_fetched(
    monkeypatch: pytest.MonkeyPatch, into: tuple[PendingMessages, Any, Any]
) -> None:
    fetcher = fetched(Supplier(monkeypatch, [2, 3]), into, 2)
    assert not into[0].complete
    assert isinstance(fetcher.error, PeerFailure)
    assert not fetcher.hopeless, "new lanes to it may help"
    assert fetcher.nbytes <= 5 * 1024
    again = fetched(Supplier(monkeypatch, [100]), into, 1)
    assert into[0].complete
    assert fetcher.nbytes + again.nbytes == 12 * 1024


def test_a_lane_that_is_dialled_in_vain_does_not_hide_why_the_others_have_ended(
    monkeypatch: pytest.MonkeyPatch, into: tuple[PendingMessages, Any, Any]
) -> None:
    supplier, turns = Supplier(monkeypatch, [1, 2]), itertools.count()

    def dial(*_: object) -> Connection:
        if next(turns) < 2:
            return supplier._dial()
        until(lambda: len(ended) == 2)
        raise PeerStalled("silent")

    close, ended = Lane.close, []

    def closed(lane: Any) -> None:
        close(lane)
        ended.append(lane)

    monkeypatch.setattr(Lane, "close", closed)
    monkeypatch.setattr(opening, "dial", dial)
    fetcher = fetched(supplier, into, 3)
    assert "silent" not in str(fetcher.error)
    assert not fetcher.hopeless, "new lanes to it may help"


@pytest.mark.parametrize("place", ["dialling", "making it a lane"])
def test_whatever_keeps_another_lane_from_opening_it_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, into: tuple[PendingMessages, Any, Any], place: str
) -> None:
    supplier, turns = Supplier(monkeypatch, [2, 100]), itertools.count()
    where, name = (opening, "dial") if place == "dialling" else (fetch, "Lane")
    made = getattr(where, name)

    def fail(*arguments: Any, **how: Any) -> Any:
        if next(turns):
            raise MemoryError("no room")
        return made(*arguments, **how)

    monkeypatch.setattr(where, name, fail)
    fetcher = fetched(supplier, into, 2)
    assert not into[0].complete
    assert isinstance(fetcher.error, TransferError)


def test_interrupted_at_its_end_it_says_so_and_is_closed(
    monkeypatch: pytest.MonkeyPatch, into: tuple[PendingMessages, Any, Any]
) -> None:
    supplier, (work, sink, _) = Supplier(monkeypatch, [100] * 2), into
    close, interrupts = Wakeup.close, [KeyboardInterrupt()]

    def interrupted(wakeup: Wakeup) -> None:
        close(wakeup)
        if interrupts:
            raise interrupts.pop()

    with contextlib.closing(Wakeup()) as bell:
        fetcher = Fetcher(sink, bell, LaneOptions(CPU, lanes=2), 1, 7)
        fetcher.open(Route(Endpoint(("127.0.0.1",), 9, bytes(32), False), b"i", True), None, timer)
        until(lambda: work.complete)
        with monkeypatch.context() as patch:
            patch.setattr(Wakeup, "close", interrupted)
            with pytest.raises(KeyboardInterrupt):
                fetcher.close()
        fetcher.close()
    supplier.join()


def test_a_lane_that_cannot_be_opened_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, into: tuple[PendingMessages, Any, Any]
) -> None:
    fetcher = fetched(Supplier(monkeypatch, [100]), into, 4)
    assert into[0].complete
    assert str(fetcher.error) == "nobody answers"


def test_a_trial_takes_no_more_than_it_may(
    monkeypatch: pytest.MonkeyPatch, into: tuple[PendingMessages, Any, Any]
) -> None:
    """Over one lane, so that it says what one lane of this supplier is worth."""
    supplier = Supplier(monkeypatch, [100, 100])
    fetcher = fetched(supplier, into, 4, num_messages=3)
    assert supplier.asked == [0, 1, 2]
    assert fetcher.nbytes == 3 * 1024
    assert fetcher.error is None


# ------------------------------------------------------------------------------- the supplier's memory


def test_memory_is_read_once_it_is_known_to_be_the_suppliers(
    monkeypatch: pytest.MonkeyPatch, into: tuple[PendingMessages, Any, Any]
) -> None:
    monkeypatch.setattr(fetch, "DIRECT_FROM", 1024)
    for honest, answers in ((False, [3, 3]), (True, [100, 100])):
        supplier = Supplier(monkeypatch, answers)
        supplier.honest = honest
        fetched(supplier, into, 2)
        assert (supplier.num_direct > 0) == honest
    assert into[0].complete


@pytest.mark.parametrize(
    "how", ["the caller does not want it", "it could not be read before", "another machine", "no message is so large"]
)
def test_memory_is_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, into: tuple[PendingMessages, Any, Any], how: str
) -> None:
    supplier = Supplier(monkeypatch, [100])
    monkeypatch.setattr(fetch, "DIRECT_FROM", 1025 if how == "no message is so large" else 1024)
    if how == "another machine":
        monkeypatch.setattr(_connection, "is_local", lambda sock: False)
    fabric: Fabric = "tcp" if how == "the caller does not want it" else "auto"
    fetched(supplier, into, 1, fabric=fabric, direct=how != "it could not be read before")
    assert supplier.num_direct == 0
    assert into[0].complete


@pytest.mark.parametrize("who", ["a destination alone", "one in a chain", "one that passes on", "a probe"])
def test_only_who_is_no_link_of_a_chain_asks_for_many_at_once(
    monkeypatch: pytest.MonkeyPatch, into: tuple[PendingMessages, Any, Any], who: str
) -> None:
    """What is asked for at once is here at once, and not passed on before. A probe compares speeds."""
    made, by_run = fetch.Lane, []

    def noted(*arguments: Any, **how: Any) -> Lane:
        by_run.append(how["by_run"])
        return made(*arguments, **how)

    monkeypatch.setattr(fetch, "Lane", noted)
    if who == "one that passes on":
        into[1].relay = SimpleNamespace(keep=lambda *_: True)
    num_messages = 3 if who == "a probe" else None
    fetched(Supplier(monkeypatch, [100]), into, 1, num_messages, from_source=who != "one in a chain")
    assert by_run == [who == "a destination alone"]


@pytest.mark.parametrize(("waits", "expected"), [(None, 3), (False, 5), (True, 1)], ids=["sent", "read", "waited for"])
def test_how_many_are_asked_for_at_once(
    into: tuple[PendingMessages, Any, Any], waits: bool | None, expected: int
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near, (far, _) = socket.create_connection(server.getsockname()), server.accept()
    protocol = LaneProtocol(Role.DESTINATION, 1, 7)
    protocol.sent(LaneFrame.ATTACH)
    session = Session(Connection(near, "lane"), protocol)
    lane = Lane(session, into[1], timer(), None, by_run=True)
    session.reader = None if waits is None else SimpleNamespace(waits=waits, close=lambda: None)  # type: ignore[assignment]
    assert lane.ask(lambda: False, lambda: 1)
    assert len(protocol.asked) == expected
    lane.close()
    far.close()
