"""One destination's conversation with the source: all it says is there before the source listens, so nobody waits."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from ft_transport._deadline import Deadline
from ft_transport._device import NO_STREAMS
from ft_transport._lanes.chain import DestinationState
from ft_transport._lanes.protocol import LaneFrame, LaneHeader, LaneProtocol, Role, encode
from ft_transport._lanes.serving import Line, Serving, send_failed
from ft_transport._lanes.session import Session
from ft_transport._net.connection import Connection
from ft_transport._net.endpoint import Endpoint
from ft_transport._net.stall import StallTimer
from ft_transport._telemetry.report import PeerReport, TransferReport
from ft_transport.errors import LocalProtocolError, TransferError
from lanes.heard import Script, heard

LONG = timedelta(seconds=10)
ELSEWHERE = Endpoint(("127.0.0.1",), 9, bytes(32), False).encode()
F = LaneFrame

READY = (F.READY, 0, [ELSEWHERE, b"relay"])
DONE = (F.DONE, 5, None)


class Store:
    """A described state. Whoever looks whether it is unchanged finds that it is, but for the time that is said."""

    frame, streams, sizes = b"manifest", NO_STREAMS, [10]

    def __init__(self, changed_at: int = -1) -> None:
        self.num_looks = 0
        self._changed_at = changed_at

    def check_unchanged(self) -> None:
        self.num_looks += 1
        if self.num_looks == self._changed_at:
            raise LocalProtocolError("the state changed")


class News:
    def __init__(self) -> None:
        self.told: list[int] = []

    def progress(self, peer: PeerReport, nbytes: int) -> None:
        self.told.append(nbytes)


class Dispatcher:
    """Who leads lanes to a supplier, and what was open when."""

    def __init__(self, theirs: Connection) -> None:
        self.seen: list[str] = []
        self.idents: set[bytes] = set()
        self._theirs = theirs

    def register(self, ident: bytes, supplier: object) -> None:
        self.seen.append("register")
        self.idents.add(ident)

    def unregister(self, ident: bytes) -> None:
        self.seen.append("unregister" if self._theirs.takes_more else "unregister too late")
        self.idents.discard(ident)


class Destination:
    """One that has said HELLO, and says the rest of its script at once."""

    def __init__(self, script: Script, *, timer: StallTimer | None = None, on_phase: Any = None) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.socket = socket.create_connection(server.getsockname())
            far, _ = server.accept()
        self.socket.settimeout(10)
        for frame, number, body in script:
            self.socket.sendall(encode(frame, 1, 7, number, body))
        # It closes its side, so that whoever waits for it to have read everything need not.
        self.socket.shutdown(socket.SHUT_WR)
        protocol = LaneProtocol(Role.SOURCE, 1, 7)
        protocol.received(LaneHeader(F.HELLO, 1, 7))
        self.session = Session(Connection(far, "peer"), protocol)
        self.peer = PeerReport(0, name="guest")
        self.state = DestinationState(self.peer)
        self.timer = timer or StallTimer(Deadline(LONG))
        self.news, self.dispatcher = News(), Dispatcher(self.session.connection)
        report = TransferReport("source", "test", 7, [self.peer, PeerReport(1)])
        self.line = Line(report, True, LONG)
        self.serving = Serving(
            self.session,
            self.state,
            self.timer,
            self.line,
            self.dispatcher,  # type: ignore[arg-type]
            self.news,  # type: ignore[arg-type]
            on_phase,
        )

    def run(self, store: Store | None = None, failure: str = "") -> str:
        found = None if failure else store or Store()
        return self.serving.run(found, failure)  # type: ignore[arg-type]

    def heard(self) -> Script:
        """All that the source has said, until it closed the connection."""
        return heard(self.socket, Role.DESTINATION)


def frames(script: Script) -> list[LaneFrame]:
    return [frame for frame, *_ in script]


# -------------------------------------------------------------------------------- how it ends, and what was said


@pytest.mark.parametrize(
    ("script", "outcome", "phase", "reason", "said"),
    [
        ([READY, DONE], "complete", "move", "", [F.MANIFEST, F.ROUTE, F.BYE]),
        ([(F.PROGRESS, 0, None), READY, DONE], "complete", "move", "", [F.MANIFEST, F.ROUTE, F.BYE]),
        ([READY, (F.PROGRESS, 1, None), DONE], "complete", "move", "", [F.MANIFEST, F.ROUTE, F.WAIT, F.BYE]),
        (
            [READY, (F.REROUTE, 0, [b"any", "slow", False]), DONE],
            "complete",
            "move",
            "",
            [F.MANIFEST, F.ROUTE, F.ROUTE, F.BYE],
        ),
        (
            [(F.REFUSE, 0, ["a", "b"])],
            "refused",
            "agree",
            "the destination refuses this state: a; b",
            [F.MANIFEST],
        ),
        (
            [READY, (F.FAILED, 0, ["a", "b"])],
            "failed",
            "move",
            "the destination gave up: a; b",
            [F.MANIFEST, F.ROUTE],
        ),
        ([], "dead", "agree", "the connection was closed by the peer", [F.MANIFEST]),
        ([READY], "dead", "move", "the connection was closed by the peer", [F.MANIFEST, F.ROUTE]),
        ([DONE], "failed", "agree", "DONE 5 is out of order in state planning", [F.MANIFEST, F.FAILED]),
        (
            [READY, READY],
            "failed",
            "move",
            "READY 0 is out of order in state moving",
            [F.MANIFEST, F.ROUTE, F.FAILED],
        ),
    ],
    ids=[
        "all is well",
        "it plans for long",
        "it moves for long",
        "another supplier",
        "it refuses",
        "it gives up",
        "gone before it agrees",
        "gone while it moves",
        "out of order in its plan",
        "out of order while it moves",
    ],
)
def test_how_it_ends(script: Script, outcome: str, phase: str, reason: str, said: list[LaneFrame]) -> None:
    it = Destination(script)
    assert it.run() == outcome
    assert (it.peer.phase, it.peer.reason) == (phase, reason)
    heard = it.heard()
    assert frames(heard) == said
    if F.FAILED in said:
        assert heard[-1][2] == (reason,)


def test_what_is_said_with_it() -> None:
    it = Destination([(F.PROGRESS, 0, None), READY, (F.PROGRESS, 3, None), DONE])
    it.run()
    assert it.news.told == [0, 3, 5]
    # Two are expected, so it may have others behind it, and makes a relay.
    assert it.heard()[:2] == [(F.MANIFEST, 2, b"manifest"), (F.ROUTE, 0, (None, it.state.ident, it.state.ident))]
    assert it.peer.nbytes_wire == it.session.connection.nbytes_wire > 0
    assert set(it.peer.seconds) == {"agree", "move"}


@pytest.mark.parametrize(("agrees", "seen"), [(True, ["register", "unregister"]), (False, ["unregister"])])
def test_lanes_are_led_to_it_from_when_it_agrees_until_it_ends(agrees: bool, seen: list[str]) -> None:
    it = Destination([READY, DONE] if agrees else [(F.REFUSE, 0, ["no"])])
    it.run()
    assert it.dispatcher.seen == seen
    assert it.dispatcher.idents == set()
    it.socket.close()


@pytest.mark.parametrize(
    ("changed_at", "said"),
    [
        (1, [F.MANIFEST, F.ROUTE, F.FAILED]),
        (2, [F.MANIFEST, F.ROUTE, F.WAIT, F.FAILED]),
        (3, [F.MANIFEST, F.ROUTE, F.WAIT, F.WAIT, F.FAILED]),
    ],
    ids=["at the first look", "at the second", "at the last"],
)
def test_a_state_that_changes_is_told_at_the_next_word(changed_at: int, said: list[LaneFrame]) -> None:
    """Else somebody would fetch a whole state that is void already; and the last look is after the last byte."""
    it = Destination([READY, (F.PROGRESS, 1, None), (F.PROGRESS, 2, None), DONE])
    assert it.run(Store(changed_at)) == "failed"
    assert it.peer.reason == "the state changed"
    assert frames(it.heard()) == said


def test_without_a_state_it_is_told_why() -> None:
    it = Destination([])
    assert it.run(failure="a leaf cannot travel") == "failed"
    assert it.heard() == [(F.FAILED, 0, ("a leaf cannot travel",))]
    assert it.dispatcher.seen == ["unregister"]


@pytest.mark.parametrize(
    ("timeout", "stall", "reason"),
    [
        (timedelta(0), LONG, "timed out after 0 s"),
        (LONG, timedelta(0), "guest has been silent for 0 s"),
    ],
    ids=["the deadline", "silence"],
)
def test_who_is_too_late_is_told(timeout: timedelta, stall: timedelta, reason: str) -> None:
    it = Destination([READY, DONE], timer=StallTimer(Deadline(timeout), stall, "guest"))
    assert it.run() == "timed out"
    assert it.heard()[-1] == (F.FAILED, 0, (reason,))


@pytest.mark.parametrize("script", [[READY, DONE], []], ids=["there", "gone"])
def test_who_is_cancelled_has_failed_and_is_not_dead(script: Script) -> None:
    """Whatever its connection makes of it: this side has ended it."""
    it = Destination(script)
    it.serving.cancel("the source has ended the transfer")
    assert it.run() == "failed"
    if script:
        assert it.heard()[-1] == (F.FAILED, 0, ("the source has ended the transfer",))
    it.socket.close()


def test_a_callback_that_raises_ends_its_own_conversation_alone() -> None:
    def on_phase(_: object, phase: str) -> None:
        if phase == "move":
            raise KeyError("oops")

    it = Destination([READY, DONE], on_phase=on_phase)
    assert it.run() == "failed"
    assert it.peer.reason == "KeyError: 'oops'"
    assert it.heard()[-1] == (F.FAILED, 0, ("KeyError: 'oops'",))


# ---------------------------------------------------------------------------------------- what it says of itself


@pytest.mark.parametrize(
    ("metadata", "relay", "kept", "warned"),
    [
        (ELSEWHERE, b"r" * 16, True, False),
        (ELSEWHERE, b"r" * 64, True, False),
        (ELSEWHERE, b"r" * 65, False, True),
        ("http://elsewhere", b"r" * 16, False, True),
        (ELSEWHERE.replace("/5/", "/6/"), b"r" * 16, False, True),
        ("", b"", False, False),
    ],
    ids=["sound", "another make's", "too long", "another transport", "another version", "it passes nothing on"],
)
def test_nobody_is_sent_where_nobody_could_read_the_way(
    metadata: str, relay: bytes, kept: bool, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    it = Destination([(F.READY, 0, [metadata, relay]), DONE])
    with caplog.at_level(logging.WARNING, "ft_transport"):
        assert it.run() == "complete"
    assert it.state.metadata == (metadata if kept else "")
    assert ("rank 0 cannot pass the state on" in caplog.text) is warned
    assert it.line.route(joined(it.line))[0] == (metadata if kept else None)
    it.socket.close()


@pytest.mark.parametrize(
    ("slow", "counts"), [(False, True), (True, False)], ids=["has ended", "is slow, and waits itself"]
)
def test_a_supplier_that_has_failed_it_is_not_named_again(
    slow: bool, counts: bool, caplog: pytest.LogCaptureFixture
) -> None:
    it = Destination([READY, (F.REROUTE, 0, [b"first", "it is\nslow", slow]), DONE])
    first = joined(it.line, b"first")
    it.line.route(first)
    with caplog.at_level(logging.WARNING, "ft_transport"):
        it.run()
    named = [body[1] for frame, _, body in it.heard() if frame is F.ROUTE]
    assert named == [b"first", it.state.ident if counts else b"first"]
    assert caplog.messages == (["rank 0 turns to another supplier: it is\\nslow"] if counts else [])


# ---------------------------------------------------------------------------------------------------- the line


def joined(line: Line, relay: bytes = b"") -> DestinationState:
    """One more that has agreed to the state."""
    state = DestinationState(PeerReport(-1), metadata=ELSEWHERE if relay else "", relay=relay)
    line.join(state)
    return state


@pytest.mark.parametrize(("num_peers", "is_chain", "longest"), [(1, True, 1), (3, True, 3), (3, False, 1)])
def test_how_long_the_line_may_get(num_peers: int, is_chain: bool, longest: int) -> None:
    report = TransferReport("source", "test", 7, [PeerReport(rank) for rank in range(num_peers)])
    assert Line(report, is_chain, LONG).longest == longest


@pytest.mark.parametrize("is_chain", [True, False])
def test_whom_each_is_told_to_fetch_from(is_chain: bool) -> None:
    line = Line(TransferReport("source", "test", 7), is_chain, LONG)
    first, second = joined(line, b"first"), joined(line, b"second")
    assert line.route(first) == [None, first.ident, first.ident]
    # Its own identity as well: by that it tries the source, should it find the one before it slow.
    source = [None, second.ident, second.ident]
    assert line.route(second) == ([ELSEWHERE, b"first", second.ident] if is_chain else source)
    assert second.before is (first if is_chain else None)
    assert second.settling is not None
    assert second.settling.timeout == LONG


# ------------------------------------------------------------------------------------------------ FAILED


@pytest.fixture
def ends() -> Iterator[Destination]:
    made = Destination([])
    yield made
    made.session.connection.close()
    made.socket.close()


@pytest.mark.parametrize("wait", [True, False])
def test_why_there_will_be_no_more(ends: Destination, wait: bool) -> None:
    send_failed(ends.session, "no more", wait=wait)
    ends.session.connection.close()
    assert ends.heard() == [(F.FAILED, 0, ("no more",))]


def test_after_the_last_word_there_is_none(ends: Destination) -> None:
    send_failed(ends.session, "no more", wait=False)
    send_failed(ends.session, "no more", wait=True)
    ends.session.connection.close()
    assert len(ends.heard()) == 1


def test_who_reads_nothing_holds_nobody_up(ends: Destination, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told under the dispatcher's lock."""
    monkeypatch.setattr(Connection, "takes_more", False)
    send_failed(ends.session, "no more", wait=False)
    assert ends.session.connection.nbytes_wire == 0


def test_who_is_gone_need_not_be_told(ends: Destination) -> None:
    ends.session.connection.abort()
    with pytest.raises(TransferError):
        ends.session.send(F.WAIT, StallTimer(Deadline(LONG)))
    send_failed(ends.session, "no more", wait=True)
