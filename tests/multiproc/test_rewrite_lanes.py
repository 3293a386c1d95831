"""What forward writes while a state lands over lanes, and after that."""

from __future__ import annotations

from typing import Any

import pytest

from ft_transport import Progress, TornStateError

from .harness import digest
from .test_lanes import STEP, TIMEOUT, Destination, Lanes, envelope, heal, make_state
from .test_lanes import lanes as lanes  # the fixture


def commit(destination: Destination) -> dict[str, Any]:
    destination.transport.metadata()
    destination.transport.disallow_checkpoint()
    assert destination.template is not None
    return {**destination.template, "lr": 0.1}  # plain values are for load_state_dict


@pytest.mark.parametrize("options", [{}, {"shadow": True}, {"skip_unchanged": True}], ids=str)
def test_small_tensors_are_written_again(lanes: Lanes, options: dict[str, Any]) -> None:
    destination = heal(lanes, make_state(), **options)
    assert destination.template is not None
    for tensor in destination.template["small"].values():
        tensor.zero_()
    assert digest(commit(destination)) == digest(make_state())


def test_small_tensors_that_were_there_already(lanes: Lanes) -> None:
    """Nothing of them travels, and they are kept all the same."""
    state = make_state()
    source = lanes.transport()
    destination = lanes.destination(make_state(), skip_unchanged=True).start(source.metadata())
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    destination.join()
    source.disallow_checkpoint()
    assert destination.report.nbytes_kept == destination.report.nbytes_total
    assert destination.template is not None
    for tensor in destination.template["small"].values():
        tensor.zero_()
    assert digest(commit(destination)) == digest(state)


def test_large_tensors_that_forward_writes_while_they_land(lanes: Lanes) -> None:
    """They are fetched again, beside the template."""
    template = make_state(2)
    numbers: list[int] = []

    def write(progress: Progress) -> None:
        numbers.append(progress.nbytes_done)
        template["large"][0].add_(1)

    source = lanes.transport()
    destination = Destination(lanes.transport(lambda: template, lanes=1, on_progress=write), template)
    destination.start(source.metadata())
    state = make_state()
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    destination.join()
    source.disallow_checkpoint()
    assert destination.error is None
    assert numbers
    template["large"][0].add_(1)
    assert digest(commit(destination)) == digest(state)
    assert destination.report.peers[0].nbytes == destination.report.nbytes_total, "each byte counts once"
    assert not destination.transport.torn


def test_large_tensors_that_forward_writes_afterwards(lanes: Lanes) -> None:
    destination = heal(lanes, make_state())
    assert destination.template is not None
    destination.template["large"][1][5] ^= 1
    destination.transport.metadata()
    with pytest.raises(TornStateError, match=r"large\.1 after the state had landed"):
        destination.transport.disallow_checkpoint()
    assert destination.transport.torn


def test_what_loading_writes_is_no_change(lanes: Lanes) -> None:
    destination = heal(lanes, make_state())
    assert destination.template is not None
    for tensor in destination.template["large"]:
        tensor.copy_(tensor)
    assert digest(commit(destination)) == digest(make_state())


def test_a_relay_passes_on_what_came(lanes: Lanes) -> None:
    """Not what forward has made of it: the one behind gets the source's bytes of everything, from the one before."""
    template = make_state(2)

    def write(progress: Progress) -> None:
        template["large"][0].add_(1)
        template["small"]["bias 0"].zero_()

    source, state = lanes.transport(), make_state()
    first = Destination(lanes.transport(lambda: template, on_progress=write), template)
    second = lanes.destination(make_state(3))
    first.start(source.metadata())
    second.start(source.metadata())
    source.send_checkpoint([1, 2], STEP, envelope(state), TIMEOUT)
    for each in (first, second):
        each.join()
        assert each.error is None
    source.disallow_checkpoint()
    for each in (first, second):
        assert digest(commit(each)) == digest(state)
