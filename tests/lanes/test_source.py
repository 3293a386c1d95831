"""A source over lanes, and destinations that say what they are told to, over real connections."""

from __future__ import annotations

import contextlib
import gc
import secrets
import threading
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from helpers import CPU, noise, pace, until

from ft_transport import LaneTransport, PeerFailure
from ft_transport._deadline import Deadline
from ft_transport._lanes import source as source_room
from ft_transport._lanes.messages import StateMessages
from ft_transport._lanes.protocol import LaneFrame, LaneProtocol, Role, encode
from ft_transport._lanes.session import Session
from ft_transport._net.dial import dial
from ft_transport._net.endpoint import Endpoint
from ft_transport._net.stall import StallTimer
from ft_transport.errors import LocalProtocolError, TransferError

TIMEOUT = timedelta(seconds=20)
STEP = 7
STATE = {"weight": noise(1000, 1)}
ELSEWHERE = Endpoint(("127.0.0.1",), 9, bytes(32), False)


def timer(seconds: float = 10) -> StallTimer:
    return StallTimer(Deadline(timedelta(seconds=seconds)))


class Destination:
    """A destination. Its relay, if it has one, is nowhere."""

    def __init__(self, source: LaneTransport[Any], identity: bytes, attempt: int = 1) -> None:
        endpoint = Endpoint.decode(source.metadata())._replace(addresses=("127.0.0.1",))
        hello = encode(LaneFrame.HELLO, attempt, STEP, body=[identity, "guest"])
        self.connection = dial(endpoint, hello, timer(), None)
        protocol = LaneProtocol(Role.DESTINATION, attempt, STEP)
        protocol.sent(LaneFrame.HELLO)
        self.session = Session(self.connection, protocol)
        self.relay = secrets.token_bytes(16)

    def recv(self, frame: LaneFrame) -> Any:
        """The body of the next frame but for those that only say that the source is there."""
        while True:
            header, body = self.session.recv(timer())
            if header.frame is not LaneFrame.WAIT:
                assert header.frame is frame, (header.frame, body)
                return body

    def send_ready(self, relays: bool = True) -> Any:
        """Agree to the state; gives where to fetch it."""
        self.recv(LaneFrame.MANIFEST)
        body = [ELSEWHERE.encode(), self.relay] if relays else ["", b""]
        self.session.send(LaneFrame.READY, timer(), body=body)
        return self.recv(LaneFrame.ROUTE)


@pytest.fixture
def source() -> Iterator[LaneTransport[Any]]:
    made: LaneTransport[Any] = LaneTransport(TIMEOUT, CPU, host="127.0.0.1")
    yield made
    made.shutdown()


@pytest.fixture
def come(source: LaneTransport[Any]) -> Iterator[Callable[..., Destination]]:
    """Lets a destination come."""
    with contextlib.ExitStack() as stack:

        def come(identity: bytes = b"", attempt: int = 1) -> Destination:
            destination = Destination(source, identity or secrets.token_bytes(16), attempt)
            stack.callback(destination.connection.close)
            return destination

        yield come


def outcomes(source: LaneTransport[Any]) -> list[str]:
    assert source.last_report is not None
    return [peer.outcome for peer in source.last_report.peers]


def test_who_has_failed_supplies_nobody(source: LaneTransport[Any], come: Callable[..., Destination]) -> None:
    """Those behind would dial a process that is gone, or frozen, and wait."""
    source.send_checkpoint([1, 2, 3, 4], STEP, STATE, TIMEOUT)
    first = come()
    assert first.send_ready()[0] is None
    second = come()
    assert second.send_ready()[:2] == (ELSEWHERE.encode(), first.relay)
    second.connection.close()
    until(lambda: outcomes(source).count("dead") == 1)
    assert come().send_ready(relays=False)[:2] == (ELSEWHERE.encode(), first.relay)
    first.session.send(LaneFrame.FAILED, timer(), body=["no more"])
    first.connection.close()
    until(lambda: outcomes(source).count("failed") == 1)
    assert come().send_ready()[0] is None


def test_whoever_comes_again_is_served_in_place_of_the_earlier_visit(
    source: LaneTransport[Any], come: Callable[..., Destination]
) -> None:
    """The earlier one is cut, which nobody would miss for long, and the report has one entry for both."""
    identity = secrets.token_bytes(16)
    source.send_checkpoint([1], STEP, STATE, TIMEOUT)
    earlier = come(identity, attempt=1)
    earlier.send_ready()
    again = come(identity, attempt=2)
    again.send_ready()
    with pytest.raises(PeerFailure):
        earlier.connection.read(1, timer(3))
    assert outcomes(source) == ["pending"]


@pytest.mark.parametrize("comes", [True, False])
def test_the_collector_waits_until_the_state_is_served_but_not_for_long(
    source: LaneTransport[Any], come: Callable[..., Destination], monkeypatch: pytest.MonkeyPatch, comes: bool
) -> None:
    """What describes a state goes with it; and when it comes back, nothing of that is left to be walked through."""
    if not comes:
        monkeypatch.setattr(source_room, "NO_COLLECTION", timedelta(milliseconds=300))
    source.send_checkpoint([1], STEP, STATE, TIMEOUT)
    assert not gc.isenabled()
    store = weakref.ref(source._serving.transfer._store)  # type: ignore[union-attr, arg-type]
    if comes:
        destination = come()
        destination.send_ready()
        destination.session.send(LaneFrame.DONE, timer())
        destination.recv(LaneFrame.BYE)
        destination.connection.close()
    until(gc.isenabled)
    assert (store() is None) == comes


def test_the_collector_comes_again_in_a_call_that_waits_for_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_room, "NO_COLLECTION", timedelta(milliseconds=100))
    source: LaneTransport[Any] = LaneTransport(TIMEOUT, CPU, host="127.0.0.1", blocking=True)
    sending = threading.Thread(target=source.send_checkpoint, args=([1], STEP, STATE, TIMEOUT))
    sending.start()
    until(lambda: not gc.isenabled())
    until(gc.isenabled)
    assert sending.is_alive()
    source.shutdown()
    sending.join(10)
    assert gc.isenabled()


@pytest.mark.parametrize("when", ["planning", "moving", "talking on"])
def test_the_sources_deadline_is_told(source: LaneTransport[Any], come: Callable[..., Destination], when: str) -> None:
    """Whether the destination is silent or goes on talking: it has a reason, and need not wait for its own deadline."""
    source.send_checkpoint([1], STEP, STATE, timedelta(seconds=0.4))
    destination = come()
    if when == "moving":
        destination.send_ready()
    else:
        destination.recv(LaneFrame.MANIFEST)
    while when == "talking on" and destination.connection.idle:
        destination.session.send(LaneFrame.PROGRESS, timer())
        pace(0.001)  # much more often than the source would look at its clock by itself
    assert "timed out after 0.4 s" in "; ".join(destination.recv(LaneFrame.FAILED))
    destination.connection.close()
    until(lambda: outcomes(source) == ["timed out"])


@pytest.mark.parametrize("fails", [False, True])
def test_a_destination_gets_the_manifest_while_small_messages_are_copied(
    source: LaneTransport[Any], come: Callable[..., Destination], monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """And whom to fetch from, or why there is nothing any more."""
    destination, copy_small = come(), StateMessages.copy_small

    def copy_late(store: StateMessages) -> None:
        destination.recv(LaneFrame.MANIFEST)
        destination.session.send(LaneFrame.READY, timer(), body=["", b""])
        assert destination.recv(LaneFrame.ROUTE)[0] is None
        if fails:
            raise LocalProtocolError("memory was taken away")
        copy_small(store)

    monkeypatch.setattr(StateMessages, "copy_small", copy_late)
    if not fails:
        source.send_checkpoint([1], STEP, STATE, TIMEOUT)
        return
    with pytest.raises(LocalProtocolError, match="memory was taken away"):
        source.send_checkpoint([1], STEP, STATE, TIMEOUT)
    destination.session.send(LaneFrame.PROGRESS, timer())
    assert destination.recv(LaneFrame.FAILED) == ("memory was taken away",)
    source.disallow_checkpoint()
    report = source.last_report
    assert report is not None
    assert report.peers[0].outcome == "failed"


def test_who_refuses_at_once_is_told_of_when_the_state_is_described(
    source: LaneTransport[Any], come: Callable[..., Destination], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is told of a transfer has the time that describing took."""
    destination, copy_small = come(), StateMessages.copy_small
    seen: list[bool] = []

    def copy_late(store: StateMessages) -> None:
        destination.recv(LaneFrame.MANIFEST)
        destination.session.send(LaneFrame.REFUSE, timer(), body=["not mine"])
        with contextlib.suppress(TransferError):  # the source ends the conversation
            destination.recv(LaneFrame.BYE)
        assert source._serving.transfer is not None
        seen.append(source._serving.transfer.is_over)
        copy_small(store)

    monkeypatch.setattr(StateMessages, "copy_small", copy_late)
    source.send_checkpoint([1], STEP, STATE, TIMEOUT)
    assert seen == [False]
    source.disallow_checkpoint()
    assert source.last_report is not None
    assert source.last_report.peers[0].outcome == "refused"
