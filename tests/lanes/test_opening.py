"""Lanes to one supplier are opened side by side, and given up at once when nobody needs them any more."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta

import pytest

from ft_transport._deadline import Deadline
from ft_transport._lanes import opening as opening_module
from ft_transport._lanes.chain import Route
from ft_transport._lanes.opening import Opening
from ft_transport._net.connection import Connection
from ft_transport._net.endpoint import Endpoint
from ft_transport._net.stall import StallTimer
from ft_transport.errors import PeerFailure


def timer(label: str) -> StallTimer:
    return StallTimer(Deadline(timedelta(seconds=60)), None, label)


def to(port: int, *addresses: str) -> Opening:
    route = Route(Endpoint(addresses or ("127.0.0.1",), port, bytes(32), False), b"i", from_source=True)
    return Opening(route, 1, 7, None, timer)


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of somebody who takes calls and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_those_that_are_dialled_give_up_when_they_are_cancelled(silent: int) -> None:
    opening, errors = to(silent), []

    def dial(own: StallTimer) -> None:
        try:
            opening.dial(own)
        except PeerFailure as exc:
            errors.append(str(exc))

    threads = [threading.Thread(target=dial, args=(opening.begin(),)) for _ in range(3)]
    assert opening.is_under_way
    assert opening.num_begun == 3
    for thread in threads:
        thread.start()
    opening.cancel()
    for thread in threads:
        thread.join(10)
    # Not "does not answer", as it would be after the three seconds that a handshake has.
    assert errors == ["the transfer is over"] * 3
    assert not opening.is_under_way
    opening.close()
    opening.close()


def test_one_that_is_begun_after_that_is_not_dialled_for_long(silent: int) -> None:
    with contextlib.closing(to(silent)) as opening:
        own = opening.begin()
        opening.cancel()
        with pytest.raises(PeerFailure, match="the transfer is over"):
            opening.dial(own)


def test_what_cannot_be_reached_is_not_under_way() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with contextlib.closing(to(port)) as opening:
        with pytest.raises(PeerFailure, match="does not answer"):
            opening.dial(opening.begin())
        assert not opening.is_under_way


def test_the_address_that_has_answered_is_the_only_one_that_others_try(
    monkeypatch: pytest.MonkeyPatch, silent: int
) -> None:
    tried: list[tuple[str, ...]] = []

    def dial(endpoint: Endpoint, *_: object) -> Connection:
        tried.append(endpoint.addresses)
        return Connection(socket.create_connection(("127.0.0.1", silent)), "127.0.0.2")

    monkeypatch.setattr(opening_module, "dial", dial)
    with contextlib.closing(to(9, "127.0.0.1", "127.0.0.2")) as opening:
        for _ in range(2):
            own = opening.begin()
            opening.dial(own).connection.close()
            assert opening.is_under_way, "it is not a lane yet"
            opening.end(own)
        assert not opening.is_under_way
    assert tried == [("127.0.0.1", "127.0.0.2"), ("127.0.0.2",)]
