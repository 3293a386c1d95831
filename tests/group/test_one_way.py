"""A state over a group that answers nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from helpers import CPU, difference, group_channels, noise

from ft_transport import PeerFailure, TransferError, TransferReport, TransferTimeout
from ft_transport._deadline import Deadline
from ft_transport._group.channel import GroupChannel, Pending
from ft_transport._group.control import CONTROL_TAG, FIRST_MESSAGE_TAG, FRAME_TAG
from ft_transport._group.one_way import description, land_all, send_all
from ft_transport._plan.compare import Targets
from ft_transport._plan.destination import DestinationPlan
from ft_transport._plan.source import place
from ft_transport._state.describe import describe
from ft_transport._telemetry.report import PeerReport
from ft_transport._wire.layout import Limits, lay_out

LIMITS = Limits(message_bytes=256, flight_bytes=256, pack_below=64, pack_from=3, window=2)


def deadline() -> Deadline:
    return Deadline(timedelta(seconds=10))


def run(state: object, *, goes: bool = False) -> tuple[Any, TransferError | None, PeerReport, TransferReport]:
    """The state that arrives, what went wrong at the source, what it says of its peer, and the destination's report.

    Args:
        state: That is sent.
        goes: Whether the destination goes once it has the description.
    """
    _, (near, far) = group_channels()
    manifest, tensors = describe(state)
    layout = lay_out(manifest, LIMITS)
    peer = PeerReport(1)
    received = TransferReport("destination", "test", None, [PeerReport(0)])
    landing = DestinationPlan(manifest, layout, {}, Targets.none(), CPU, received)
    result: list[object] = []

    def receive() -> None:
        length, data = torch.zeros(1, dtype=torch.int64), torch.zeros(4, dtype=torch.uint8)
        for tensor, tag in ((length, CONTROL_TAG), (data, FRAME_TAG)):
            far.wait(far.recv(tensor, tag), deadline())
        assert (length.item(), bytes(data.tolist())) == (4, b"text")
        if goes:
            far.abort()
            return
        land_all(far, layout, landing, CPU, deadline(), received)
        result.append(landing.rebuild())

    thread = threading.Thread(target=receive)
    thread.start()
    placement, error = place(manifest, layout, tensors, CPU), None
    try:
        send_all(near, description(b"text", CPU), layout, placement, CPU, deadline(), peer)
    except TransferError as exc:
        error = exc
    thread.join(10)
    return (result or [None])[0], error, peer, received


def test_more_staged_messages_than_there_are_buckets() -> None:
    """Each bucket is used again and again, and never before what it held has left."""
    state = {
        "large": noise(1000, 1),
        "gaps": [noise((16, 8), i)[:, :4] for i in range(9)],
        "small": [noise(3, 20 + i) for i in range(40)],
        "step": 7,
    }
    result, error, peer, received = run(state)
    assert difference(result, state) == ""
    assert error is None
    assert received.nbytes_staged == 40 * 12, "new memory has no gaps"
    nbytes = 4000 + 9 * 256 + 40 * 12
    assert (peer.outcome, peer.phase, peer.nbytes, received.peers[0].nbytes) == ("complete", "move", nbytes, nbytes)


def test_memory_is_provided_before_its_message_is_posted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[str]()
    recv = GroupChannel.recv

    def noted(self: GroupChannel, tensor: torch.Tensor, tag: int) -> Pending:
        if tag >= FIRST_MESSAGE_TAG:
            seen.append(f"post {tag - FIRST_MESSAGE_TAG}")
        return recv(self, tensor, tag)

    monkeypatch.setattr(GroupChannel, "recv", noted)
    monkeypatch.setattr(DestinationPlan, "provide", lambda _, message, *, ahead: seen.append(f"provide {message}"))
    state = {"w": noise(100, 1)}
    received, error, _, _ = run(state)
    assert error is None
    assert difference(state, received) == ""
    assert seen == ["provide 0", "post 0", "provide 1", "post 1"]


def test_a_destination_that_goes_is_the_error_and_nothing_more_is_posted_to_it() -> None:
    _, error, peer, _ = run({"w": [noise(1000, i) for i in range(8)]}, goes=True)
    assert isinstance(error, PeerFailure)
    assert (peer.outcome, peer.phase, peer.nbytes) == ("dead", "move", 0)
    assert peer.nbytes_wire <= 12, "the description at the most, and nothing that was only posted"
    assert peer.reason == error.message


class Late:
    """Streams of a device whose copies are not over in time."""

    cross = True

    def begun(self) -> Late:
        return self

    def finish(self) -> None:
        raise TransferTimeout("timed out: copies are not over")


@pytest.mark.parametrize("error", [TransferTimeout("timed out"), KeyboardInterrupt()], ids=["device", "Ctrl-C"])
def test_what_ends_this_side_alone_breaks_the_channel(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the destination would wait on, and what is posted would go on."""
    monkeypatch.setattr(Late, "finish", raising(error))
    _, (near, far) = group_channels()
    manifest, tensors = describe({"w": [noise(1000, i) for i in range(4)]})
    layout, peer = lay_out(manifest, LIMITS), PeerReport(1)
    streams: Any = Late()
    with pytest.raises(type(error)):
        send_all(
            near,
            description(b"text", CPU),
            layout,
            place(manifest, layout, tensors, CPU),
            CPU,
            deadline(),
            peer,
            streams,
        )
    assert near.broken
    assert peer.outcome in ("timed out", "failed")
    with pytest.raises(PeerFailure):
        far.wait(far.recv(torch.zeros(256, dtype=torch.uint8), FIRST_MESSAGE_TAG), deadline())


def raising(error: BaseException) -> Callable[[object], None]:
    def finish(_: object) -> None:
        raise error

    return finish


@pytest.mark.parametrize("data", [b"x", bytes(1000)])
def test_the_description_goes_after_its_length(data: bytes) -> None:
    length, body = description(data, CPU)
    assert length.tolist() == [len(data)]
    assert length.dtype is torch.int64
    assert bytes(body.tolist()) == data
