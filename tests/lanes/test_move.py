"""From whom everything is fetched, and what follows when lanes have ended; suppliers are played, without sockets."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import CPU

from ft_transport._lanes import move
from ft_transport._lanes.chain import MAX_BREAKS, Route
from ft_transport._lanes.move import Mover
from ft_transport._lanes.pending import PendingMessages
from ft_transport._net.endpoint import Endpoint
from ft_transport._options import LaneOptions
from ft_transport.errors import LocalProtocolError, PeerFailure, TransferError

ENDPOINT = Endpoint(("127.0.0.1",), 9, bytes(32), False)
SOURCE = Route(ENDPOINT, b"source", from_source=True)
FIRST, SECOND = (Route(ENDPOINT, ident, from_source=False) for ident in (b"first", b"second"))


class Lanes:
    """What a mover sees of a ``Fetcher``: all that this supplier has, then its end."""

    nbytes, nbytes_wire, nbytes_direct, num_lanes, unreadable = 0, 100, 0, 2, False

    def __init__(self, play: Play, **how: Any) -> None:
        self._play = play
        self.alive, self.hopeless = True, False
        self.error: TransferError | None = None
        self.fatal: Exception | None = None

    def open(self, route: Route, *_: Any) -> None:
        self._play.asked.append(route.ident)
        self._play.open = self

    def look(self) -> None:
        pass

    def close(self) -> None:
        self.alive = False
        self._play.open = None


class Play:
    """A receive of two messages, and what happens at each look: the control connection's part is played, too."""

    wakeup, timer, from_source = None, None, SOURCE

    def __init__(self, named: list[Route], *events: Callable[[Play], None]) -> None:
        self.session = SimpleNamespace(protocol=SimpleNamespace(attempt=1, step=7))
        self.lost: TransferError | None = None
        self.asked: list[bytes] = []
        self.reasons: list[str] = []
        self.open: Any = None
        self.pending = PendingMessages(2)
        self.overwritten: list[list[int]] = []
        self._named = named
        self._events = list(events)

    def await_route(self) -> Route:
        return self._named.pop(0)

    def ask(self, route: Route, reason: str, *, slow: bool) -> Route | None:
        self.reasons.append(reason)
        return self._named.pop(0) if self._named else None

    def heartbeats(self) -> Any:
        return nullcontext()

    def pump(self, limit: timedelta | None = None) -> None:
        if limit is None:
            self._events.pop(0)(self)

    def fetch_written_again(self) -> bool:
        written = self.overwritten.pop(0) if self.overwritten else []
        self.pending.again(written)
        return bool(written)


def lands(message: int) -> Callable[[Play], None]:
    return lambda play: play.pending.landed(message, 5)


def end(text: str, *, hopeless: bool = False, lost: bool = False, fatal: bool = False) -> Callable[[Play], None]:
    def happens(play: Play) -> None:
        play.open.alive, play.open.error, play.open.hopeless = False, PeerFailure(text), hopeless
        if fatal:
            play.open.fatal = LocalProtocolError(text)
        if lost:
            play.lost = PeerFailure("the source is lost")

    return happens


@pytest.fixture(autouse=True)
def _played(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(move, "Fetcher", lambda sink, *_, **how: Lanes(sink, **how))


def run(play: Play) -> Mover:
    mover = Mover(play, play, LaneOptions(CPU), None)  # type: ignore[arg-type]
    try:
        mover.run()
    finally:
        assert play.open is None, "something may land after the end"
    return mover


@pytest.mark.parametrize(
    ("named", "events", "asked"),
    [
        ([SOURCE], [lands(0), lands(1)], [b"source"]),
        ([FIRST], [lands(0), lands(1)], [b"first"]),
        ([FIRST, SECOND], [lands(0), end("gone"), lands(1)], [b"first", b"second"]),
        ([FIRST], [lands(0), end("gone"), lands(1)], [b"first", b"first"]),
        ([SOURCE], [lands(0), end("gone"), lands(1)], [b"source", b"source"]),
        ([FIRST, SOURCE], [end("silent", hopeless=True), lands(0), lands(1)], [b"first", b"source"]),
    ],
    ids=["the source", "another", "another is named", "the same is named", "the source again", "hopeless"],
)
def test_until_everything_is_here(named: list[Route], events: list[Any], asked: list[bytes]) -> None:
    play = Play(list(named), *events)
    mover = run(play)
    assert play.asked == asked
    assert mover.nbytes_wire == 100 * len(asked)
    assert play.pending.complete


@pytest.mark.parametrize(
    ("named", "events", "text"),
    [
        ([SOURCE], [end(f"break {i}") for i in range(MAX_BREAKS)], f"break {MAX_BREAKS - 1}"),
        ([SOURCE], [end("silent", hopeless=True)], "silent"),
        ([FIRST], [end("gone", lost=True)], "the source is lost"),
        ([SOURCE], [end("gone", lost=True)], "gone"),
        ([FIRST], [end("no memory", fatal=True)], "no memory"),
    ],
    ids=["too often", "hopeless", "nobody can name another", "the lanes say why", "this side's own trouble"],
)
def test_why_it_cannot_be(named: list[Route], events: list[Any], text: str) -> None:
    with pytest.raises(TransferError, match=text):
        run(Play(list(named), *events))


def test_if_all_is_here_already_the_source_is_still_heard() -> None:
    """DONE may only follow a ROUTE."""
    play, named = Play([]), [SOURCE]
    play._named = named
    for message in range(2):
        play.pending.landed(message, 5)
    run(play)
    assert (named, play.asked) == ([], [])


def test_what_forward_has_written_to_is_fetched_as_often_as_that_happens() -> None:
    play = Play([SOURCE], lands(0), lands(1), lands(0), lands(0), lands(0), lands(0))
    play.overwritten = [[0]] * (MAX_BREAKS + 1)
    run(play)
    assert play.asked == [b"source"] * (MAX_BREAKS + 2)
    assert play.reasons == []


def test_damage_is_not_held_against_the_next_supplier() -> None:
    play = Play([FIRST, SECOND], end("gone"), lands(0), lands(1))
    play.pending.damaged(0)
    run(play)
    assert not play.pending.was_damaged(0)
    assert play.reasons == ["gone"]
