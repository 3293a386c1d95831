"""What goes wrong, at every operation and on either side: how both ends learn of it, and what they leave behind."""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
from faults.table import (
    AFTER,
    BEFORE,
    DESTINATION,
    FAULTS,
    GROUP,
    MANIFEST,
    MOVE,
    PAGE,
    SOURCE,
    TORN,
    VERIFY,
    AtDestination,
    Cell,
    cells,
    page,
)
from helpers import (
    CPU,
    SMALL,
    Ends,
    Recorded,
    SmallOptions,
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
)
from ft_transport._deadline import Deadline
from ft_transport._group import control as _control
from ft_transport._group.channel import Channel
from ft_transport._group.control import CONTROL_TAG, FIRST_MESSAGE_TAG, FRAME_TAG, Control
from ft_transport._group.destination import receive
from ft_transport._group.fan_out import in_parallel
from ft_transport._group.source import send_failure
from ft_transport._state.manifest import Manifest as EngineManifest
from ft_transport._wire.frames import Frame, encode_frame
from ft_transport._wire.layout import Limits
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


class Marked(Recorded):
    """Knows in which phase of the table each operation is."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel)
        self.engine_phase = "agree"
        self.engine_phases: list[str] = []

    def _note(self, what: str, tensor: torch.Tensor, tag: int) -> None:
        super()._note(what, tensor, tag)
        self.engine_phases.append(self.engine_phase)

    def phase(self, operation: int) -> str:
        """In which phase of the table an operation is."""
        engine = self.engine_phases[operation]
        what, *_ = self.operations[operation]
        if self.peer_rank == 1:  # the source
            if engine == "verify":
                return VERIFY if what == "send" else AFTER
            # With its READY the destination expects bytes.
            return MANIFEST if what == "send" and engine == "agree" else MOVE
        last_frame = max(i for i, (was, t, *_) in enumerate(self.operations) if (was, t) == ("recv", FRAME_TAG))
        if engine == "verify" or (engine == "move" and operation >= last_frame - 1):
            return VERIFY
        return MANIFEST if engine == "agree" else MOVE


def count_operations() -> tuple[Marked, Marked]:
    ends = tuple(map(Marked, memory_channels()))
    template = template_for()

    def watch(found: object, phase: str) -> None:
        if isinstance(found, PeerReport):
            ends[1 - found.rank].engine_phase = phase

    options = dataclasses.replace(SMALL, on_phase=watch)
    succeed(make(1), lambda: template, options=options, channels=ends)  # type: ignore[arg-type]
    return ends  # type: ignore[return-value]


RECORDED = count_operations()
NUM_OPERATIONS = tuple(len(end.operations) for end in RECORDED)
SIDES = ("source", "destination")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_control, "_LAST_WORDS", timedelta(milliseconds=100))


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
    assert time.perf_counter() - start < 10, "both sides learn of it at once, and not at their deadlines"
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
    assert isinstance(side.error, (TransferError, KeyboardInterrupt, OSError))
    assert not side.report.complete
    assert side.peer.outcome in ("refused", "failed", "dead", "timed out")
    assert side.peer.reason
    assert side.report.torn or untouched, "a mix of two states must be called torn"
    if side.peer.phase == "agree":
        assert untouched
        assert not side.report.torn
    else:
        assert side.report.torn


# --------------------------------------------------------------------------------------- the table


def kill(side: str, operation: int) -> Any:
    return run(**{f"wrap_{side}": lambda channel: FaultyChannel(channel).die_at(operation)})


def operations_of(cell: Cell) -> list[int]:
    recorded = RECORDED[SIDES.index(cell.row.who)]
    return [i for i in range(len(recorded.operations)) if recorded.phase(i) == cell.phase]


SOON = timedelta(milliseconds=40)
LATER = timedelta(seconds=15)

# At which operation of the side with the fault; and what it takes to have it.
AT_OPERATIONS: dict[str, Callable[[FaultyChannel, int], FaultyChannel]] = {
    "killed": lambda channel, i: channel.die_at(i),
    "stopped": lambda channel, i: channel.freeze_at(i),
    "interrupted": lambda channel, i: channel.raise_at(i, KeyboardInterrupt()),
    "own error": lambda channel, i: channel.raise_at(i, OSError("the disk is full")),
}
MESSAGES = range(sum(1 for what, tag, *_ in RECORDED[0].operations if what == "send" and tag >= FIRST_MESSAGE_TAG))


def walk(cell: Cell, soon: timedelta) -> Iterator[tuple[Ends, dict[str, Any], list[bytes]]]:
    """Every transfer with the fault of a cell; where a deadline ends it, that is soon."""
    if cell.fault in AT_OPERATIONS:
        times: dict[str, Any] = {}
        if cell.fault == "stopped":
            mine, other = (LATER, soon) if cell.row.who == SOURCE else (soon, LATER)
            # The one that is stopped shall not find out by its own deadline.
            times = {"timeout": mine, "destination_timeout": other}
        for operation in operations_of(cell):
            wrap = lambda channel, i=operation: AT_OPERATIONS[cell.fault](FaultyChannel(channel), i)  # noqa: E731
            yield run(**{f"wrap_{cell.row.who}": wrap}, **times)
    elif cell.fault in ("message damaged", "truncated"):
        for message in MESSAGES:
            what = {"message damaged": "corrupt", "truncated": "truncate"}[cell.fault]
            yield run(lambda channel, m=message, w=what: getattr(FaultyChannel(channel), w)(m))  # type: ignore[misc]
    elif cell.fault == "frozen":
        total = sum(nbytes for _, _, nbytes, _ in RECORDED[0].operations)
        for share in (0.5, 0.7, 0.9):
            wrap = lambda channel, n=int(share * total): FaultyChannel(channel).freeze_after(n)  # noqa: E731
            yield run(wrap, timeout=soon, destination_timeout=LATER)
    elif cell.fault == "clock jumps":
        with pytest.MonkeyPatch.context() as patch:
            now, ahead = time.time(), iter(range(10**9))
            patch.setattr(time, "time", lambda: now + 3600 * (-1) ** next(ahead))
            yield run()


IN_MEMORY = [
    cell
    for cell in cells(GROUP)
    if cell.phase != BEFORE
    and (cell.fault, cell.phase) != ("own error", AFTER)  # at no operation
    and (cell.fault in AT_OPERATIONS or cell.fault in ("message damaged", "truncated", "frozen", "clock jumps"))
]


@pytest.mark.parametrize("cell", IN_MEMORY, ids=str)
def test_cell(cell: Cell) -> None:
    try:
        check_cell(cell, SOON)
    except AssertionError:
        if cell.fault not in ("stopped", "frozen"):
            raise
        # On a busy machine the deadline may come before the fault does. Not so a longer one.
        check_cell(cell, 25 * SOON)


def check_cell(cell: Cell, soon: timedelta) -> None:
    seen = 0
    for ends, template, before in walk(cell, soon):
        seen += 1
        check_destination(ends, template, before)
        if cell.phase == AFTER:
            continue  # whether the last digest had left is not to be said
        if cell.row.source is not None:
            check_source(cell, ends)
        if cell.row.destination is not None:
            check_outcome(cell, cell.row.destination, ends)
    assert seen > 0


def check_source(cell: Cell, ends: Ends) -> None:
    assert cell.row.source is not None
    assert ends.source.peer.outcome in cell.row.source.outcome
    if cell.row.source.raises:
        assert type(ends.source.error).__name__ == cell.row.source.raises


def check_outcome(cell: Cell, expected: AtDestination, ends: Ends) -> None:
    side = ends.destination
    if expected.raises:
        # What torchft's caller gets as a LocalProtocolError is what it is, here.
        named = type(side.error).__name__.replace("OSError", "LocalProtocolError")
        assert named in expected.raises, ends.destination.text
    # A source that goes while it waits for READY: whether that was sent already is not to be said.
    assert side.report.torn is (expected.template == TORN) or side.peer.phase == "agree"


def test_every_operation_is_in_a_cell() -> None:
    for who in (SOURCE, DESTINATION):
        walked = [i for cell in IN_MEMORY if (cell.fault, cell.row.who) == ("killed", who) for i in operations_of(cell)]
        assert sorted(walked) == list(range(NUM_OPERATIONS[SIDES.index(who)]))


def test_the_page_shows_the_table() -> None:
    text = PAGE.read_text()
    assert page(text) == text, "run python -m faults.table in the folder tests/"
    for fault in {cell.fault for cell in cells()}:
        assert FAULTS[fault] in text


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


def test_ctrl_c_while_several_are_served_ends_all_of_them() -> None:
    """A join that Ctrl-C interrupts takes its thread for ended; none may go on once the call is over."""
    before = threading.active_count()
    channels = [memory_channels()[0] for _ in range(3)]

    def serve(index: int) -> None:
        threading.Event().wait(0.1)  # until all have started, and are waited for
        if index == 0:
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(0.3)

    with pytest.raises(KeyboardInterrupt):
        in_parallel(channels, serve)
    assert threading.active_count() == before
    assert all(channel.broken for channel in channels)


@pytest.mark.parametrize("side", SIDES)
def test_an_interrupt_anywhere_leaves_nothing_moving(side: str) -> None:
    for operation in range(NUM_OPERATIONS[SIDES.index(side)]):
        interrupt = KeyboardInterrupt()
        wrap = lambda channel, i=operation, e=interrupt: FaultyChannel(channel).raise_at(i, e)  # noqa: E731
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

    ends, template, before = run(options=SmallOptions(CPU, on_progress=callback))
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
    def build(self: EngineManifest, leaves: list[object]) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(EngineManifest, "build", build)
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
    mine = TransferReport("destination", "test", 7, [PeerReport(0)])
    caught: list[BaseException] = []

    def destination() -> None:
        try:
            receive(right, 7, None, SMALL, Deadline(timedelta(seconds=10)), mine)
        except BaseException as exc:
            caught.append(exc)

    thread = threading.Thread(target=destination)
    thread.start()
    send_failure(left, CPU, Deadline(timedelta(seconds=10)), "w: a sparse tensor cannot travel")
    thread.join(10)
    (error,) = caught
    assert isinstance(error, PeerFailure)
    assert "w: a sparse tensor cannot travel" in str(error)
    assert mine.peers[0].outcome == "failed"
    assert left.num_posted == right.num_posted == 0


def test_tell_failure_never_raises() -> None:
    left, _ = memory_channels()
    left.abort()
    send_failure(left, CPU, Deadline(timedelta(seconds=1)), "reason")
    assert left.num_posted == 0


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
        wrapped[side] = FaultyChannel(channels[side]).raise_at(
            operation, PeerFailure("the channel broke: reset by peer")
        )
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
    mine = TransferReport("destination", "test", 7, [PeerReport(0)])

    def source() -> None:
        try:
            talk(Control(left, CPU, Deadline(timedelta(seconds=2))))
        except TransferError:
            pass

    thread = threading.Thread(target=source)
    thread.start()
    caught: BaseException | None = None
    try:
        receive(right, 7, None, SMALL, Deadline(timedelta(seconds=2)), mine)
    except BaseException as exc:
        caught = exc
    thread.join(5)
    assert right.num_posted == 0
    assert caught is not None
    return caught, mine


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
    assert SMALL.limits(1 << 20) == Limits(message_bytes=1024, flight_bytes=1024, pack_below=256, pack_from=4, window=2)
