"""The guard by itself, and PGTransport in this process: torn from when to when, and what is refused then."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from helpers import CPU, SMALL, FakeGroup, SmallOptions, noise, snapshot, succeed, tensors_of, transfer
from states import model_and_optimizer

from ft_transport import (
    LocalProtocolError,
    PeerFailure,
    PGTransport,
    Progress,
    ProtocolError,
    RemoteProtocolError,
    TornStateError,
    TransferError,
    TransferTimeout,
    distributed,
)
from ft_transport._group.channel import Channel
from ft_transport._options import Options
from ft_transport._plan.torn import TornGuard
from ft_transport._telemetry.report import PeerReport, TransferReport
from ft_transport.errors import ended, refused_for_good
from ft_transport.testing import FaultyChannel, memory_channels

SECOND = timedelta(seconds=1)


# --------------------------------------------------------------------------------------- the guard


def receive(guard: TornGuard, *, torn: bool, error: PeerFailure | None = None) -> None:
    report = TransferReport("destination", "test", 7)
    with contextlib.suppress(PeerFailure), guard.receiving(report):
        report.torn = torn
        assert guard.torn or not torn, "from the first byte on"
        if error is not None:
            raise error
        report.torn = False


def may_serve(guard: TornGuard) -> bool:
    return _allowed(guard.check_source)


def may_step(guard: TornGuard) -> bool:
    return _allowed(guard.check_step)


def _allowed(check: Callable[[], None]) -> bool:
    try:
        check()
    except TornStateError:
        return False
    return True


EVENTS: dict[str, Callable[[TornGuard], None]] = {
    "quorum": TornGuard.begin_quorum,
    "complete": lambda guard: receive(guard, torn=True),
    "torn": lambda guard: receive(guard, torn=True, error=PeerFailure("lost")),
    "untouched": lambda guard: receive(guard, torn=False, error=PeerFailure("not there")),
    "restored": TornGuard.mark_restored,
}


@pytest.mark.parametrize("length", range(1, 5))
def test_every_order_of_events(length: int) -> None:
    for events in itertools.product(EVENTS, repeat=length):
        guard = TornGuard()
        torn, tried = False, False
        for event in events:
            EVENTS[event](guard)
            torn = {"torn": True, "complete": False, "restored": False}.get(event, torn)
            tried = event in ("complete", "torn", "untouched") or (tried and event != "quorum")
        assert guard.torn is torn, events
        assert may_serve(guard) is not torn, events
        assert may_step(guard) is (tried or not torn), events
        assert may_step(guard) is may_step(guard), "once more, the same"


def test_the_error_says_what_happened_and_what_to_do() -> None:
    guard = TornGuard()
    receive(guard, torn=True, error=PeerFailure("the source is gone"))
    receive(guard, torn=False, error=PeerFailure("nobody there"))
    guard.begin_quorum()
    with pytest.raises(TornStateError) as info:
        guard.check_step()
    assert info.value.torn
    for text in ("a receive of step 7 broke off (the source is gone)", "durable checkpoint", "mark_restored()"):
        assert text in info.value.message


def test_nothing_can_be_restored_during_a_receive() -> None:
    guard = TornGuard()
    with guard.receiving(TransferReport("destination", "test", 7)), pytest.raises(LocalProtocolError):
        guard.mark_restored()


def test_an_interrupted_receive_is_torn_too() -> None:
    guard, report = TornGuard(), TransferReport("destination", "test", 7)
    with contextlib.suppress(KeyboardInterrupt), guard.receiving(report):
        report.torn = True
        raise KeyboardInterrupt
    assert guard.torn


# ------------------------------------------------------------------------------- over fake groups


class Group(FakeGroup):
    """What PGTransport asks a group beside sending and receiving."""

    def __init__(self, channel: Any, rank: int) -> None:
        super().__init__(channel)
        self._rank = rank

    def size(self) -> int:
        return 2


class Pair:
    """Two transports; a new group for each transfer, as the Manager makes one."""

    def __init__(self, template: object, **options: Any) -> None:
        self.source: PGTransport[Any] = PGTransport(Group(None, 0), 10 * SECOND, CPU)  # type: ignore[arg-type]
        self.destination: PGTransport[Any] = PGTransport(
            Group(None, 1),
            10 * SECOND,
            CPU,
            lambda: template,
            **options,  # type: ignore[arg-type]
        )

    def heal(self, state: object, step: int = 7, *, die_at: int = -1, back: bool = False) -> list[BaseException | None]:
        """A transfer from one to the other, or back; what either side raised, the source first."""
        near, far = memory_channels()
        channels = [FaultyChannel(near).die_at(die_at), far]
        ends = [self.source, self.destination]
        if back:
            ends.reverse()
        for rank, (end, channel) in enumerate(zip(ends, channels, strict=True)):
            end._pg = Group(channel, rank)  # type: ignore[assignment]
        errors: list[BaseException | None] = [None, None]

        def run(index: int, call: Callable[[], object]) -> None:
            try:
                call()
            except BaseException as exc:
                errors[index] = exc

        receiving = threading.Thread(target=run, args=(1, lambda: ends[1].recv_checkpoint(0, "", step, 10 * SECOND)))
        receiving.start()
        run(0, lambda: ends[0].send_checkpoint([1], step, state, 10 * SECOND))
        receiving.join(15)
        assert not receiving.is_alive()
        return errors


def large(seed: int) -> dict[str, Any]:
    return {f"layer {i}": noise(100_000, seed + i) for i in range(4)}


# Between the messages: they follow three of the manifest, three of the answer, and the receive of the next answer.
BETWEEN = 9


def tear(pair: Pair) -> None:
    _, error = pair.heal(large(1), die_at=BETWEEN)
    assert isinstance(error, PeerFailure)
    assert error.torn


def test_torn_until_a_complete_receive() -> None:
    pair = Pair(large(2))
    assert not pair.destination.torn
    tear(pair)
    assert pair.destination.torn
    _, error = pair.heal(large(1), die_at=0)  # this one did not touch the template
    assert isinstance(error, PeerFailure)
    assert error.torn, "it is torn all the same"
    assert pair.destination.last_report is not None
    assert not pair.destination.last_report.torn
    assert pair.heal(large(1), step=8) == [None, None]
    assert not pair.destination.torn
    pair.destination.metadata()
    pair.destination.disallow_checkpoint()


def test_a_torn_replica_does_not_serve_and_says_so_at_once() -> None:
    pair = Pair(large(2))
    tear(pair)
    touched = threading.Event()

    class State(dict[str, Any]):
        def items(self) -> Any:
            touched.set()
            return super().items()

    mine, theirs = pair.heal(State(large(2)), back=True)
    assert isinstance(mine, TornStateError)
    assert mine.torn
    assert isinstance(theirs, PeerFailure)
    assert "cannot serve" in theirs.message
    assert not theirs.torn
    assert not touched.is_set()
    report = pair.destination.last_report
    assert report is not None
    assert (report.peers[0].outcome, report.nbytes_total) == ("failed", 0)
    assert "cannot serve" in report.summary()


def test_stops_before_the_step_unless_a_receive_was_tried() -> None:
    pair = Pair(large(2))
    pair.destination.metadata()
    tear(pair)
    pair.destination.disallow_checkpoint()  # torchft fails this step itself
    for _ in range(2):
        pair.destination.metadata()
        for _ in range(2):
            with pytest.raises(TornStateError):
                pair.destination.disallow_checkpoint()
    pair.destination.shutdown()
    pair.destination.mark_restored()
    pair.destination.disallow_checkpoint()
    assert pair.heal(large(2), back=True) == [None, None]


def test_autograd_is_told_before_it_stops() -> None:
    pair = Pair(large(2))
    tear(pair)
    tensor = torch.zeros(1)
    pair.destination._changed = [tensor]
    pair.destination.metadata()
    with pytest.raises(TornStateError):
        pair.destination.disallow_checkpoint()
    assert tensor._version == 1


def test_torn_while_bytes_move() -> None:
    seen: list[bool] = []

    def progress(now: Progress) -> None:
        seen.append(pair.destination.torn)

    pair = Pair(large(2), on_progress=progress)
    assert pair.heal(large(1)) == [None, None]
    assert seen
    assert all(seen)
    assert not pair.destination.torn


# ------------------------------------------------------------------------------------- copies


def test_a_model_that_the_callback_has_copied_is_not_torn() -> None:
    mine = large(2)
    before = snapshot(mine)
    pair = Pair(None)
    pair.destination._state_dict = lambda: {name: leaf.clone() for name, leaf in mine.items()}
    for die_at in (BETWEEN, BETWEEN, -1):  # told apart in the first receive, and known from then on
        _, error = pair.heal(large(1), die_at=die_at)
        assert isinstance(error, PeerFailure) is (die_at >= 0)
        assert not pair.destination.torn
        report = pair.destination.last_report
        assert report is not None
        assert (report.nbytes_in_place, set(report.not_in_place)) == (0, set(mine))
        pair.destination.metadata()
        pair.destination.disallow_checkpoint()
    assert snapshot(mine) == before


def test_a_callback_is_asked_twice_once() -> None:
    mine, calls = large(2), []
    pair = Pair(None)
    pair.destination._state_dict = lambda: calls.append(1) or dict(mine)  # type: ignore[func-returns-value]
    for step in (7, 8, 9):
        assert pair.heal(large(1), step=step) == [None, None]
    assert len(calls) == 4
    assert pair.destination.last_report is not None
    assert pair.destination.last_report.in_place_share == 1.0


def test_a_quorum_that_has_failed_before_a_heal_could_be_tried_stops_nobody() -> None:
    """Whoever calls will not step, and the next quorum can heal. What counts as healed will never be."""
    guard = TornGuard()
    receive(guard, torn=True, error=PeerFailure("gone"))
    guard.begin_quorum()
    guard.check_step(failed=True)
    with pytest.raises(TornStateError, match="nobody was left to heal it"):
        guard.check_step()
    guard.lose(["norm.mean"])
    with pytest.raises(TornStateError, match="takes for healed"):
        guard.check_step(failed=True)


# ------------------------------------------------------------------------------------- refusals


def refuse(guard: TornGuard, *, unfit: bool) -> None:
    report = TransferReport("destination", "test", 7, [PeerReport(0, "refused")])
    with contextlib.suppress(ProtocolError), guard.receiving(report):
        raise refused_for_good("it does not fit") if unfit else ended(LocalProtocolError("it does not fit"), "refused")


def test_a_replica_that_refuses_what_it_will_refuse_again_is_stopped() -> None:
    guard = TornGuard()
    refuse(guard, unfit=True)
    for _ in range(2):
        with pytest.raises(RemoteProtocolError, match="it does not fit"):
            guard.check_step()
    guard.begin_quorum()  # which may find that nobody is left to heal from
    guard.check_step()


def test_a_replica_that_refuses_for_what_may_pass_is_stopped_in_the_end() -> None:
    guard = TornGuard()
    for end in (receive, refuse):
        for _ in range(2):
            guard.begin_quorum()
            refuse(guard, unfit=False)
            guard.check_step()
        guard.begin_quorum()
        if end is receive:
            receive(guard, torn=False)
            guard.check_step()
    refuse(guard, unfit=False)
    with pytest.raises(RemoteProtocolError):
        guard.check_step()


def fail(guard: TornGuard, error: TransferError, nbytes: int = 0) -> None:
    report = TransferReport("destination", "test", 7, [PeerReport(0, phase="move", nbytes=nbytes)])
    guard.begin_quorum()
    with contextlib.suppress(TransferError), guard.receiving(report):
        raise error


def test_a_replica_whose_source_cannot_describe_its_state_is_stopped_in_the_end() -> None:
    """It is not the source that stops: it has what this one lacks, and the others would follow it."""
    guard = TornGuard()
    for between in (
        lambda: receive(guard, torn=False),
        lambda: fail(guard, PeerFailure("gone")),
        lambda: fail(guard, TransferTimeout("timed out")),
        lambda: fail(guard, ended(PeerFailure("it has changed"), "failed"), nbytes=5),
        guard.mark_restored,
        lambda: fail(guard, ended(PeerFailure("it cannot travel"), "failed")),
    ):
        for _ in range(2):
            fail(guard, ended(PeerFailure("it cannot travel"), "failed"))
            guard.check_step()
        between()
    with pytest.raises(RemoteProtocolError, match=r"cannot be healed from the others.*it cannot travel"):
        guard.check_step()


def test_a_template_that_does_not_fit_stops_the_replica_before_its_step() -> None:
    pair = Pair({"layer 0": noise(3, 1)})
    pair.destination.metadata()
    mine, theirs = pair.heal(large(1))
    assert mine is None, "the source has done nothing wrong"
    assert isinstance(theirs, RemoteProtocolError)
    with pytest.raises(RemoteProtocolError, match="layer 0: expected") as info:
        pair.destination.disallow_checkpoint()
    assert not info.value.torn
    pair.source.disallow_checkpoint()


# ------------------------------------------------------------------------------------------ shadow


SHADOW = SmallOptions(CPU, shadow=True)


def test_shadow_is_never_torn_by_the_wire() -> None:
    """The source dies at each of its operations, and so does the destination's end of the channel."""
    state, template = model_and_optimizer(1), model_and_optimizer(2)
    before = snapshot(template)
    operations = count_operations(state, template)
    for side, number in operations.items():
        for operation in range(number):
            ends: list[Channel] = list(memory_channels())
            ends[side] = FaultyChannel(ends[side]).die_at(operation)
            done = transfer(
                state,
                functools.partial(lambda mine: mine, template),
                options=SMALL,
                destination_options=SHADOW,
                channels=(ends[0], ends[1]),
            )
            if done.destination.error is None:
                # What is lost is the last answer alone.
                assert operation >= number - 4, (side, operation)
                assert snapshot(template) == snapshot(state)
                template = model_and_optimizer(2)
                continue
            assert not done.destination.report.torn, (side, operation)
            assert snapshot(template) == before, (side, operation)


def count_operations(state: object, template: object) -> dict[int, int]:
    ends = [FaultyChannel(channel) for channel in memory_channels()]
    copy = model_and_optimizer(2)
    succeed(state, lambda: copy, options=SMALL, destination_options=SHADOW, channels=(ends[0], ends[1]))
    return {side: end.num_operations for side, end in enumerate(ends)}


def test_shadow_keeps_addresses_and_reports_what_it_did() -> None:
    state, template = model_and_optimizer(1), model_and_optimizer(2)
    tensors = {id(leaf): leaf.data_ptr() for leaf in tensors_of(template)}
    ends = succeed(state, lambda: template, options=SMALL, destination_options=SHADOW)
    report = ends.destination.report
    assert snapshot(template) == snapshot(state)
    assert {id(leaf): leaf.data_ptr() for leaf in tensors_of(ends.destination.result)} == tensors
    assert report.nbytes_in_place == 0
    assert report.nbytes_fresh == report.nbytes_copied == report.nbytes_total
    assert len(ends.destination.written) == len(tensors)


def test_what_is_copied_is_reported_without_shadow_too() -> None:
    state, template = model_and_optimizer(1), model_and_optimizer(2)
    assert succeed(state, lambda: template).destination.report.nbytes_copied == 0
    assert succeed(state).destination.report.nbytes_copied == 0


def test_shadow_of_the_transport() -> None:
    template = large(2)
    before = snapshot(template)
    pair = Pair(template, shadow=True)
    _, error = pair.heal(large(1), die_at=BETWEEN)
    assert isinstance(error, PeerFailure)
    assert not error.torn
    assert not pair.destination.torn
    assert snapshot(template) == before
    pair.destination.metadata()
    pair.destination.disallow_checkpoint()
    assert pair.heal(large(1)) == [None, None]
    assert snapshot(template) == snapshot(large(1))


def test_options_default_to_in_place() -> None:
    assert not Options(CPU).shadow


def test_without_torchft() -> None:
    template = large(2)
    destination = distributed.PGTransport(Group(None, 1), 10 * SECOND, CPU, lambda: template)  # type: ignore[arg-type]

    def receive_from(die_at: int) -> BaseException | None:
        near, far = memory_channels()
        source = distributed.PGTransport(Group(near, 0), 10 * SECOND, CPU)  # type: ignore[arg-type]
        destination._pg = Group(FaultyChannel(far).die_at(die_at), 1)  # type: ignore[assignment]
        sending = threading.Thread(target=_quietly, args=(lambda: source.send_checkpoint([1], large(1)),))
        sending.start()
        try:
            destination.recv_checkpoint(0)
        except PeerFailure as exc:
            return exc
        finally:
            sending.join(15)
        return None

    assert not destination.torn
    error = receive_from(die_at=4)  # after the length, the description, and two messages
    assert isinstance(error, PeerFailure)
    assert error.torn
    assert destination.torn
    with pytest.raises(TornStateError):
        destination.send_checkpoint([], {})
    assert receive_from(die_at=-1) is None
    assert not destination.torn


def _quietly(call: Callable[[], None]) -> None:
    with contextlib.suppress(PeerFailure):
        call()
