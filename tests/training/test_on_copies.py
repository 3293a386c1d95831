"""Others' optimizers: what they begin with is seen on copies, shown to be right, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import difference

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


def test_training_is_bit_equal_with_and_without() -> None:
    trained = []
    for make in (materialize, lambda optimizer: None):
        params = [torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)), torch.nn.Parameter(torch.ones(()))]
        optimizer = Own(params)
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
