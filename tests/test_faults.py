"""What goes wrong, at every operation and on either side: how both ends learn of it, and what they leave behind."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from helpers import (
    CPU,
    SMALL,
    Ends,
    Recorded,
    SmallOptions,
    Wrapped,
    chain,
    difference,
    group_channels,
    noise,
    num_posted,
    snapshot,
    succeed,
    transfer,
)

from ft_transport import (
    PeerFailure,
    PeerReport,
    Progress,
    RemoteProtocolError,
    TransferError,
    TransferReport,
    TransferTimeout,
    _control,
)
from ft_transport._channel import Channel, Pending
from ft_transport._codec import Frame, encode_frame
from ft_transport._control import CONTROL_TAG, FIRST_MESSAGE_TAG, FRAME_TAG, Control
from ft_transport._deadline import Deadline
from ft_transport._destination import receive
from ft_transport._layout import Limits
from ft_transport._manifest import Manifest
from ft_transport._source import tell_failure
from ft_transport.testing import FaultyChannel, memory_channels


def make(seed: int) -> dict[str, Any]:
    """Four flights: one alone, two parts of a large one, a staged one, a bucket of small ones."""
    return {
        "large": noise(300, seed),
        "strided": noise((10, 20), seed + 1).t(),
        "small": [noise(3, seed + 2 + i) for i in range(5)],
        "value": seed,
    }


def template_for() -> dict[str, Any]:
    template = make(50)
    template["strided"] = noise((20, 10), 51)
    return template


def count_operations() -> tuple[Recorded, Recorded]:
    ends = tuple(map(Recorded, memory_channels()))
    template = template_for()
    succeed(make(1), lambda: template, options=SMALL, channels=ends)  # type: ignore[arg-type]
    return ends  # type: ignore[return-value]


RECORDED = count_operations()
NUM_OPERATIONS = tuple(len(end.operations) for end in RECORDED)
SIDES = ("source", "destination")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_control, "_LAST_WORDS", timedelta(milliseconds=20))


def run(
    wrap_source: Callable[[Channel], Channel] = lambda channel: channel,
    wrap_destination: Callable[[Channel], Channel] = lambda channel: channel,
    **kwargs: Any,
) -> tuple[Ends, dict[str, Any], list[bytes]]:
    """A transfer in place over a channel that misbehaves; gives the template, and its bytes before."""
    template = template_for()
    before = snapshot(template)
    left, right = memory_channels()
    start = time.perf_counter()
    options = kwargs.pop("options", SMALL)
    channels = wrap_source(left), wrap_destination(right)
    ends = transfer(make(1), lambda: template, options=options, channels=channels, **kwargs)
    assert time.perf_counter() - start < 5, "both sides learn of it at once"
    for side in (ends.source, ends.destination):
        assert num_posted(side.channel) == 0
    return ends, template, before


def check_destination(ends: Ends, template: dict[str, Any], before: list[bytes]) -> None:
    """Complete and right, or an error; torn if a byte has changed; torn never before the first could."""
    side = ends.destination
    untouched = snapshot(template) == before
    if side.error is None:
        assert difference(side.result, make(1)) == ""
        assert not side.report.torn
        assert side.report.complete
        return
    assert isinstance(side.error, TransferError)
    assert not side.report.complete
    assert side.peer.outcome in ("refused", "failed", "dead", "timed out")
    assert side.peer.reason
    assert side.report.torn or untouched, "a mix of two states must be called torn"
    if side.peer.phase == "agree":
        assert untouched
        assert not side.report.torn
    else:
        assert side.report.torn


def kill(side: str, operation: int) -> Any:
    def wrap(channel: Channel) -> FaultyChannel:
        return FaultyChannel(channel).die_at(operation)

    return run(**{f"wrap_{side}": wrap})


# ---------------------------------------------------------------------------------------------- deaths


@pytest.mark.parametrize("operation", range(NUM_OPERATIONS[0]))
def test_the_source_dies(operation: int) -> None:
    ends, template, before = kill("source", operation)
    assert isinstance(ends.source.error, PeerFailure)
    check_destination(ends, template, before)
    # From the first part of the answer to the digests on, the state is complete at the destination.
    if operation < NUM_OPERATIONS[0] - 3:
        assert isinstance(ends.destination.error, PeerFailure)
        assert ends.destination.peer.outcome == "dead"


@pytest.mark.parametrize("operation", range(NUM_OPERATIONS[1]))
def test_the_destination_dies(operation: int) -> None:
    ends, template, before = kill("destination", operation)
    assert isinstance(ends.source.error, PeerFailure)
    assert ends.source.peer.outcome == "dead"
    assert not ends.source.report.complete
    check_destination(ends, template, before)
    if operation < NUM_OPERATIONS[1] - 3:
        assert isinstance(ends.destination.error, PeerFailure)


def test_phases_of_death_cover_all_phases() -> None:
    phases = {kill("source", operation)[0].destination.peer.phase for operation in range(NUM_OPERATIONS[0])}
    assert phases >= {"agree", "move"}


def test_an_operation_behind_the_last_one_hurts_nobody() -> None:
    ends, template, before = kill("source", NUM_OPERATIONS[0])
    assert ends.source.error is None
    check_destination(ends, template, before)
    assert ends.destination.error is None


# ------------------------------------------------------------------------------------------ corruption


def sends(side: int, wanted: Callable[[int], bool]) -> list[int]:
    operations = RECORDED[side].operations
    return [i for i, (what, tag, _, _) in enumerate(operations) if what == "send" and wanted(tag)]


def corrupt(side: str, operation: int) -> Any:
    return run(**{f"wrap_{side}": lambda channel: FaultyChannel(channel).corrupt_at(operation)})


@pytest.mark.parametrize("operation", sends(0, lambda tag: tag >= FIRST_MESSAGE_TAG))
def test_a_damaged_message_is_found_and_both_sides_are_told(operation: int) -> None:
    ends, template, before = corrupt("source", operation)
    error = ends.destination.error
    assert isinstance(error, RemoteProtocolError)
    assert "1 of" in error.message
    assert "differ from what the source sent" in error.message
    assert isinstance(ends.source.error, PeerFailure)
    assert "differ from what the source sent" in ends.source.text
    assert ends.source.peer.outcome == "failed"
    assert ends.destination.peer.phase == "verify"
    check_destination(ends, template, before)
    assert ends.destination.report.torn


@pytest.mark.parametrize("operation", sends(0, lambda tag: tag == FRAME_TAG))
def test_a_damaged_frame_of_the_source(operation: int) -> None:
    ends, template, before = corrupt("source", operation)
    assert isinstance(ends.destination.error, RemoteProtocolError)
    assert "magic" in ends.destination.text
    assert isinstance(ends.source.error, TransferError)
    assert "magic" in ends.source.text, "the source is told why"
    check_destination(ends, template, before)


@pytest.mark.parametrize("operation", sends(1, lambda tag: tag == FRAME_TAG))
def test_a_damaged_frame_of_the_destination(operation: int) -> None:
    ends, template, before = corrupt("destination", operation)
    assert isinstance(ends.source.error, RemoteProtocolError)
    assert "magic" in ends.source.text
    check_destination(ends, template, before)
    # What follows the last frame is the source's loss alone: the state is here and agrees.
    if operation < NUM_OPERATIONS[1] - 3:
        assert isinstance(ends.destination.error, PeerFailure)
        assert "magic" in ends.destination.text, "the destination is told why"


def signals(side: int) -> list[int]:
    """Control messages that belong to no frame. A frame is a number, the bytes, the number again."""
    operations = RECORDED[side].operations
    frames = [i for i in range(len(operations)) if operations[i][:2] == ("send", FRAME_TAG)]
    around = {i + step for i in frames for step in (-1, 1)}
    return [i for i in sends(side, lambda tag: tag == CONTROL_TAG) if i not in around]


@pytest.mark.parametrize("operation", signals(0))
def test_a_damaged_signal_of_the_source(operation: int) -> None:
    ends, template, before = corrupt("source", operation)
    assert isinstance(ends.destination.error, RemoteProtocolError)
    assert "expected signal" in ends.destination.text
    assert isinstance(ends.source.error, PeerFailure)
    check_destination(ends, template, before)


@pytest.mark.parametrize("operation", signals(1))
def test_a_damaged_signal_of_the_destination(operation: int) -> None:
    ends, template, before = corrupt("destination", operation)
    assert isinstance(ends.source.error, RemoteProtocolError)
    assert isinstance(ends.destination.error, PeerFailure)
    check_destination(ends, template, before)


def test_without_digests_damage_is_not_found() -> None:
    """The digests are what finds it: the same fault goes unnoticed without them."""
    (operation, *_) = sends(0, lambda tag: tag >= FIRST_MESSAGE_TAG)
    options = SmallOptions(CPU, verify=False)
    ends, *_ = run(wrap_source=lambda channel: FaultyChannel(channel).corrupt_at(operation), options=options)
    assert ends.destination.error is None
    assert difference(ends.destination.result, make(1)) != ""


# ------------------------------------------------------------------------------------- who gives up tells


class Raises(Wrapped):
    """Raises something at one operation."""

    def __init__(self, channel: Channel, operation: int, error: BaseException) -> None:
        super().__init__(channel)
        self._left = operation
        self._error = error

    def send(self, tensor: torch.Tensor, tag: int) -> Pending:
        self._count()
        return super().send(tensor, tag)

    def recv(self, tensor: torch.Tensor, tag: int) -> Pending:
        self._count()
        return super().recv(tensor, tag)

    def _count(self) -> None:
        self._left -= 1
        if self._left == -1:
            raise self._error


@pytest.mark.parametrize("side", SIDES)
def test_an_interrupt_anywhere_leaves_nothing_moving(side: str) -> None:
    for operation in range(NUM_OPERATIONS[SIDES.index(side)]):
        interrupt = KeyboardInterrupt()
        wrap = lambda channel, i=operation, e=interrupt: Raises(channel, i, e)  # noqa: E731
        ends, template, before = run(**{f"wrap_{side}": wrap})
        mine, other = (ends.source, ends.destination) if side == "source" else (ends.destination, ends.source)
        assert mine.error is interrupt
        assert mine.peer.outcome == "failed"
        if side == "source":
            check_destination(ends, template, before)
        elif snapshot(template) != before:
            assert ends.destination.report.torn
        assert other.error is None or isinstance(other.error, TransferError)
        assert other.error is not None or operation >= NUM_OPERATIONS[SIDES.index(side)] - 3


@pytest.mark.parametrize("role", SIDES)
def test_a_progress_callback_that_interrupts_ends_the_transfer_on_both_sides(role: str) -> None:
    def callback(progress: Progress) -> None:
        if progress.role == role:
            raise KeyboardInterrupt

    ends, template, before = run(options=SmallOptions(CPU, progress=callback))
    mine, other = (ends.source, ends.destination) if role == "source" else (ends.destination, ends.source)
    assert isinstance(mine.error, KeyboardInterrupt)
    assert isinstance(other.error, PeerFailure)
    assert ends.destination.report.torn or snapshot(template) == before


def test_an_interrupt_in_the_callback_reaches_the_source_with_its_reason() -> None:
    def callback() -> object:
        raise KeyboardInterrupt("by hand")

    ends = transfer(make(1), callback)
    assert isinstance(ends.destination.error, KeyboardInterrupt)
    assert isinstance(ends.source.error, PeerFailure)
    assert "by hand" in ends.source.text
    assert ends.source.peer.outcome == "failed"


@pytest.mark.parametrize("kind", ["direct", "copied at the end"])
def test_an_interrupt_while_the_result_is_built_leaves_a_torn_template(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(self: Manifest, leaves: list[object]) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(Manifest, "build", build)
    state, mine = noise(40, 1), noise(40, 2)
    if kind == "direct":
        ends = transfer({"a": state}, lambda: {"a": mine})
    else:
        ends = transfer({"a": state[::2], "b": state[1::2]}, lambda: {"a": mine[::2], "b": mine[1::2]})
    assert isinstance(ends.destination.error, KeyboardInterrupt)
    assert ends.destination.report.torn


def test_no_room_for_the_state_is_told_to_the_source() -> None:
    def no_memory() -> object:
        raise MemoryError("no room for 5 bytes")

    ends = transfer(make(1), no_memory, options=SMALL)
    assert "no room" in ends.source.text
    assert isinstance(ends.source.error, RemoteProtocolError)


def test_tell_failure_reaches_a_waiting_destination() -> None:
    left, right = memory_channels()
    report = TransferReport("destination", "test", 7, [PeerReport(0)])
    caught: list[BaseException] = []

    def destination() -> None:
        try:
            receive(right, 7, None, SMALL, Deadline(timedelta(seconds=10)), report)
        except BaseException as exc:
            caught.append(exc)

    thread = threading.Thread(target=destination)
    thread.start()
    tell_failure(left, CPU, Deadline(timedelta(seconds=10)), "w: a sparse tensor cannot travel")
    thread.join(10)
    (error,) = caught
    assert isinstance(error, PeerFailure)
    assert "w: a sparse tensor cannot travel" in str(error)
    assert report.peers[0].outcome == "failed"
    assert left.num_posted == right.num_posted == 0


def test_tell_failure_never_raises() -> None:
    left, _ = memory_channels()
    left.abort()
    tell_failure(left, CPU, Deadline(timedelta(seconds=1)), "reason")
    assert left.num_posted == 0


# ------------------------------------------------------------------------------------- the peer hangs


class Frozen(Wrapped):
    """Posts nothing any more from one operation on, as a stopped process."""

    def __init__(self, channel: Channel, operation: int) -> None:
        super().__init__(channel)
        self._left = operation

    def _post(self, post: Callable[[torch.Tensor, int], Pending], tensor: torch.Tensor, tag: int) -> Pending:
        self._left -= 1
        # A tag that nobody else uses: it is never matched.
        return post(tensor, tag if self._left >= 0 else tag + (1 << 20))

    def send(self, tensor: torch.Tensor, tag: int) -> Pending:
        return self._post(super().send, tensor, tag)

    def recv(self, tensor: torch.Tensor, tag: int) -> Pending:
        return self._post(super().recv, tensor, tag)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("share", [0, 0.3, 0.6, 0.9])
def test_a_peer_that_hangs_costs_no_more_than_the_deadline(side: str, share: float) -> None:
    operation = int(NUM_OPERATIONS[SIDES.index(side)] * share)
    wrap = lambda channel: Frozen(channel, operation)  # noqa: E731
    start = time.perf_counter()
    ends, template, before = run(**{f"wrap_{side}": wrap}, timeout=timedelta(milliseconds=50))
    assert time.perf_counter() - start < 1.05
    assert isinstance(ends.source.error, (TransferTimeout, PeerFailure))
    check_destination(ends, template, before)
    if share < 0.9:
        errors = (ends.source.error, ends.destination.error)
        assert all(isinstance(error, (TransferTimeout, PeerFailure)) for error in errors)
        assert any(isinstance(error, TransferTimeout) for error in errors)


# ------------------------------------------------------------------------- nothing touches memory afterwards


def test_nothing_moves_after_an_error() -> None:
    """Bytes that the source changes later, or operations left behind, do not reach the template."""
    for operation in range(NUM_OPERATIONS[0]):
        ends, template, _ = kill("source", operation)
        if ends.destination.error is not None:
            after = snapshot(template)
            assert snapshot(template) == after
            for side in (ends.source, ends.destination):
                with pytest.raises(PeerFailure):
                    side.channel.send(torch.zeros(1, dtype=torch.uint8), 3)


@pytest.mark.parametrize("milliseconds", [0, 1, 2, 4])
def test_errors_that_somebody_keeps_do_not_keep_works(milliseconds: int) -> None:
    """A Work that lives keeps its group alive, which goes on writing to the user's tensors."""
    groups, channels = group_channels()
    template = template_for()
    ends = transfer(
        make(1), lambda: template, options=SMALL, channels=channels, timeout=timedelta(milliseconds=milliseconds)
    )
    kept = [ends.source.error, ends.destination.error]
    if any(kept):
        assert [work for group in groups for work in group.works if work() is not None] == []
    assert all(error is None or isinstance(error, TransferError) for error in kept)


@pytest.mark.parametrize("side", [0, 1])
def test_errors_of_a_broken_channel_do_not_keep_works(side: int) -> None:
    for operation in range(0, NUM_OPERATIONS[side], 2):
        groups, channels = group_channels()
        wrapped: list[Channel] = list(channels)
        wrapped[side] = Raises(channels[side], operation, PeerFailure("the channel broke: reset by peer"))
        template = template_for()
        ends = transfer(
            make(1),
            lambda t=template: t,  # type: ignore[misc]
            options=SMALL,
            channels=(wrapped[0], wrapped[1]),
            timeout=timedelta(milliseconds=40),
        )
        kept = [ends.source.error, ends.destination.error]
        assert [work for group in groups for work in group.works if work() is not None] == []
        assert any(kept)


def test_errors_survive_pickle_as_they_come_out_of_a_transfer() -> None:
    ends, *_ = kill("source", 6)
    for side in (ends.source, ends.destination):
        error = pickle.loads(pickle.dumps(side.error))
        assert vars(error) == vars(side.error)
        assert str(error) == side.text
        assert list(chain(error)) == [error]


# --------------------------------------------------------------------------------- a peer that breaks rules


def speak(talk: Callable[[Control], None]) -> tuple[BaseException, Any]:
    """Receive from a peer that says what it likes."""
    left, right = memory_channels()
    report = TransferReport("destination", "test", 7, [PeerReport(0)])

    def source() -> None:
        try:
            talk(Control(left, CPU, Deadline(timedelta(seconds=2))))
        except TransferError:
            pass

    thread = threading.Thread(target=source)
    thread.start()
    caught: BaseException | None = None
    try:
        receive(right, 7, None, SMALL, Deadline(timedelta(seconds=2)), report)
    except BaseException as exc:
        caught = exc
    thread.join(5)
    assert right.num_posted == 0
    assert caught is not None
    return caught, report


@pytest.mark.parametrize("frame", [Frame.READY, Frame.DIGESTS, Frame.DONE])
def test_a_frame_out_of_order(frame: Frame) -> None:
    def talk(control: Control) -> None:
        control.send_frame(encode_frame(frame, []))
        control.flush()
        control.recv_frame(Frame.READY)

    error, _ = speak(talk)
    assert isinstance(error, RemoteProtocolError)
    assert f"out of order: {frame.name}" in str(error)


def test_a_signal_instead_of_a_manifest() -> None:
    def talk(control: Control) -> None:
        control.channel.wait(control.send_signal(3), control.deadline)
        control.recv_frame(Frame.READY)

    error, _ = speak(talk)
    assert isinstance(error, RemoteProtocolError)
    assert "expected a frame, got signal 3" in str(error)


def test_limits_of_the_fixture() -> None:
    """The cases above really have several flights of several kinds."""
    tags = [tag for what, tag, _, _ in RECORDED[0].operations if what == "send" and tag >= FIRST_MESSAGE_TAG]
    assert len(tags) >= 4
    assert SMALL.limits == Limits(message_bytes=1024, flight_bytes=1024, pack_below=256, pack_from=4, window=2)
