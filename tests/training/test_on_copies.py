"""Others' optimizers: what they begin with is seen on copies, shown to be right, or refused."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import difference

import ft_transport
from ft_transport import materialize
from ft_transport._training.on_copies import CannotMaterialize


class Own(torch.optim.Optimizer):
    """Counts its steps in a Python number, and keeps momentum and the product of its decay."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def begin(self, group: dict[str, Any], param: torch.Tensor) -> dict[str, Any]:
        return {"step": 0, "product": torch.tensor(1.0), "momentum": torch.zeros_like(param)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state.update(self.begin(group, param))
                state["step"] += 1
                state["product"].mul_(0.9)
                state["momentum"].lerp_(param.grad, 0.1)
                param.add_(state["momentum"] / (1 - state["product"]), alpha=-group["lr"] / state["step"])


class Master(Own):
    """Keeps a copy of the parameter."""

    def begin(self, group: dict[str, Any], param: torch.Tensor) -> dict[str, Any]:
        return {**super().begin(group, param), "master": param.clone()}


class Rate(Own):
    """Keeps the first learning rate."""

    def begin(self, group: dict[str, Any], param: torch.Tensor) -> dict[str, Any]:
        return {**super().begin(group, param), "rate": group["lr"]}


class Windowed(Own):
    """Keeps the last gradients in a deque."""

    def begin(self, group: dict[str, Any], param: torch.Tensor) -> dict[str, Any]:
        return {**super().begin(group, param), "last": deque([torch.zeros_like(param)], 2)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for param, state in self.state.items():
            state["last"].append(param.grad.clone())
            param.sub_(sum(state["last"]), alpha=0.01)


class Incomparable:
    """As arrays of NumPy are, of which == gives another array."""

    def __eq__(self, other: object) -> Any:
        raise ValueError("the truth of this is ambiguous")


class Opaque(Own):
    """Keeps what cannot be compared."""

    def begin(self, group: dict[str, Any], param: torch.Tensor) -> dict[str, Any]:
        return {**super().begin(group, param), "array": Incomparable()}


class Wrapper(torch.optim.Optimizer):
    """Has the state and the groups of another one, as properties."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.defaults = inner.defaults

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.inner.state

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.inner.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()


@pytest.mark.parametrize("kind", [Own, Windowed])
def test_training_is_bit_equal_with_and_without(kind: type[Own]) -> None:
    trained = []
    for make in (materialize, lambda optimizer: None):
        params = [torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)), torch.nn.Parameter(torch.ones(()))]
        optimizer = kind(params)
        make(optimizer)
        for number in range(20):
            for param in params:
                param.grad = torch.sin(param.detach() * (number + 1))
            optimizer.step()
        trained.append({"params": params, "optimizer": optimizer.state_dict()})
    assert difference(*trained) == ""


def test_the_state_is_that_before_a_step_and_nothing_else_has_changed() -> None:
    param, calls = torch.nn.Parameter(torch.ones(3, 4)), []
    optimizer = Own([param])
    optimizer.register_step_pre_hook(lambda *args: calls.append(args))
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    calls.clear()
    numbers, version = torch.get_rng_state(), param._version
    materialize(optimizer)
    assert {name: optimizer.state[param][name] for name in ("step", "product")} == {"step": 0, "product": 1.0}
    assert optimizer.state[param]["momentum"].eq(0).all()
    assert (calls, param.grad, param._version) == ([], None, version)
    assert torch.equal(torch.get_rng_state(), numbers)


@pytest.mark.parametrize("kind", [Master, Rate])
def test_what_depends_on_more_than_shapes_is_refused(kind: type[Own]) -> None:
    optimizer = kind([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(CannotMaterialize, match=f"{kind.__name__}.*depends on more than the parameters' shapes"):
        materialize(optimizer)
    assert not optimizer.state


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Opaque, "Opaque cannot .*its state cannot be compared .ValueError: the truth"),
        (lambda params: Wrapper(Own(params)), "Wrapper cannot .*no copy of it can be made .AttributeError"),
    ],
)
def test_what_cannot_be_tried_is_refused_and_only_said_by_bind(
    make: Callable[[Any], torch.optim.Optimizer], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = make(model.parameters())
    with pytest.raises(CannotMaterialize, match=why):
        materialize(optimizer)
    ft_transport.bind(model=model, optimizers=optimizer)
    assert not optimizer.state
    assert "received into fresh memory" in caplog.text
