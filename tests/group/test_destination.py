"""The destination's side of a transfer: what it refuses, and what its memory holds after an error."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from helpers import CPU, SMALL, noise, snapshot, succeed, transfer

from ft_transport import PeerFailure, RemoteProtocolError, TransferReport, TransferTimeout
from ft_transport._deadline import Deadline
from ft_transport._group.ahead import Ahead
from ft_transport._group.control import FIRST_MESSAGE_TAG, Control
from ft_transport._group.destination import receive
from ft_transport._options import Options
from ft_transport._plan.destination import DestinationPlan
from ft_transport._state.describe import describe
from ft_transport._telemetry.report import PeerReport
from ft_transport._wire.digest import digest_bytes
from ft_transport._wire.encode import encode_manifest
from ft_transport._wire.frames import Frame, ManifestHeader, encode_frame
from ft_transport._wire.layout import Limits
from ft_transport.testing import memory_channels

STATE = {"w": noise(50, 1), "n": 3}
MANIFEST = encode_manifest(describe(STATE)[0], ManifestHeader(7, Limits(), "xxh3"))


def received(say: Callable[[Control], object], template: Any = None) -> tuple[PeerReport, Any, Any]:
    """The report, what was raised, and what the source heard."""
    near, far = memory_channels()
    report = TransferReport("destination", "test", 7, [PeerReport(0)])
    heard: list[Any] = []

    def run() -> None:
        try:
            heard.append(say(Control(near, CPU, Deadline(timedelta(seconds=10)))))
        except Exception as exc:
            heard.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    error = None
    try:
        receive(far, 7, template, SMALL, Deadline(timedelta(seconds=10)), report)
    except Exception as exc:
        error = exc
    thread.join(10)
    assert far.num_posted == 0
    assert far.broken, "nobody shall wait for this replica in the step"
    return report.peers[0], error, heard[0]


def says(data: bytes, frame: Frame = Frame.READY) -> Callable[[Control], object]:
    def say(control: Control) -> object:
        control.send_frame(data)
        return control.recv_frame(frame)

    return say


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (
            encode_manifest(describe(STATE)[0], ManifestHeader(8, Limits(), "xxh3")),
            "expected step 7, source has step 8",
        ),
        (
            encode_manifest(describe(STATE)[0], ManifestHeader(None, Limits(), "xxh3")),
            "expected step 7, source has step None",
        ),
        (encode_manifest(describe(STATE)[0], ManifestHeader(7, Limits(), "crc")), "expected a digest of"),
        (encode_frame(Frame.MANIFEST, [1, 2]), "damaged"),
        (b"HTTP/1.1 200 OK", "expected"),
    ],
    ids=["another step", "no step", "another digest", "no manifest", "another protocol"],
)
def test_what_is_refused_before_anything_moves(data: bytes, error: str) -> None:
    template = {"w": noise(50, 2), "n": 0}
    before = snapshot(template)
    peer, raised, heard = received(says(data), lambda: template)
    assert isinstance(raised, RemoteProtocolError)
    assert error in raised.message
    assert isinstance(heard, RemoteProtocolError)
    assert raised.message in heard.message, "the source's log says why, too"
    assert peer.outcome == "refused"
    assert snapshot(template) == before


def test_a_source_that_cannot_describe_its_state_is_no_refusal() -> None:
    def say(control: Control) -> None:
        control.send_frame(encode_frame(Frame.FAILED, ["a: a generator cannot travel"]))
        control.flush()

    peer, raised, _ = received(say)
    assert isinstance(raised, PeerFailure)
    assert "a: a generator cannot travel" in raised.message
    assert peer.outcome == "failed"


def test_it_says_what_it_has_read() -> None:
    """A description that was damaged on the way may still be one: the source compares."""
    _, raised, heard = received(lambda control: (says(MANIFEST)(control), control.channel.abort()))
    assert heard[0] == (digest_bytes(MANIFEST),)
    assert isinstance(raised, PeerFailure)


@pytest.mark.parametrize("shadow", [False, True])
def test_digests_that_do_not_agree(shadow: bool) -> None:
    """In place the template holds a mix then, and says so; beside it, it is as it was."""
    state, template = {"w": noise(700, 1), "v": noise(400, 2)}, {"w": noise(700, 3), "v": noise(400, 4)}
    before = snapshot(template)
    near, far = memory_channels()
    send = near.send

    def damaging(tensor: Any, tag: int) -> Any:
        if tag == 4:  # the second message
            tensor = tensor.clone()
            tensor[5] ^= 1
        return send(tensor, tag)

    near.send = damaging  # type: ignore[method-assign]
    options = type(SMALL)(CPU, verify=True, shadow=shadow) if shadow else SMALL
    ends = transfer(state, lambda: template, options=SMALL, destination_options=options, channels=(near, far))
    assert isinstance(ends.destination.error, RemoteProtocolError)
    assert "1 of" in ends.destination.text
    assert (snapshot(template) == before) == shadow
    assert ends.destination.report.torn == (not shadow)
    assert isinstance(ends.source.error, PeerFailure | RemoteProtocolError)


def test_options_are_the_receivers_but_for_the_wire() -> None:
    """The source's header says how messages are cut and digested; a destination that would choose otherwise follows."""
    ends = transfer({"w": noise(700, 1)}, options=SMALL, destination_options=Options(CPU, verify=False))
    assert ends.destination.error is None
    assert ends.destination.report.num_messages == 3


# -------------------------------------------------------------------------------------- fresh memory


@dataclass(frozen=True)
class Megabytes(Options):
    """Messages and flights of 1 MiB, of which many may be under way."""

    def limits(self, nbytes: int) -> Limits:
        return Limits(message_bytes=1 << 20, flight_bytes=1 << 20, pack_below=256 << 10, pack_from=2, window=32)


@pytest.fixture
def provided(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Messages whose memory was provided, as it is on a system whose pages come slowly."""
    done: list[int] = []
    provide = DestinationPlan.provide

    def noted(self: DestinationPlan, message: int, *, ahead: bool) -> None:
        provide(self, message, ahead=ahead)
        done.append(message)

    monkeypatch.setattr(DestinationPlan, "provide", noted)
    monkeypatch.setattr("ft_transport._plan.pages._AT_HAND_S", 0.0)
    return done


def test_fresh_memory_is_there_before_its_message_is_posted(provided: list[int]) -> None:
    near, far = memory_channels()
    recv, missing = far.recv, []

    def noted(tensor: Any, tag: int) -> Any:
        message = tag - FIRST_MESSAGE_TAG
        # The descriptions of what comes have a tag of their own, and length.
        if tensor.numel() == 1 << 20 and message not in provided:
            missing.append(message)
        return recv(tensor, tag)

    far.recv = noted  # type: ignore[method-assign]
    state = {"w": noise(6 << 18, 1), "small": [noise(50, 2), noise(60, 3)]}
    ends = succeed(state, options=Megabytes(CPU, verify=True), channels=(near, far))
    assert sorted(provided) == list(range(ends.destination.report.num_messages))
    assert missing == []
    assert not [thread for thread in threading.enumerate() if thread.name == "ft_transport-pages"]


def test_in_place_nothing_is_provided(provided: list[int]) -> None:
    state, template = {"w": noise(2 << 18, 1)}, {"w": noise(2 << 18, 2)}
    succeed(state, lambda: template, options=Megabytes(CPU, verify=True))
    assert provided == []


def test_a_deadline_that_passes_while_memory_is_provided(monkeypatch: pytest.MonkeyPatch) -> None:
    """The transfer is over then; the thread that provides is waited for."""
    over, providing = threading.Event(), []
    raised: list[bool] = []

    def stuck(self: DestinationPlan, message: int, *, ahead: bool) -> None:
        providing.append(message)
        raised.append(over.wait(10))

    await_memory = Ahead.await_memory

    def noted(self: Ahead, flight: int, deadline: Deadline) -> None:
        try:
            await_memory(self, flight, deadline)
        finally:
            over.set()

    monkeypatch.setattr(DestinationPlan, "provide", stuck)
    monkeypatch.setattr(Ahead, "await_memory", noted)
    state = {"w": noise(6 << 18, 1)}
    ends = transfer(state, options=Megabytes(CPU), destination_timeout=timedelta(milliseconds=200))
    assert isinstance(ends.destination.error, TransferTimeout)
    assert ends.destination.peer.phase == "move"
    assert isinstance(ends.source.error, PeerFailure)
    assert all(raised)
    assert len(providing) <= 4, "what nobody waits for any more is not provided"
    assert not [thread for thread in threading.enumerate() if thread.name == "ft_transport-pages"]
