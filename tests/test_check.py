"""What a heal would be like, said before there is one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import CPU, Config, Point, noise, snapshot, succeed
from states import STATES, model_and_optimizer

import ft_transport
from ft_transport import LocalProtocolError, RemoteProtocolError, StateCheck, check_state_dict
from ft_transport._options import Options
from ft_transport._telemetry.report import Copies

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


@pytest.fixture
def _allowed() -> Iterator[None]:
    with torch.serialization.safe_globals([Point, Config]):
        yield


@pytest.mark.usefixtures("_allowed")
@pytest.mark.parametrize("name", STATES)
def test_what_is_said_is_what_a_heal_does(name: str) -> None:
    template = STATES[name](2)
    # A callback that gives the same objects, as a model's does.
    check = check_state_dict(lambda: template)
    report = succeed(
        STATES[name](1), lambda: template, destination_options=Options(CPU, copies=Copies())
    ).destination.report
    assert (check.num_leaves, check.nbytes) == (report.num_leaves, report.nbytes_total)
    assert check.not_in_place == report.not_in_place


def test_a_state_that_heals_in_place() -> None:
    state = model_and_optimizer(1)
    before = snapshot(state)
    check = check_state_dict(lambda: state)
    assert check == StateCheck(12, 3 * (64 * 2 + 1) * 4, {})
    assert str(check) == "12 leaves, 0.0 MB, all received in place"
    assert snapshot(state) == before


def test_copies_are_named() -> None:
    state = {"a": noise((512, 1000), 1), "b": noise(3, 2)}
    check = check_state_dict(lambda: {**state, "c": state["b"].clone()})
    assert list(check.not_in_place) == ["c"]
    assert str(check).startswith(
        "3 leaves, 2.0 MB, 1 leaf not received in place, first c: the state_dict callback gives"
    )


def test_bytes_are_counted_once() -> None:
    weight = noise(100, 1)
    assert check_state_dict(lambda: {"a": weight, "tied": weight, "rows": weight[10:20]}).nbytes == 400


def test_all_that_cannot_travel_is_named() -> None:
    state = {"w": noise(2, 1), "lock": threading.Lock(), "hook": lambda: None}
    with pytest.raises(LocalProtocolError, match=r"lock: a value of class lock .*; hook: a value of class function"):
        check_state_dict(lambda: state)
    given_back = {"w": torch.zeros(5)}
    given_back["w"].untyped_storage().resize_(0)
    with pytest.raises(LocalProtocolError, match=r"w: a tensor of .* has no memory"):
        check_state_dict(lambda: given_back)


def test_a_class_that_the_receiver_does_not_allow() -> None:
    state = {"w": noise(2, 1), "config": Config(3)}
    with pytest.raises(RemoteProtocolError, match=r"config: class .*Config is not allowed; .*add_safe_globals"):
        check_state_dict(lambda: state)
    with torch.serialization.safe_globals([Config]):
        assert check_state_dict(lambda: state).num_leaves == 2


def test_a_callback_that_raises_or_is_none() -> None:
    with pytest.raises(LocalProtocolError, match="the transport's state_dict raised KeyError: 'model'"):
        check_state_dict(lambda: {}["model"])
    state: Any = {"w": noise(2, 1)}
    with pytest.raises(TypeError, match="state_dict: expected the function that gives it, got dict"):
        check_state_dict(state)


def test_a_bound_job() -> None:
    model = torch.nn.Linear(4, 4)
    adam = torch.optim.AdamW(model.parameters())
    bound = ft_transport.bind(model=model, optimizers=adam)
    with torch.device("meta"), torch.inference_mode():
        assert check_state_dict(bound.state_dict).not_in_place == {}
