"""Who comes before there is anything to fetch."""

from __future__ import annotations

import secrets
from typing import Any

from ft_transport._lanes.dispatcher import Desk
from ft_transport._lanes.protocol import Frame, Header, Visit


class Caller:
    """A connection that is there, says nothing, and is closed or not."""

    address = "127.0.0.1"
    idle = takes_more = True

    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


def test_how_many_wait_is_bounded_and_the_oldest_make_room() -> None:
    desk = Desk()
    callers = [Caller() for _ in range(1000)]
    for caller in callers:
        visit = Visit(Header(Frame.HELLO, 1, 7), (secrets.token_bytes(16), "name"))  # type: ignore[arg-type]
        connection: Any = caller
        desk.welcome(connection, visit)
    closed = [caller.closed for caller in callers]
    assert 0 < closed.count(False) <= 300
    assert closed == sorted(closed, reverse=True)
    desk.close_all()
    assert all(caller.closed for caller in callers)
