"""The source's side of a transfer with one destination: what it says, and what it makes of the answers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from helpers import CPU, SMALL, noise

from ft_transport import LocalProtocolError, PeerFailure, RemoteProtocolError, TransferReport, TransferTimeout
from ft_transport._deadline import Deadline
from ft_transport._group.control import FIRST_MESSAGE_TAG, Control
from ft_transport._group.source import send_failure, serve
from ft_transport._plan.source import SourcePlan
from ft_transport._telemetry.report import PeerReport
from ft_transport._wire.digest import digest_bytes
from ft_transport._wire.frames import Frame, decode_frame, encode_frame
from ft_transport.testing import memory_channels

STATE = {"large": noise(700, 1), "small": [noise(3, 2 + i) for i in range(6)]}


class Destination:
    """Says what it is told to."""

    def __init__(self, outbound: SourcePlan, channel: Any) -> None:
        self.outbound = outbound
        self.control = Control(channel, CPU, Deadline(timedelta(seconds=10)))
        self.messages: list[bytes] = []

    def agree(self, digest: int | None = None) -> None:
        data = self.control.recv_bytes()
        self.control.send_frame(encode_frame(Frame.READY, [digest_bytes(data) if digest is None else digest]))

    def take(self, begin: int = 0, end: int | None = None, *, answer: bool = True) -> None:
        """Receive these flights."""
        channel = self.control.channel
        for flight in range(len(self.outbound.layout.flights))[begin:end]:
            for message in self.outbound.layout.flights[flight]:
                data = torch.empty(self.outbound.layout.sizes[message], dtype=torch.uint8)
                channel.wait(channel.recv(data, FIRST_MESSAGE_TAG + message), self.control.deadline)
                self.messages.append(bytes(data.tolist()))
            self.control.recv_signal(flight)
            if answer:
                channel.wait(self.control.send_signal(flight), self.control.deadline)

    def confirm(self) -> tuple[Any, ...]:
        digests = self.control.recv_frame(Frame.DIGESTS)
        self.control.send_frame(encode_frame(Frame.DONE, []))
        self.control.flush()
        return digests


def served(act: Callable[[Destination], object], state: object = STATE) -> tuple[PeerReport, Any, list[Any]]:
    """The report on a destination that acts so, what serving it raised, and what acting gave."""
    near, far = memory_channels()
    report = TransferReport("source", "test", 7, [PeerReport(1)])
    outbound = SourcePlan(state, 7, SMALL, report)
    given, error = list[Any](), None

    def run() -> None:
        try:
            given.append(act(Destination(outbound, far)))
        except Exception as exc:
            given.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        serve(near, outbound, Deadline(timedelta(seconds=10)), report.peers[0])
    except Exception as exc:
        error = exc
    thread.join(10)
    assert near.num_posted == 0
    return report.peers[0], error, given


def test_what_a_destination_gets() -> None:
    def act(destination: Destination) -> tuple[Any, ...]:
        destination.agree()
        destination.take()
        return b"".join(destination.messages), destination.confirm()

    peer, error, [(data, digests)] = served(act)
    assert error is None
    assert peer.outcome == "complete"
    assert data == b"".join(bytes(t.view(torch.uint8).tolist()) for t in (STATE["large"], *STATE["small"]))
    assert peer.nbytes == len(data)
    assert len(digests) == len(set(digests)) > 3


def test_no_more_flights_are_under_way_than_the_window_has() -> None:
    """A destination has memory for so many; on an accelerator one more would wait for itself."""

    def act(destination: Destination) -> object:
        destination.agree()
        destination.take(0, 2, answer=False)
        destination.control.deadline = Deadline(timedelta(milliseconds=50))
        return destination.take(2)

    _, error, [third] = served(act)
    assert isinstance(third, TransferTimeout)
    assert isinstance(error, PeerFailure)


@pytest.mark.parametrize(
    ("act", "error", "outcome"),
    [
        (lambda d: d.agree(digest=5), RemoteProtocolError, "failed"),
        (lambda d: d.control.channel.abort(), PeerFailure, "dead"),
        (lambda d: (d.agree(), d.control.channel.abort()), PeerFailure, "dead"),
        (lambda d: (d.agree(), d.take(), d.control.channel.abort()), PeerFailure, "dead"),
        (lambda d: (d.control.recv_bytes(), d.control.send_frame(encode_frame(Frame.REFUSE, ["no"])),
                    d.control.flush()), RemoteProtocolError, "refused"),
        (lambda d: (d.control.recv_bytes(), d.control.send_frame(encode_frame(Frame.DONE, [])),
                    d.control.flush()), RemoteProtocolError, "failed"),
    ],
    ids=["damaged", "gone at once", "gone when it had agreed", "gone before DONE", "refused", "out of order"],
)  # fmt: skip
def test_how_it_ends(act: Callable[[Destination], object], error: type[Exception], outcome: str) -> None:
    peer, raised, _ = served(act)
    assert isinstance(raised, error)
    assert peer.outcome == outcome
    assert peer.reason


def test_a_state_that_has_changed_meanwhile_is_void() -> None:
    """Each destination is told before it takes what it has for whole."""
    state = {"w": noise(2000, 1)}

    def act(destination: Destination) -> object:
        destination.agree()
        destination.take(0, 1)
        state["w"].add_(1)
        destination.take(1)
        return destination.confirm()

    _, raised, [told] = served(act, state)
    assert isinstance(raised, LocalProtocolError)
    assert "w" in raised.message
    assert isinstance(told, PeerFailure)
    assert raised.message in told.message


@pytest.mark.parametrize("gone", [False, True])
def test_why_there_will_be_no_state(gone: bool) -> None:
    near, far = memory_channels()
    control = Control(far, CPU, Deadline(timedelta(seconds=10)))
    heard: list[Any] = []
    if gone:
        far.abort()
    thread = threading.Thread(target=lambda: heard.append(gone or decode_frame(control.recv_bytes())))
    thread.start()
    send_failure(near, CPU, Deadline(timedelta(seconds=10)), "no leaf of this can travel")
    thread.join(10)
    assert heard == [True] if gone else heard[0][0] is Frame.FAILED
    assert near.num_posted == 0
