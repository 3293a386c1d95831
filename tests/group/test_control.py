"""Frames and signals between two ends."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from helpers import CPU, Recorded

from ft_transport import PeerFailure, RemoteProtocolError, TransferTimeout
from ft_transport._deadline import Deadline
from ft_transport._group.control import CONTROL_TAG, FIRST_MESSAGE_TAG, FRAME_TAG, Control
from ft_transport._wire.frames import MAX_FRAME_BYTES, Frame, encode_frame
from ft_transport.testing import MemoryChannel, memory_channels


def pair(timeout: float = 10.0) -> tuple[Control, Control, MemoryChannel, MemoryChannel]:
    left, right = memory_channels()
    deadline = Deadline(timedelta(seconds=timeout))
    return Control(left, CPU, deadline), Control(right, CPU, deadline), left, right


def number(channel: MemoryChannel, value: int) -> None:
    channel.send(torch.tensor([value]), CONTROL_TAG)


def test_a_frame_arrives() -> None:
    ours, theirs, left, right = pair()
    ours.send_frame(encode_frame(Frame.READY, ["a", 1]))
    assert list(theirs.recv_frame(Frame.READY)) == ["a", 1]
    ours.flush()
    assert left.num_posted == right.num_posted == 0


def test_a_frame_on_the_wire() -> None:
    left, right = memory_channels()
    recorded = Recorded(left)
    data = encode_frame(Frame.DONE, [])
    Control(recorded, CPU, Deadline(timedelta(seconds=1))).send_frame(data)
    assert [operation[:3] for operation in recorded.operations] == [
        ("send", CONTROL_TAG, 8),
        ("send", FRAME_TAG, len(data)),
        ("send", CONTROL_TAG, 8),
    ]
    assert (CONTROL_TAG, FRAME_TAG, FIRST_MESSAGE_TAG) == (1, 2, 3)
    right.abort()


def test_signals_arrive_in_order() -> None:
    ours, theirs, left, right = pair()
    works = [ours.send_signal(i) for i in range(3)]
    for i in range(3):
        theirs.recv_signal(i)
    for work in works:
        left.wait(work, ours.deadline)
    assert left.num_posted == right.num_posted == 0


def test_a_receive_posted_ahead() -> None:
    ours, theirs, *_ = pair()
    posted = theirs.expect()
    ours.send_signal(4)
    theirs.recv_signal(4, posted)


def test_another_signal() -> None:
    ours, theirs, *_ = pair()
    ours.send_signal(5)
    with pytest.raises(RemoteProtocolError, match="expected signal 4, got 5"):
        theirs.recv_signal(4)


def test_zero_is_neither() -> None:
    _, theirs, left, _ = pair()
    number(left, 0)
    with pytest.raises(RemoteProtocolError, match="expected signal 0"):
        theirs.recv_signal(0)
    number(left, 0)
    with pytest.raises(RemoteProtocolError, match="expected a frame"):
        theirs.recv_frame(Frame.READY)


@pytest.mark.parametrize("instead_of", ["frame", "signal"])
def test_a_peer_that_gave_up(instead_of: str) -> None:
    ours, theirs, *_ = pair()
    ours.send_frame(encode_frame(Frame.FAILED, ["no room", "sorry"]))
    with pytest.raises(PeerFailure, match="the peer gave up: no room; sorry"):
        theirs.recv_frame(Frame.READY) if instead_of == "frame" else theirs.recv_signal(0)
    assert theirs.peer_gave_up
    assert not theirs.is_over


def test_a_refusal() -> None:
    ours, theirs, *_ = pair()
    ours.send_frame(encode_frame(Frame.REFUSE, ["w: expected this"]))
    with pytest.raises(RemoteProtocolError, match="the destination refuses this state: w: expected this"):
        theirs.recv_frame(Frame.READY)
    assert theirs.is_over
    assert not theirs.peer_gave_up


@pytest.mark.parametrize("body", [None, "text", 5, [["a"], 1], []])
def test_reasons_of_any_form(body: object) -> None:
    ours, theirs, *_ = pair()
    ours.send_frame(encode_frame(Frame.FAILED, body))
    with pytest.raises(PeerFailure):
        theirs.recv_signal(0)


def test_a_frame_out_of_order() -> None:
    ours, theirs, *_ = pair()
    ours.send_frame(encode_frame(Frame.DIGESTS, []))
    with pytest.raises(RemoteProtocolError, match="out of order: DIGESTS"):
        theirs.recv_frame(Frame.DONE)


@pytest.mark.parametrize("nbytes", [MAX_FRAME_BYTES + 1, (1 << 63) - 1])
def test_a_frame_that_claims_too_much(nbytes: int) -> None:
    """Refused before memory is taken for it."""
    _, theirs, left, right = pair()
    number(left, nbytes)
    with pytest.raises(RemoteProtocolError, match="at most"):
        theirs.recv_frame(Frame.MANIFEST)
    assert right.num_posted == 0


def test_a_frame_that_ends_with_another_length() -> None:
    _, theirs, left, _ = pair()
    number(left, 5)
    left.send(torch.zeros(5, dtype=torch.uint8), FRAME_TAG)
    number(left, 6)
    with pytest.raises(RemoteProtocolError, match="a frame of 5 bytes ends with 6"):
        theirs.recv_frame(Frame.READY)


def test_flush_waits_until_the_peer_has_it() -> None:
    ours, _, left, _ = pair(0.01)
    ours.send_frame(encode_frame(Frame.READY, []))
    with pytest.raises(TransferTimeout):
        ours.flush()
    assert left.broken


def test_flush_within_a_deadline_of_its_own() -> None:
    ours, *_ = pair()
    ours.send_frame(encode_frame(Frame.READY, []))
    with pytest.raises(TransferTimeout, match=r"0\.001 s"):
        ours.flush(Deadline(timedelta(milliseconds=1)))


def test_last_words_are_heard_and_then_the_channel_is_broken() -> None:
    ours, theirs, left, right = pair()
    posted = theirs.expect()
    body = torch.empty(len(encode_frame(Frame.FAILED, ["why"])), dtype=torch.uint8)
    theirs.channel.recv(body, FRAME_TAG)
    theirs.expect()
    ours.last_words("why")
    assert int(posted[0].item()) == body.numel()
    assert left.broken
    assert left.num_posted == 0
    right.drop()


def test_last_words_to_nobody_never_raise() -> None:
    ours, _, left, right = pair()
    right.abort()
    ours.last_words("why")
    assert left.broken


def test_no_last_words_in_the_middle_of_a_frame() -> None:
    """The peer waits for so many bytes; a message of another length would abort it."""

    class Interrupted(Recorded):
        def send(self, tensor: torch.Tensor, tag: int):  # type: ignore[no-untyped-def]
            if tag == FRAME_TAG:
                raise KeyboardInterrupt
            return super().send(tensor, tag)

    left, _ = memory_channels()
    recorded = Interrupted(left)
    control = Control(recorded, CPU, Deadline(timedelta(seconds=1)))
    with pytest.raises(KeyboardInterrupt):
        control.send_frame(encode_frame(Frame.READY, []))
    control.last_words("interrupted")
    assert len(recorded.operations) == 1
    assert left.broken


def test_await_closure_returns_when_the_peer_closes() -> None:
    ours, _, _, right = pair()
    right.abort()
    ours.await_closure()
