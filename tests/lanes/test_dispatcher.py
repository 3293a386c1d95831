"""Who comes before there is anything to fetch."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import pytest

from ft_transport._lanes import dispatcher as dispatcher_module
from ft_transport._lanes.dispatcher import Dispatcher
from ft_transport._lanes.protocol import FirstFrame, LaneFrame, LaneHeader
from ft_transport._lanes.session import Session


class Caller:
    """A connection that is there, says nothing, and is closed or not."""

    address = "127.0.0.1"
    idle = takes_more = True
    nbytes_alive = 0

    def __init__(self, while_told: Callable[[], object] | None = None) -> None:
        self.closed = False
        self.written = 0
        self._while_told = while_told

    def close(self) -> None:
        self.closed = True

    def write(self, parts: Any, *_: Any) -> None:
        self.written += 1
        if self._while_told is not None:
            self._while_told()


class Transfer:
    """One that takes everybody."""

    def __init__(self) -> None:
        self.taken: list[Any] = []

    def accept(self, session: Session, first: FirstFrame) -> bool:
        self.taken.append(session.connection)
        return True

    def tick(self) -> None:
        pass


def come(dispatcher: Dispatcher, caller: Any) -> None:
    dispatcher.dispatch(caller, FirstFrame(LaneHeader(LaneFrame.HELLO, 1, 7), (secrets.token_bytes(16), "name")))  # type: ignore[arg-type]


class Supplier:
    """Has so many lanes already."""

    def __init__(self, num_lanes: int) -> None:
        self.num_lanes = num_lanes

    def attach(self, *_: object) -> None:
        self.num_lanes += 1


def test_where_there_are_lanes_enough_everybody_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher_module, "MAX_ALL_LANES", 4)
    dispatcher, many, none = Dispatcher(), Supplier(3), Supplier(0)
    for ident, supplier in ((b"many", many), (b"none", none)):
        dispatcher.register(ident, supplier)  # type: ignore[arg-type]
    callers = [Caller() for _ in range(4)]
    for caller, ident in zip(callers, (b"many", b"many", b"none", b"none"), strict=True):
        dispatcher.dispatch(caller, FirstFrame(LaneHeader(LaneFrame.ATTACH, 1, 7), (ident,)))  # type: ignore[arg-type]
    assert (many.num_lanes, none.num_lanes) == (4, 1)
    assert [caller.closed for caller in callers] == [False, True, False, True]


@pytest.mark.parametrize("gone", [False, True], ids=["there", "gone"])
def test_who_is_told_while_a_transfer_begins_is_let_in_afterwards(gone: bool) -> None:
    dispatcher, transfer = Dispatcher(), Transfer()
    talking = Caller(lambda: dispatcher.open(transfer))
    come(dispatcher, talking)
    talking.idle = not gone
    dispatcher.tick()
    assert talking.closed is gone
    assert transfer.taken == ([] if gone else [talking])


def test_who_is_told_while_everything_is_closed_is_closed() -> None:
    dispatcher = Dispatcher()
    talking = Caller(dispatcher.close_all)
    come(dispatcher, talking)
    dispatcher.tick()
    assert talking.closed


def test_how_many_wait_is_bounded_and_the_oldest_make_room() -> None:
    dispatcher = Dispatcher()
    callers = [Caller() for _ in range(1000)]
    for caller in callers:
        come(dispatcher, caller)
    closed = [caller.closed for caller in callers]
    assert 0 < closed.count(False) <= 300
    assert closed == sorted(closed, reverse=True)
    dispatcher.close_all()
    assert all(caller.closed for caller in callers)
