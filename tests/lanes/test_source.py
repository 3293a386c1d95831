"""A source over lanes, and destinations that say what they are told to, over real connections."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from helpers import CPU, noise, pace, until

from ft_transport import LaneTransport, PeerFailure
from ft_transport._deadline import Deadline
from ft_transport._lanes.protocol import Conversation, Frame, Role, encode
from ft_transport._lanes.session import Talk
from ft_transport._net.dial import dial
from ft_transport._net.endpoint import Invitation
from ft_transport._net.stall import Patience

TIMEOUT = timedelta(seconds=20)
STEP = 7
STATE = {"weight": noise(1000, 1)}
ELSEWHERE = Invitation(("127.0.0.1",), 9, bytes(32), False)


def patience(seconds: float = 10) -> Patience:
    return Patience(Deadline(timedelta(seconds=seconds)))


class Guest:
    """A destination. Its relay, if it has one, is nowhere."""

    def __init__(self, source: LaneTransport[Any], identity: bytes, attempt: int = 1) -> None:
        invitation = Invitation.decode(source.metadata())._replace(addresses=("127.0.0.1",))
        hello = encode(Frame.HELLO, attempt, STEP, body=[identity, "guest"])
        self.connection = dial(invitation, hello, patience(), None)
        conversation = Conversation(Role.DESTINATION, attempt, STEP)
        conversation.sent(Frame.HELLO)
        self.talk = Talk(self.connection, conversation)
        self.relay = secrets.token_bytes(16)

    def hear(self, frame: Frame) -> Any:
        """The body of the next frame but for those that only say that the source is there."""
        while True:
            header, body = self.talk.hear(patience())
            if header.frame is not Frame.WAIT:
                assert header.frame is frame, (header.frame, body)
                return body

    def be_ready(self, relays: bool = True) -> Any:
        """Agree to the state; gives where to fetch it."""
        self.hear(Frame.MANIFEST)
        body = [ELSEWHERE.encode(), self.relay, b""] if relays else ["", b"", b""]
        self.talk.say(Frame.READY, patience(), body=body)
        return self.hear(Frame.ROUTE)


@pytest.fixture
def source() -> Iterator[LaneTransport[Any]]:
    made: LaneTransport[Any] = LaneTransport(TIMEOUT, CPU, host="127.0.0.1")
    yield made
    made.shutdown()


@pytest.fixture
def come(source: LaneTransport[Any]) -> Iterator[Callable[..., Guest]]:
    """Lets a destination come."""
    with contextlib.ExitStack() as stack:

        def come(identity: bytes = b"", attempt: int = 1) -> Guest:
            guest = Guest(source, identity or secrets.token_bytes(16), attempt)
            stack.callback(guest.connection.close)
            return guest

        yield come


def outcomes(source: LaneTransport[Any]) -> list[str]:
    assert source.last_report is not None
    return [peer.outcome for peer in source.last_report.peers]


def test_who_has_failed_supplies_nobody(source: LaneTransport[Any], come: Callable[..., Guest]) -> None:
    """Those behind would dial a process that is gone, or frozen, and wait."""
    source.send_checkpoint([1, 2, 3, 4], STEP, STATE, TIMEOUT)
    first = come()
    assert first.be_ready()[0] is None
    second = come()
    assert second.be_ready()[:2] == (ELSEWHERE.encode(), first.relay)
    second.connection.close()
    until(lambda: outcomes(source).count("dead") == 1)
    assert come().be_ready(relays=False)[:2] == (ELSEWHERE.encode(), first.relay)
    first.talk.say(Frame.FAILED, patience(), body=["no more"])
    first.connection.close()
    until(lambda: outcomes(source).count("failed") == 1)
    assert come().be_ready()[0] is None


def test_whoever_comes_again_is_served_in_place_of_the_earlier_visit(
    source: LaneTransport[Any], come: Callable[..., Guest]
) -> None:
    """The earlier one is cut, which nobody would miss for long, and the report has one entry for both."""
    identity = secrets.token_bytes(16)
    source.send_checkpoint([1], STEP, STATE, TIMEOUT)
    earlier = come(identity, attempt=1)
    earlier.be_ready()
    again = come(identity, attempt=2)
    again.be_ready()
    with pytest.raises(PeerFailure):
        earlier.connection.read(1, patience(3))
    assert outcomes(source) == ["pending"]


@pytest.mark.parametrize("when", ["planning", "moving", "talking on"])
def test_the_sources_deadline_is_told(source: LaneTransport[Any], come: Callable[..., Guest], when: str) -> None:
    """Whether the destination is silent or goes on talking: it has a reason, and need not wait for its own deadline."""
    source.send_checkpoint([1], STEP, STATE, timedelta(seconds=0.4))
    guest = come()
    if when == "moving":
        guest.be_ready()
    else:
        guest.hear(Frame.MANIFEST)
    while when == "talking on" and guest.connection.idle:
        guest.talk.say(Frame.PROGRESS, patience())
        pace(0.001)  # much more often than the source would look at its clock by itself
    assert "timed out after 0.4 s" in "; ".join(guest.hear(Frame.FAILED))
    guest.connection.close()
    until(lambda: outcomes(source) == ["timed out"])
