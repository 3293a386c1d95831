"""The conversation with the source: all it says is there before this side listens, so nobody waits."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import pytest
from helpers import until

from ft_transport._deadline import Deadline
from ft_transport._lanes import control
from ft_transport._lanes.chain import Route
from ft_transport._lanes.control import ControlConnection, GaveUp, Tally
from ft_transport._lanes.protocol import LaneFrame, LaneHeader, LaneProtocol, Role, encode
from ft_transport._lanes.session import Session
from ft_transport._net.connection import Connection, Wakeup
from ft_transport._net.endpoint import Endpoint
from ft_transport._net.stall import HEARTBEAT, PeerStalled
from ft_transport._telemetry.report import PeerReport, Progress, TransferReport
from ft_transport.errors import PeerFailure, TransferError, TransferTimeout
from lanes.heard import Script, heard

LONG, NONE = timedelta(seconds=10), timedelta(0)
# The source has two addresses, and the second one has answered.
SOURCE = Endpoint(("10.9.9.9", "127.0.0.1"), 8, bytes(32), False)
ELSEWHERE = Endpoint(("127.0.0.1",), 9, bytes(32), False)
NBYTES = 7
F = LaneFrame

Say = tuple[LaneFrame, Any]
WAIT: Say = (F.WAIT, None)
MANIFEST: Say = (F.MANIFEST, b"manifest")
FROM_SOURCE: Say = (F.ROUTE, [None, b"source", b"source"])
FROM_ANOTHER: Say = (F.ROUTE, [ELSEWHERE.encode(), b"other", b"source"])
UNREADABLE: Say = (F.ROUTE, ["ft-lanes://nowhere", b"other", b"source"])
FAILED: Say = (F.FAILED, ["a", "b"])
BYE: Say = (F.BYE, None)

# What both have said before, by where the destination is.
BEFORE: dict[str, list[tuple[bool, LaneFrame]]] = {
    "waiting": [(True, F.HELLO)],
    "planning": [(True, F.HELLO), (False, F.MANIFEST)],
    "routing": [(True, F.HELLO), (False, F.MANIFEST), (True, F.READY)],
    "moving": [(True, F.HELLO), (False, F.MANIFEST), (True, F.READY), (False, F.ROUTE)],
}


class Source:
    """A source that says its script at once, and may have gone then; and a destination's conversation with it."""

    def __init__(self, where: str, script: list[Say], *, gone: bool, timeout: timedelta, stall: timedelta) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            near = socket.create_connection(server.getsockname())
            self.socket, _ = server.accept()
        for frame, body in script:
            self.socket.sendall(encode(frame, 1, 7, 0, body))
        if gone:
            self.socket.shutdown(socket.SHUT_WR)
        protocol = LaneProtocol(Role.DESTINATION, 1, 7)
        for is_ours, frame in BEFORE[where]:
            _ = protocol.sent(frame) if is_ours else protocol.received(LaneHeader(frame, 1, 7))
        report = TransferReport("destination", "test", 7, [PeerReport(0, nbytes=3)], nbytes_kept=4)
        self.report = report
        self.told: list[Progress] = []
        session = Session(Connection(near, "127.0.0.1"), protocol)
        tally = Tally(report, self.told.append)
        self.control = ControlConnection(session, Wakeup(), SOURCE, Deadline(timeout), stall, tally)

    def heard(self) -> Script:
        """All that it was told, until the destination closed the connection."""
        self.control.close()
        return heard(self.socket, Role.SOURCE)


Make = Callable[..., Source]


@pytest.fixture
def make() -> Iterator[Make]:
    with ExitStack() as stack:

        def make(
            where: str, *script: Say, gone: bool = False, timeout: timedelta = LONG, stall: timedelta = LONG
        ) -> Source:
            made = Source(where, list(script), gone=gone, timeout=timeout, stall=stall)
            stack.callback(made.socket.close)
            stack.callback(made.control.close)
            return made

        yield make


# ------------------------------------------------------------------------------------------------ tally


def test_the_callback_is_told_what_is_new() -> None:
    told: list[Progress] = []
    report = TransferReport("destination", "test", 7, [PeerReport(2, nbytes=3)], nbytes_total=10)
    tally = Tally(report, told.append)
    tally.tell()
    tally.tell()
    report.nbytes_kept = 4
    tally.tell()
    assert told == [Progress("destination", 7, 2, 3, 10), Progress("destination", 7, 2, 7, 10)]
    assert tally.nbytes == 7


def test_nothing_is_told_before_there_is_something() -> None:
    told: list[Progress] = []
    Tally(TransferReport("destination", "test", 7, [PeerReport(2)]), told.append).tell()
    assert told == []


# ------------------------------------------------------------------------------------------------ agree


@pytest.mark.parametrize("script", [[MANIFEST], [WAIT, WAIT, MANIFEST]], ids=["at once", "after a while"])
def test_what_the_source_offers(make: Make, script: list[Say]) -> None:
    header, body = make("waiting", *script).control.await_manifest()
    assert (header.frame, body) == (F.MANIFEST, b"manifest")


@pytest.mark.parametrize(
    ("script", "how", "error", "text"),
    [
        ([FAILED], {}, GaveUp, "the source gave up: a; b"),
        ([WAIT, FAILED], {}, GaveUp, "the source gave up: a; b"),
        ([WAIT], {"gone": True}, PeerFailure, "closed by the peer"),
        ([], {"timeout": NONE}, TransferTimeout, "timed out after 0 s$"),
        ([WAIT], {"timeout": NONE}, TransferTimeout, "the source is there and has not begun to send"),
        ([], {"stall": NONE}, PeerStalled, "the source has been silent for 0 s"),
    ],
    ids=["it gives up", "it gives up later", "gone", "nobody in time", "there, and too late", "silent"],
)
def test_why_nothing_is_offered(
    make: Make, script: list[Say], how: dict[str, Any], error: type[TransferError], text: str
) -> None:
    it = make("waiting", *script, **how)
    it.control.wakeup.wake()  # so that it looks at once, and not when the next heartbeat is due
    with pytest.raises(error, match=text) as info:
        it.control.await_manifest()
    assert type(info.value) is error


@pytest.mark.parametrize("wait", [True, False])
def test_why_a_state_is_refused(make: Make, wait: bool) -> None:
    it = make("planning")
    it.control.refuse("it does not fit", wait=wait)
    assert it.heard() == [(F.REFUSE, 0, ("it does not fit",))]


def test_where_those_behind_can_fetch_it(make: Make) -> None:
    it = make("planning")
    it.control.send_ready("somewhere", b"relay")
    assert it.heard() == [(F.READY, 0, ("somewhere", b"relay"))]


# ------------------------------------------------------------------------------------------------- move

HERE = Route(SOURCE._replace(addresses=("127.0.0.1",)), b"source", from_source=True)
THERE = Route(ELSEWHERE, b"other", from_source=False)


@pytest.mark.parametrize(
    ("script", "route", "num_refused"),
    [
        ([FROM_SOURCE], HERE, 0),
        ([WAIT, FROM_ANOTHER], THERE, 0),
        ([UNREADABLE, FROM_SOURCE], HERE, 1),
        ([UNREADABLE, UNREADABLE, FROM_ANOTHER], THERE, 2),
    ],
    ids=["the source, where it has answered", "another", "one that cannot be read", "two of them"],
)
def test_whom_to_fetch_from(
    make: Make, script: list[Say], route: Route, num_refused: int, caplog: pytest.LogCaptureFixture
) -> None:
    """What another destination says of itself may be of another version: that is not the source's fault."""
    it = make("routing", *script)
    with caplog.at_level(logging.WARNING, "ft_transport"):
        assert it.control.await_route() == route
    assert it.control.from_source == HERE
    asked = [body for frame, _, body in it.heard() if frame is F.REROUTE]
    assert [(ident, slow) for ident, _, slow in asked] == num_refused * [(b"other", False)]
    assert [reason in caplog.text for _, reason, _ in asked] == num_refused * [True]


@pytest.mark.parametrize(
    ("script", "gone", "error"),
    [([FAILED], False, GaveUp), ([], True, PeerFailure), ([WAIT], True, PeerFailure), ([BYE], False, TransferError)],
    ids=["it gives up", "gone", "gone later", "out of order"],
)
def test_without_a_word_of_the_source_there_is_no_route(
    make: Make, script: list[Say], gone: bool, error: type[TransferError]
) -> None:
    with pytest.raises(error):
        make("routing", *script, gone=gone).control.await_route()


@pytest.mark.parametrize(
    ("named", "slow", "another"),
    [(FROM_ANOTHER, True, False), (FROM_ANOTHER, False, True), (FROM_SOURCE, True, True), (FROM_SOURCE, False, True)],
    ids=["nobody is better", "the same again, which may mend it", "the source is better", "the source is left"],
)
def test_another_supplier_is_asked_for(make: Make, named: Say, slow: bool, another: bool) -> None:
    it = make("moving", named)
    found = it.control.ask(THERE, "the reason", slow=slow)
    assert found == (None if not another else HERE if named is FROM_SOURCE else THERE)
    assert it.heard()[0] == (F.REROUTE, 0, (b"other", "the reason", slow))


@pytest.mark.parametrize(("beat", "said"), [(control.HEARTBEAT, []), (NONE, [F.PROGRESS])], ids=["just", "a while ago"])
def test_who_has_just_agreed_need_not_say_that_it_is_alive(
    make: Make, monkeypatch: pytest.MonkeyPatch, beat: timedelta, said: list[F]
) -> None:
    """The source looks through all of its state whenever it hears so, and lets nobody in meanwhile."""
    monkeypatch.setattr(control, "HEARTBEAT", beat)
    it = make("planning")
    it.control.send_ready("", b"")
    it.control.pump(NONE)
    assert [frame for frame, *_ in it.heard()] == [F.READY, *said]


def test_it_is_alive_and_says_how_far_it_is_no_oftener_than_it_must(make: Make) -> None:
    it = make("moving", WAIT)
    for _ in range(3):
        it.control.pump(NONE)
    assert [now.nbytes_done for now in it.told] == [NBYTES]
    assert it.control.lost is None
    assert it.heard() == [(F.PROGRESS, NBYTES, None)]


@pytest.mark.parametrize(
    ("script", "how"),
    [([], {"gone": True}), ([], {"stall": NONE}), ([BYE], {})],
    ids=["gone", "silent", "out of order"],
)
def test_a_source_that_is_lost_is_noted(make: Make, script: list[Say], how: dict[str, Any]) -> None:
    """Another destination may have everything, so bytes go on moving; and the caller is told of them."""
    it = make("moving", *script, **how)
    it.control.pump(NONE)
    lost = it.control.lost
    assert lost is not None
    it.report.peers[0].nbytes += 1
    it.control.pump(NONE)
    assert it.control.lost is lost
    assert [now.nbytes_done for now in it.told] == [NBYTES, NBYTES + 1]


@pytest.mark.parametrize(
    ("script", "timeout", "error"),
    [([FAILED], LONG, GaveUp), ([], NONE, TransferTimeout)],
    ids=["it gives up", "the deadline"],
)
def test_what_ends_a_receive_while_bytes_move(
    make: Make, script: list[Say], timeout: timedelta, error: type[TransferError]
) -> None:
    it = make("moving", *script, timeout=timeout)
    with pytest.raises(error):
        it.control.pump(NONE)
    assert it.control.lost is None


# --------------------------------------------------------------------------------------------- heartbeats


def beating() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ft_transport-heartbeat"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "HEARTBEAT", timedelta(milliseconds=1))


@pytest.mark.usefixtures("quick")
def test_who_is_busy_says_so_as_long_as_it_is(make: Make) -> None:
    it = make("planning")
    it.socket.settimeout(10)
    beat = encode(F.PROGRESS, 1, 7, NBYTES)
    with it.control.heartbeats(), it.socket.makefile("rb") as said:
        assert said.read(2 * len(beat)) == 2 * beat
    assert len(beating()) == 1, "the same for all blocks"
    it.socket.settimeout(0.05)
    while True:  # those that were on their way
        try:
            it.socket.recv(1 << 10)
        except TimeoutError:
            break
    with it.control.heartbeats(), it.socket.makefile("rb") as said:
        it.socket.settimeout(10)
        assert said.read(len(beat)) == beat
        assert len(beating()) == 1
    it.control.close()
    assert not beating()


@pytest.mark.usefixtures("quick")
def test_nobody_speaks_before_the_source_has_begun(make: Make) -> None:
    it = make("waiting", WAIT)
    with it.control.heartbeats():
        until(lambda: it.control.session.connection.idle)  # a heartbeat has heard WAIT
        until(beating)
    assert it.heard() == []


@pytest.mark.usefixtures("quick")
def test_a_manifest_that_comes_while_this_side_is_busy(make: Make) -> None:
    it = make("waiting", WAIT)
    it.socket.settimeout(10)
    beat = encode(F.PROGRESS, 1, 7, NBYTES)
    with it.control.heartbeats(), it.socket.makefile("rb") as said:
        it.socket.sendall(encode(F.MANIFEST, 1, 7, 0, b"manifest"))
        assert said.read(2 * len(beat)) == 2 * beat
    assert it.control.is_offered()
    header, body = it.control.await_manifest()
    assert (header.frame, body) == (F.MANIFEST, b"manifest")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("script", "gone", "error"),
    [([WAIT, FAILED], False, GaveUp), ([WAIT], True, PeerFailure)],
    ids=["gives up", "gone"],
)
def test_a_source_that_ends_while_this_side_is_busy(
    make: Make, script: list[Say], gone: bool, error: type[TransferError]
) -> None:
    it = make("waiting", *script, gone=gone)
    with it.control.heartbeats():
        until(lambda: not beating())
    assert not it.control.is_offered()
    with pytest.raises(error) as info:
        it.control.await_manifest()
    assert type(info.value) is error


def test_who_ends_waits_a_moment_for_something_to_refuse(make: Make) -> None:
    it = make("waiting", WAIT)
    later = threading.Timer(0.1, it.socket.sendall, [encode(F.WAIT, 1, 7) + encode(F.MANIFEST, 1, 7, 0, b"manifest")])
    later.start()
    assert it.control.is_offered()
    later.join()


def test_who_ends_waits_no_longer_than_a_moment(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_LAST_WORDS", timedelta(milliseconds=20))
    assert not make("waiting", WAIT).control.is_offered()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("how", ["is offered", "refuse", "failed"])
def test_nobody_speaks_beside_one_who_was_interrupted(make: Make, how: str) -> None:
    """Ctrl-C may come when a block was entered and is not left."""
    it = make("waiting", MANIFEST) if how == "is offered" else make("planning")
    it.control.heartbeats().__enter__()
    until(beating)
    if how == "is offered":
        assert it.control.is_offered()
    elif how == "refuse":
        it.control.refuse("interrupted", wait=False)
    else:
        it.control.send_failed("interrupted", refused=True, late=True)
    assert not beating()


@pytest.mark.usefixtures("quick")
def test_who_finds_the_source_gone_leaves_that_to_the_next_one_to_talk(make: Make) -> None:
    it = make("planning")
    it.control.session.connection.abort()
    with it.control.heartbeats():
        until(lambda: not beating())
    assert it.control.lost is None


@pytest.mark.usefixtures("quick")
def test_a_source_that_is_lost_is_told_nothing(make: Make) -> None:
    it = make("moving", gone=True)
    it.control.pump(NONE)
    with it.control.heartbeats():
        assert not beating()


# -------------------------------------------------------------------------------------------------- end

SAID: Script = [(F.DONE, NBYTES, None)]


@pytest.mark.parametrize("verified", [True, False])
@pytest.mark.parametrize(
    ("script", "gone", "error"),
    [
        ([BYE], False, None),
        ([WAIT, WAIT, BYE], False, None),
        ([FAILED], False, GaveUp),
        ([WAIT, FAILED], False, GaveUp),
        ([], True, PeerFailure),
        ([WAIT], True, PeerFailure),
        ([MANIFEST], False, TransferError),
    ],
    ids=["it agrees", "later", "it has changed", "which is found later", "gone", "gone later", "out of order"],
)
def test_what_is_here_is_the_sources_state_if_it_agrees_or_cannot_say(
    make: Make,
    script: list[Say],
    gone: bool,
    error: type[TransferError] | None,
    verified: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Digests that agree are the source's word already; without them only the source knows."""
    it = make("moving", *script, gone=gone)
    is_fatal = error is GaveUp or (error is not None and not verified)
    with caplog.at_level(logging.WARNING, "ft_transport"), ExitStack() as stack:
        if is_fatal and error is not None:
            stack.enter_context(pytest.raises(error))
        it.control.send_done(verified=verified)
    assert ("could not be told that its state arrived" in caplog.text) is (error is not None and not is_fatal)
    assert [now.nbytes_done for now in it.told] == [NBYTES]
    assert it.heard() == SAID


@pytest.mark.parametrize("verified", [True, False])
def test_a_source_that_was_lost_is_not_asked(make: Make, verified: bool) -> None:
    it = make("moving", BYE)
    lost = it.control.lost = PeerFailure("lost")
    if verified:
        it.control.send_done(verified=True)
    else:
        with pytest.raises(PeerFailure) as info:
            it.control.send_done(verified=False)
        assert info.value is lost
    assert it.heard() == []


@pytest.mark.parametrize("verified", [True, False])
def test_a_source_is_waited_for_as_long_as_its_word_matters(
    make: Make, verified: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(control, "_LAST_WORDS", NONE)
    it = make("moving", WAIT, BYE)
    with caplog.at_level(logging.WARNING, "ft_transport"):
        it.control.send_done(verified=verified)
    assert ("has been silent for 0 s" in caplog.text) is verified


@pytest.mark.parametrize("refused", [True, False])
@pytest.mark.parametrize("late", [True, False])
def test_why_this_side_gives_up(make: Make, refused: bool, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[timedelta] = []
    monkeypatch.setattr(Connection, "finish", lambda self, timer: waited.append(timer.deadline.timeout))
    it = make("moving")
    it.control.send_failed("no more", refused=refused, late=late)
    assert it.heard() == ([] if refused else [(F.FAILED, 0, ("no more",))])
    assert waited == [HEARTBEAT if late else control._LAST_WORDS]


def test_who_is_gone_need_not_be_told_why(make: Make) -> None:
    it = make("moving")
    it.control.session.connection.abort()
    it.control.send_failed("no more", refused=False, late=False)


def test_close_gives_both_descriptors_back(make: Make) -> None:
    it = make("moving")
    it.control.close()
    it.control.close()
    assert it.control.session.connection.fileno() == -1
    with pytest.raises(ValueError, match="negative"):
        it.control.wakeup.wake()
