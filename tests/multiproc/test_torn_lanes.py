"""LaneTransport over loopback in this process: torn, shadow, and a state that changes while it is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ft_transport import LocalProtocolError, PeerFailure, TornStateError, TransferTimeout
from ft_transport._lanes.control import ControlConnection
from ft_transport._lanes.protocol import LaneFrame
from ft_transport._lanes.session import Session

from .harness import digest, wait_until
from .test_lanes import (
    MIB,
    STEP,
    TIMEOUT,
    Destination,
    Lanes,
    Tamper,
    envelope,
    heal,
    make_state,
    slowly,
    tensors,
)
from .test_lanes import lanes as lanes  # the fixture


def cut(after: int) -> Tamper:
    """Every connection ends when so many bytes have come down on it."""
    return lambda number, way, position, data: None if way == "down" and position > after else data


def tear(lanes: Lanes, **options: Any) -> Destination:
    found = heal(lanes, make_state(), cut(5 * MIB), **options)
    assert isinstance(found.error, PeerFailure)
    return found


def again(lanes: Lanes, destination: Destination, state: dict[str, Any], step: int = STEP) -> Destination:
    """From another source."""
    source = lanes.transport()
    destination.start(source.metadata(), step)
    source.send_checkpoint([1], step, envelope(state), TIMEOUT)
    destination.join()
    source.disallow_checkpoint()
    return destination


# -------------------------------------------------------------------------------------------- torn


@pytest.mark.parametrize("resumed", [True, False], ids=["resumed", "anew"])
def test_torn_until_a_complete_receive(lanes: Lanes, resumed: bool) -> None:
    destination = tear(lanes)
    assert destination.error.torn  # type: ignore[union-attr]
    transport = destination.transport
    assert transport.torn
    transport.disallow_checkpoint()  # the step failed by itself
    assert transport.torn

    transport.metadata()
    for _ in range(2):
        with pytest.raises(TornStateError):
            transport.disallow_checkpoint()
    destination.start(lanes.transport().metadata(), timeout=TIMEOUT / 20).join()  # nobody sends
    assert destination.error is not None
    assert transport.torn
    assert destination.error.torn  # type: ignore[attr-defined]

    state = make_state() if resumed else make_state(3)
    again(lanes, destination, state, STEP if resumed else STEP + 1)
    assert destination.sound(state)
    assert (destination.report.nbytes_kept > 0) is resumed
    assert not transport.torn
    transport.metadata()
    transport.disallow_checkpoint()


def test_a_torn_replica_does_not_serve_and_says_so_at_once(lanes: Lanes) -> None:
    torn = tear(lanes).transport
    early = lanes.destination(make_state(4)).start(torn.metadata())
    wait_until(lambda: bool(torn._local.dispatcher._waiting))
    with pytest.raises(TornStateError) as info:
        torn.send_checkpoint([1, 2], STEP, envelope(make_state()), TIMEOUT)
    assert info.value.torn
    late = lanes.destination(make_state(4)).start(torn.metadata()).join()
    for destination in (early.join(), late):
        assert isinstance(destination.error, PeerFailure)
        assert "cannot serve" in str(destination.error)
        assert not destination.transport.torn
        assert destination.seconds < 5
        assert digest(destination.template) == digest(make_state(4))
    assert torn.last_report is not None
    assert torn.last_report.nbytes_total == 0
    with pytest.raises(TornStateError):
        torn.disallow_checkpoint()
    torn.shutdown()


def test_restored_from_elsewhere(lanes: Lanes) -> None:
    destination = tear(lanes)
    assert destination.template is not None
    transport = destination.transport
    for mine, saved in zip(tensors(destination.template), tensors(make_state(5)), strict=True):
        mine.copy_(saved)
    transport.metadata()
    transport.mark_restored()
    assert not transport.torn
    transport.disallow_checkpoint()
    # What the broken receive has left is not there any more, and is not counted on.
    assert transport._receiving.kept is None
    assert again(lanes, destination, make_state()).sound(make_state())
    assert destination.report.nbytes_kept == 0


# ------------------------------------------------------------------------------------------ shadow


def test_shadow_is_never_torn_by_the_wire(lanes: Lanes) -> None:
    for after in (0, 100, 3 * MIB, 5 * MIB):
        found = heal(lanes, make_state(), cut(after), shadow=True)
        assert isinstance(found.error, PeerFailure), after
        assert not found.error.torn, after
        assert not found.transport.torn
        assert digest(found.template) == digest(make_state(2))
        found.transport.metadata()
        found.transport.disallow_checkpoint()


def test_shadow(lanes: Lanes) -> None:
    state = make_state()
    found = heal(lanes, state, shadow=True)
    assert found.sound(state)
    assert found.template is not None
    assert [t.data_ptr() for t in tensors(found.result["user"]["default"])] == [
        t.data_ptr() for t in tensors(found.template)
    ]
    report = found.report
    assert report.nbytes_in_place == 0
    assert report.nbytes_copied == report.nbytes_fresh == report.nbytes_total


def test_shadow_cannot_compare(lanes: Lanes) -> None:
    with pytest.raises(ValueError, match="skip_unchanged"):
        lanes.transport(shadow=True, skip_unchanged=True)


# ----------------------------------------------------------------------------------------- changed


def change_at_the_end(patch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """When everything is there, and the destination is about to say so."""
    send_done = ControlConnection.send_done

    def changed(self: ControlConnection, **options: Any) -> None:
        change()
        send_done(self, **options)

    patch.setattr(ControlConnection, "send_done", changed)


@pytest.mark.parametrize("shadow", [False, True], ids=["in place", "shadow"])
def test_a_state_that_changed_is_void_although_every_digest_agrees(
    lanes: Lanes, shadow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_state()
    change_at_the_end(monkeypatch, lambda: state["large"][1].add_(1))
    source, destination = lanes.transport(), lanes.destination(make_state(2), shadow=shadow)
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    destination.start(source.metadata()).join()
    source.disallow_checkpoint()
    report = source.last_report
    assert report is not None
    text = "the state changed while it was sent: user.default.large.1"
    assert text in report.error
    assert report.error.startswith(LocalProtocolError.__name__)
    assert not report.complete
    assert report.peers[0].outcome == destination.report.peers[0].outcome == "failed"
    assert text in report.peers[0].reason
    assert isinstance(destination.error, PeerFailure)
    assert text in str(destination.error)
    assert destination.transport.torn is not shadow
    if shadow:
        assert digest(destination.template) == digest(make_state(2))
    monkeypatch.undo()
    assert again(lanes, destination, state).sound(state)
    assert not destination.transport.torn


def test_a_change_is_noticed_on_the_way(lanes: Lanes) -> None:
    state = make_state(large=6)
    source, destination = lanes.transport(verify=False), lanes.destination(make_state(2, large=6), lanes=1)
    proxy = lanes.proxy(source.metadata(), slowly(5))
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    destination.start(proxy.metadata)
    wait_until(lambda: proxy.nbytes > 2 * MIB)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    optimizer.step()  # another one
    state["large"][0].add_(1)
    destination.join()
    source.disallow_checkpoint()
    assert "the state changed while it was sent" in str(destination.error)
    assert destination.report.peers[0].nbytes < destination.report.nbytes_total


def test_small_tensors_may_change(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    state = make_state()
    change_at_the_end(monkeypatch, lambda: [tensor.add_(1) for tensor in state["small"].values()])
    source = lanes.transport()
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    destination = lanes.destination(make_state(2)).start(source.metadata()).join()
    assert destination.sound(make_state())
    source.disallow_checkpoint()


def test_a_source_that_ends_after_everything_is_there_voids_nothing(
    lanes: Lanes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has checked, and is merely kept from saying goodbye."""
    send = Session.send

    def interrupted(self: Session, frame: LaneFrame, *args: Any, **kwargs: Any) -> None:
        if frame is LaneFrame.BYE:
            raise TransferTimeout("timed out just now")
        send(self, frame, *args, **kwargs)

    monkeypatch.setattr(Session, "send", interrupted)
    state = make_state()
    assert heal(lanes, state).sound(state)
