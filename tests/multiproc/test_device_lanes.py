"""Lanes with states on accelerators that a stand-in plays: passed on in a chain, resumed, repaired, beside.

``make simulated`` runs all of ``test_lanes.py`` on a simulated one; here is what each run of the tests shows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ft_transport.errors import PeerFailure
from ft_transport.testing import StandInAccelerator

from .test_lanes import STEP, TIMEOUT, Lanes, cut_at, envelope, lanes, make_state, tensors

__all__ = ["lanes"]  # a fixture


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(*pair) for pair in zip(tensors(one), tensors(other), strict=True))


def put(devices: StandInAccelerator, state: dict[str, Any], index: int) -> dict[str, Any]:
    for tensor in tensors(state):
        devices.put(tensor, index)
    return state


@pytest.mark.parametrize("topology", ["chain", "star"])
def test_two_destinations(lanes: Lanes, topology: str) -> None:
    state, templates = make_state(), [make_state(2), make_state(3)]
    with StandInAccelerator(2) as devices:
        put(devices, state, 0)
        source = lanes.transport(topology=topology)
        receiving = [lanes.destination(put(devices, template, 1)).start(source.metadata()) for template in templates]
        source.send_checkpoint([1, 2], STEP, envelope(state), TIMEOUT)
        for destination in receiving:
            assert destination.join().error is None
        source.disallow_checkpoint()
        for destination in receiving:
            destination.transport.disallow_checkpoint()
            assert destination.report.in_place_share == 1.0
        assert source.last_report is not None
        sent = sum(peer.nbytes_wire for peer in source.last_report.peers)
        assert (sent < 1.5 * source.last_report.nbytes_total) == (topology == "chain")
    assert all(same(template, state) for template in templates)


def test_the_next_attempt_moves_only_the_rest(lanes: Lanes) -> None:
    """What is on the device by then is read from there, and compared."""
    state, template = make_state(large=10), make_state(2, large=10)
    total = sum(tensor.numel() for tensor in tensors(state))
    with StandInAccelerator(2) as devices:
        put(devices, state, 0)
        put(devices, template, 1)
        dying, healthy = lanes.transport(), lanes.transport()
        proxy = lanes.proxy(dying.metadata())
        destination = lanes.destination(template, lanes=1, on_progress=cut_at(proxy, 0.7)).start(proxy.metadata)
        dying.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
        assert isinstance(destination.join().error, PeerFailure)
        dying.shutdown()
        healthy.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
        assert destination.start(healthy.metadata()).join().error is None
        healthy.disallow_checkpoint()
        destination.transport.disallow_checkpoint()
        report = destination.report
        assert report.nbytes_kept + report.peers[0].nbytes == report.nbytes_total == total
        assert report.nbytes_kept >= 0.5 * total
    assert same(template, state)


def test_a_flipped_bit_is_repaired_before_it_is_on_the_device(lanes: Lanes) -> None:
    state, template = make_state(), make_state(2)
    flipped: list[int] = []

    def tamper(number: int, way: str, position: int, data: bytes) -> bytes:
        if way == "down" and not flipped and position > 1 << 20:
            flipped.append(position)
            return data[:1] + bytes([data[1] ^ 1]) + data[2:]
        return data

    with StandInAccelerator(2) as devices:
        put(devices, state, 0)
        put(devices, template, 1)
        source = lanes.transport()
        proxy = lanes.proxy(source.metadata(), tamper)
        destination = lanes.destination(template, lanes=1).start(proxy.metadata)
        source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
        assert destination.join().error is None
        source.disallow_checkpoint()
        destination.transport.disallow_checkpoint()
        assert flipped
        assert destination.report.num_repaired == 1
    assert same(template, state)
