"""What is read of the Manager among the callers; here one that is made of nothing but a module's name."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torchft.local_sgd import _StreamingDiLoCoFragment

from ft_transport import LocalProtocolError
from ft_transport._torchft.manager import RegisteredState, calling_manager, goes_on_training


def called_by(manager: object, call: Callable[[], Any], *, through: int = 0) -> Any:
    """Call from a method of a Manager, through so many wrappers."""
    wrapped = call
    for _ in range(through):
        wrapped = lambda inner=wrapped: inner()  # noqa: E731
    scope: dict[str, Any] = {"__name__": "torchft.manager"}
    exec("def method(self, call): return call()", scope)
    return scope["method"](manager, wrapped)


def test_the_manager_among_the_callers_is_found() -> None:
    manager = SimpleNamespace()
    assert calling_manager() is None
    assert called_by(manager, calling_manager) is manager
    assert called_by(manager, calling_manager, through=20) is manager


def test_how_far_up_one_looks_is_bounded() -> None:
    """It is asked in every step, and a test or a server may have a deep stack."""
    assert called_by(SimpleNamespace(), calling_manager, through=100) is None


def test_the_nearest_manager_is_the_one() -> None:
    inner, outer = SimpleNamespace(), SimpleNamespace()
    assert called_by(outer, lambda: called_by(inner, calling_manager)) is inner


@pytest.mark.parametrize(("asynchronous", "expected"), [(True, True), (False, False)])
def test_whether_training_goes_on(asynchronous: bool, expected: bool) -> None:
    assert goes_on_training(SimpleNamespace(_use_async_quorum=asynchronous)) is expected
    assert goes_on_training(None) is True


def test_a_manager_that_does_not_say_is_an_error() -> None:
    """Either guess makes wrong states: what training wrote undone, or what forward wrote kept."""
    with pytest.raises(LocalProtocolError, match="does not say whether training goes on"):
        goes_on_training(SimpleNamespace())


def test_what_is_registered() -> None:
    states = {"default": lambda: {"w": 1}, "fragment": lambda: {"v": 2}}
    manager = SimpleNamespace(_user_state_dicts=states)
    assert called_by(manager, RegisteredState()) == {"default": {"w": 1}, "fragment": {"v": 2}}


def test_a_key_that_is_registered_meanwhile() -> None:
    """DiLoCo registers its fragments from the training thread."""
    states: dict[str, Callable[[], object]] = {}
    states["default"] = lambda: states.update(late=lambda: 2)
    assert called_by(SimpleNamespace(_user_state_dicts=states), RegisteredState()) == {"default": None}
    assert "late" in states


def registered_fragment() -> tuple[_StreamingDiLoCoFragment, SimpleNamespace]:
    """A fragment of torchft's, and a Manager that has it."""
    states: dict[str, Callable[[], object]] = {}
    manager = SimpleNamespace(
        _user_state_dicts=states, register_state_dict_fn=lambda key, load, save: states.update({key: save})
    )
    module = torch.nn.Linear(3, 2)
    outer = torch.optim.SGD(module.parameters(), lr=0.7)
    fragment = _StreamingDiLoCoFragment(manager, module, 0, 1, outer, outer, 1)
    fragment.save_parameters()
    fragment.register_state_dict_fn()
    return fragment, manager


def test_the_originals_of_a_fragment_are_its_own_tensors() -> None:
    """So that they are received in place; torchft's function gives copies."""
    fragment, manager = registered_fragment()
    (gives,) = manager._user_state_dicts.values()
    found = called_by(manager, RegisteredState())["StreamingDiLoCoFragment_0"]
    assert found.keys() == gives().keys()
    assert list(found["original_parameters"]) == list(gives()["original_parameters"]) == ["weight", "bias"]
    for name, tensor in fragment.original_parameters.items():
        assert found["original_parameters"][name] is tensor
        assert gives()["original_parameters"][name] is not tensor, "torchft's function gives the tensors themselves"


def test_a_fragment_that_gives_something_else_is_taken_at_its_word() -> None:
    fragment, manager = registered_fragment()
    fragment.original_parameters["new"] = torch.zeros(1)
    (key,) = manager._user_state_dicts
    given = {"original_parameters": {"weight": 1}}
    self = fragment
    manager._user_state_dicts[key] = lambda: given if self else None
    assert called_by(manager, RegisteredState())[key] is given


@pytest.mark.parametrize("manager", [None, SimpleNamespace()])
def test_nothing_is_registered_without_a_manager(manager: object) -> None:
    with pytest.raises(LocalProtocolError, match="state_dict='manager': expected to be called by a Manager"):
        called_by(manager, RegisteredState())
