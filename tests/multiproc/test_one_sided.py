"""Lanes with a one-sided transport of torch's: every promise of the lanes holds, whatever the backend does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch

from ft_transport import LaneTransport, LocalProtocolError, PeerFailure, PeerReport, TransferError
from ft_transport._lanes import fabric as _fabric
from ft_transport._lanes import session as _session
from ft_transport._net.one_sided import register
from ft_transport._torchft import lanes as _lanes
from ft_transport.errors import TransferTimeout
from ft_transport.testing import FaultyFabric
from ft_transport.testing._fabric import _Transport

from .harness import digest, residue, wait_until
from .test_lanes import MIB, STALL, STEP, TIMEOUT, Destination, Lanes, envelope, lanes, make_state

__all__ = ["lanes"]  # the fixture

# All but small tensors, strided ones and frames.
MOST = 0.85
NAME = "faulty"


@pytest.fixture
def fabric(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyFabric]:
    # What stands still does so beyond the end of a test's transports.
    monkeypatch.setattr(_lanes, "_CLOSING", timedelta(milliseconds=10))
    with FaultyFabric(NAME) as made:
        yield made
    # Each endpoint is closed once nothing stands still.
    wait_until(lambda: made.num_open == 0, 10)
    wait_until(lambda: not any("ft_transport-fabric" in name for name in residue().threads), 10)


def begun(
    made: Lanes, theirs: str = NAME, ours: str = NAME, *, timeout: timedelta = TIMEOUT, **options: Any
) -> tuple[Destination, LaneTransport[Any]]:
    """A receive in place under way, from a source in this process."""
    source = made.transport(fabric=theirs)
    source.send_checkpoint([1], STEP, envelope(make_state()), TIMEOUT)
    destination = made.destination(make_state(2), fabric=ours, **options)
    return destination.start(source.metadata(), timeout=timeout), source


def pause(seconds: float) -> None:
    threading.Event().wait(seconds)


def land_late(fabric: FaultyFabric, destination: Destination) -> int:
    """Have reads write that stand still: not to the template, whose receive has failed. Gives how many did."""
    assert destination.template is not None
    after = digest(destination.template)
    num_late = fabric.land()
    assert digest(destination.template) == after
    return num_late


@pytest.mark.parametrize("num_lanes", [1, 4])
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "fresh"])
@pytest.mark.parametrize("verify", [True, False], ids=["verified", "not verified"])
def test_a_state_is_read(lanes: Lanes, fabric: FaultyFabric, verify: bool, in_place: bool, num_lanes: int) -> None:
    source, state = lanes.transport(verify=verify, fabric=NAME), make_state()
    assert fabric.num_made == 0, "nothing spins before there is a transfer"
    destination = lanes.destination(make_state(2) if in_place else None, lanes=num_lanes, fabric=NAME)
    destination.start(source.metadata())
    source.send_checkpoint([3], STEP, envelope(state), TIMEOUT)
    assert destination.join().sound(state)
    source.disallow_checkpoint()
    report = destination.report
    assert report.peers[0].nbytes_direct > (MOST if num_lanes == 1 else 0) * report.nbytes_total
    assert 1.0 <= report.nbytes_wire / report.nbytes_total < 1.01
    # Two ends for each lane, and each message is registered once at the source; the destination has one for each end.
    assert fabric.num_made <= 2 * num_lanes
    assert fabric.num_registered <= fabric.num_reads + num_lanes
    wait_until(lambda: fabric.num_open == 0)


@pytest.mark.parametrize(("theirs", "ours"), [("tcp", NAME), (NAME, "tcp"), (NAME, "auto"), ("cma", NAME)])
def test_both_sides_have_a_say(lanes: Lanes, fabric: FaultyFabric, theirs: str, ours: str) -> None:
    destination, _ = begun(lanes, theirs, ours)
    assert destination.join().sound(make_state())
    assert destination.report.peers[0].nbytes_direct == 0
    assert fabric.num_reads == 0


@pytest.mark.parametrize(("theirs", "num_lanes"), [("tcp", 2), (NAME, 1)])
def test_one_lane_will_do_but_for_who_has_no_other_way(
    lanes: Lanes, fabric: FaultyFabric, theirs: str, num_lanes: int
) -> None:
    source, state = lanes.transport(fabric=theirs), make_state(nbytes=24 * MIB)
    destination = lanes.destination(make_state(2, nbytes=24 * MIB), fabric=NAME).start(source.metadata())
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    assert destination.join().sound(state)
    assert destination.report.peers[0].num_lanes == num_lanes


def test_where_no_endpoint_can_be_made_tcp_serves(
    lanes: Lanes, fabric: FaultyFabric, caplog: pytest.LogCaptureFixture
) -> None:
    fabric.fail_to_make()
    destination, _ = begun(lanes)
    assert destination.join().sound(make_state())
    assert destination.report.peers[0].nbytes_direct == 0
    assert f"cannot be read by {NAME}: RuntimeError: failed to create transport" in caplog.text


def test_each_destination_has_the_fabric_that_it_shares_with_who_supplies_it(
    lanes: Lanes, fabric: FaultyFabric
) -> None:
    """The first two are one after the other in the chain, and so have each other's."""
    source, state = lanes.transport(fabric=NAME), make_state()
    source.send_checkpoint([1, 2, 3, 4], STEP, envelope(state), TIMEOUT)
    found = []
    for name in (NAME, NAME, "auto", "tcp"):
        found.append(lanes.destination(make_state(2), fabric=name, lanes=1).start(source.metadata()))
        wait_until(lambda: len([peer for peer in sent(source) if peer.nbytes]) == len(found))
    assert all(destination.join().sound(state) for destination in found)
    assert [destination.report.peers[0].nbytes_direct > 0 for destination in found] == [True, True, False, False]
    for destination in found:
        destination.transport.disallow_checkpoint()
    source.disallow_checkpoint()


def sent(source: LaneTransport[Any]) -> list[PeerReport]:
    report = source.last_report
    assert report is not None
    return report.peers


@pytest.mark.parametrize("soon", [True, False], ids=["given up", "waited for"])
@pytest.mark.parametrize("hangs", [0, 1], ids=["the destination's", "the source's"])
def test_a_backend_that_does_not_even_begin(
    lanes: Lanes, fabric: FaultyFabric, monkeypatch: pytest.MonkeyPatch, hangs: int, soon: bool
) -> None:
    """The destination makes its end first. TCP serves then, unless the deadline passes before: nothing is written."""
    monkeypatch.setattr(_fabric, "_CLOSING", timedelta(milliseconds=10))
    # Longer than anybody may be silent: nobody has asked for anything yet, or the source says that it lives.
    monkeypatch.setattr(_fabric, "OPENING", (1.3 if soon else 20) * STALL)
    go_on, made = threading.Event(), fabric._new
    register(NAME, lambda: made() if fabric.num_made != hangs else (go_on.wait(20), made())[1])
    try:
        destination, source = begun(lanes, timeout=TIMEOUT if soon else 2 * STALL)
        destination.join()
        if soon:
            assert destination.sound(make_state())
            assert destination.report.peers[0].nbytes_direct == 0
        else:
            assert isinstance(destination.error, TransferTimeout)
            assert not destination.transport.torn
            assert digest(destination.template) == digest(make_state(2))
        source.shutdown()
    finally:
        go_on.set()


def test_a_backend_that_is_taken_down_goes_on_for_who_has_it(lanes: Lanes, fabric: FaultyFabric) -> None:
    fabric.delay_at(1)
    destination, _ = begun(lanes, lanes=1)
    wait_until(lambda: fabric.num_late == 1)
    fabric.close()
    assert destination.join().sound(make_state())
    assert destination.report.peers[0].nbytes_direct > MOST * destination.report.nbytes_total


def test_a_read_that_dies_is_fetched_over_tcp(lanes: Lanes, fabric: FaultyFabric) -> None:
    fabric.die_at(2)
    destination, _ = begun(lanes, lanes=1)
    assert destination.join().sound(make_state())
    assert fabric.num_reads == 3, "the lanes that follow are without it"
    assert 0 < destination.report.peers[0].nbytes_direct <= 2 * 4 * MIB


def test_a_read_that_is_late_is_waited_for(lanes: Lanes, fabric: FaultyFabric) -> None:
    """Longer than a peer may be silent: it is not, for it says on the lane that it lives."""
    fabric.delay_at(1)
    destination, _ = begun(lanes, lanes=1)
    wait_until(lambda: fabric.num_late == 1)
    assert destination.thread is not None
    destination.thread.join(2 * STALL.total_seconds())
    assert destination.thread.is_alive()
    fabric.land()
    assert destination.join().sound(make_state())
    assert destination.report.peers[0].nbytes_direct > MOST * destination.report.nbytes_total


@pytest.mark.parametrize("fault", ["stall_at", "delay_at", "forget_at"])
def test_the_deadline_holds_and_nothing_is_written_after_it(lanes: Lanes, fabric: FaultyFabric, fault: str) -> None:
    """The backend still writes, before its endpoint could be closed or after: not to the template."""
    getattr(fabric, fault)(1)
    destination, _ = begun(lanes, lanes=1, timeout=3 * STALL)
    destination.join()
    assert isinstance(destination.error, TransferTimeout)
    assert destination.seconds < 5 * STALL.total_seconds()
    assert land_late(fabric, destination) == 1


def test_what_was_read_wrong_is_read_again(lanes: Lanes, fabric: FaultyFabric, monkeypatch: pytest.MonkeyPatch) -> None:
    """As is what the source has changed between its digest and the read."""
    left, digests = [1], _session.xxhash.xxh3_64

    class Wrong:
        def __init__(self) -> None:
            self._inner = digests()
            self.update = self._inner.update

        def intdigest(self) -> int:
            wrong, left[:] = bool(left) and threading.current_thread().name == "ft_transport-lane", []
            return int(self._inner.intdigest()) ^ wrong

    monkeypatch.setattr(_session.xxhash, "xxh3_64", Wrong)
    destination, _ = begun(lanes, lanes=1)
    assert destination.join().error is None
    monkeypatch.undo()
    assert destination.sound(make_state())


def test_a_chain_reads_from_the_one_before(lanes: Lanes, fabric: FaultyFabric) -> None:
    source, state = lanes.transport(fabric=NAME), make_state()
    source.send_checkpoint([1, 2], STEP, envelope(state), TIMEOUT)
    found = [lanes.destination(make_state(2), fabric=NAME).start(source.metadata()) for _ in range(2)]
    assert all(destination.join().sound(state) for destination in found)
    for destination in found:
        assert destination.report.peers[0].nbytes_direct > 0
        destination.transport.disallow_checkpoint()
    source.disallow_checkpoint()


def test_a_source_that_ends_shuts_its_readers_out(
    lanes: Lanes, fabric: FaultyFabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its endpoint is closed when the call returns, though a read stands still at the other end."""
    fabric.stall_at(1)
    destination, source = begun(lanes, lanes=1)
    wait_until(lambda: fabric.num_late == 1)
    close = _Transport.close
    monkeypatch.setattr(_Transport, "close", lambda self, *, timeout: (pause(0.3), close(self, timeout=timeout)))
    source.shutdown()
    assert fabric.num_open <= 1
    assert isinstance(destination.join().error, PeerFailure)
    land_late(fabric, destination)


def test_shutdown_ends_a_read_that_stands_still(lanes: Lanes, fabric: FaultyFabric) -> None:
    fabric.stall_at(1)
    destination, _ = begun(lanes, lanes=1)
    wait_until(lambda: fabric.num_late == 1)
    destination.transport.shutdown()
    assert isinstance(destination.join().error, LocalProtocolError)
    land_late(fabric, destination)


def test_a_source_whose_memory_is_exchanged_voids_what_was_read(lanes: Lanes, fabric: FaultyFabric) -> None:
    fabric.delay_at(0)
    source, state = lanes.transport(fabric=NAME), make_state()
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    destination = lanes.destination(make_state(2), fabric=NAME, lanes=1).start(source.metadata())
    wait_until(lambda: fabric.num_late == 1)
    state["large"][2].data = state["large"][2].clone()
    fabric.land()
    destination.join()
    assert isinstance(destination.error, TransferError)
    assert "large" in str(destination.error)


@pytest.mark.parametrize("given_back", [True, False], ids=["given back", "exchanged"])
def test_a_destination_whose_memory_is_taken_away_is_told(lanes: Lanes, fabric: FaultyFabric, given_back: bool) -> None:
    """Not by the end of its process, nor by what came for a memory in the place of which there is another."""
    fabric.delay_at(0)
    destination, _ = begun(lanes, lanes=1)
    wait_until(lambda: fabric.num_late == 1)
    assert destination.template is not None
    for tensor in destination.template["large"]:
        if given_back:
            tensor.untyped_storage().resize_(0)
        else:
            tensor.data = torch.full_like(tensor, 9)
    fabric.land()
    assert isinstance(destination.join().error, LocalProtocolError)
    assert "large" in str(destination.error)
    assert given_back or all(bool((tensor == 9).all()) for tensor in destination.template["large"])
