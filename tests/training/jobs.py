"""Small training jobs: every optimizer of torch.optim in its variants, over parameters of every kind."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

FOUND = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, Optimizer) and kind is not Optimizer
}
REFUSED = {"LBFGS", "SparseAdam"}
# What each is tried with, beside what it is by default.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "Adadelta": [{"foreach": True}, {"maximize": True, "weight_decay": 0.1}],
    "Adafactor": [{"foreach": True}, {"lr": torch.tensor(0.01)}, {"maximize": True}],
    "Adagrad": [{"foreach": True}, {"fused": True}, {"lr_decay": 0.1, "initial_accumulator_value": 0.5}],
    "Adam": [
        {"amsgrad": True},
        {"foreach": True, "amsgrad": True},
        {"fused": True, "amsgrad": True},
        {"foreach": False, "maximize": True},
        {"lr": torch.tensor(0.01), "weight_decay": 0.1},
        {"decoupled_weight_decay": True, "weight_decay": 0.1},
    ],
    "AdamW": [{"amsgrad": True}, {"fused": True}, {"foreach": True}],
    "Adamax": [{"foreach": True}, {"maximize": True, "weight_decay": 0.1}],
    "ASGD": [{"foreach": True}, {"t0": 3, "weight_decay": 0.1}],
    "Muon": [{"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"}],
    "NAdam": [{"foreach": True}, {"decoupled_weight_decay": True, "weight_decay": 0.1}],
    "RAdam": [{"foreach": True}, {"decoupled_weight_decay": True, "weight_decay": 0.1}],
    "RMSprop": [{"centered": True, "momentum": 0.9}, {"foreach": True, "momentum": 0.9}, {"weight_decay": 0.1}],
    "Rprop": [{"foreach": True}, {"maximize": True}],
    "SGD": [
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.9, "dampening": 0.5, "foreach": True, "maximize": True},
        {"momentum": 0.9, "foreach": True},
        {"momentum": 0.9, "fused": True},
        {"momentum": 0.9, "dampening": 0.5, "fused": True},
        {"momentum": 0.9, "maximize": True, "weight_decay": 0.1, "foreach": False},
    ],
}


class Case(NamedTuple):
    """An optimizer, its options, and the dtype of what it optimizes."""

    name: str
    options: dict[str, Any]
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        options = "-".join(
            f"{name}={float(v) if isinstance(v, torch.Tensor) else v}" for name, v in self.options.items()
        )
        return "-".join(filter(None, [self.name, options, str(self.dtype).removeprefix("torch.")]))

    def optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        return FOUND[self.name](groups, **{name: _own(value) for name, value in self.options.items()})  # type: ignore[call-arg]


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


CASES = [
    Case(name, options, dtype)
    for name in sorted(set(FOUND) - REFUSED)
    for options in [{}, *VARIANTS.get(name, [])]
    for dtype in (torch.float32, torch.bfloat16)
]


@dataclass
class Job:
    """Parameters in two groups, an optimizer, and a scheduler that begins at a tenth of the learning rate.

    The last two parameters are one that never gets a gradient, and one that gets its first late.
    """

    params: list[torch.nn.Parameter]
    optimizer: Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    first_of_late: int
    stepped: set[int] = field(default_factory=set)

    def step(self, number: int) -> None:
        for index, param in enumerate(self.params):
            late = index == len(self.params) - 1 and number < self.first_of_late
            never = index == len(self.params) - 2
            param.grad = None if late or never or not param.requires_grad else gradient(param, index, number)
            self.stepped |= {index} if param.grad is not None else set()
        self.optimizer.step()
        self.scheduler.step()

    def run(self, begin: int, end: int) -> Job:
        for number in range(begin, end):
            self.step(number)
        return self

    def state_dict(self) -> dict[str, Any]:
        return {
            "params": self.params,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    @property
    def trained(self) -> dict[str, Any]:
        """What steps have changed: without what was made for parameters that have had no gradient yet."""
        made = self.state_dict()
        state = made["optimizer"]["state"]
        made["optimizer"]["state"] = {index: state[index] for index in sorted(self.stepped) if index in state}
        return made


def job(case: Case, seed: int = 0, before_scheduler: Callable[[Optimizer], object] = lambda optimizer: None) -> Job:
    """Args: before_scheduler: What is done with the optimizer before the scheduler changes its learning rates."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        [(4, 6), (6, 3), (5, 5), (3, 4), (4, 2)] if case.name == "Muon" else [(4, 6), (7,), (), (2, 3, 2, 2), (3, 3)]
    )
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(case.dtype)) for shape in shapes]
    params.insert(1, torch.nn.Parameter(torch.randn(6, 4, generator=generator).to(case.dtype).t()))
    params.insert(2, torch.nn.Parameter(torch.randn(3, 3, generator=generator).to(case.dtype), requires_grad=False))
    optimizer = case.optimizer([{"params": params[:4]}, {"params": params[4:], "weight_decay": 0.05}])
    before_scheduler(optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: min(1.0, 0.1 * (epoch + 1)))
    # torch's fused SGD fails on its own where a parameter has no momentum yet and others have.
    late = 0 if case.name == "SGD" and case.options.get("fused") else 3
    return Job(params, optimizer, scheduler, late)


def gradient(param: torch.Tensor, index: int, number: int) -> torch.Tensor:
    """With zeros of either sign in it, and at first nothing else in that of the second parameter."""
    made = _gradient(param.shape, param.dtype, index, number)
    return torch.empty_like(param).copy_(made)  # with the parameter's strides, as backward does


@functools.lru_cache(maxsize=10_000)
def _gradient(shape: torch.Size, dtype: torch.dtype, index: int, number: int) -> torch.Tensor:
    """Made once: all optimizers get the same."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(100 * number + index)).to(dtype)
    flat = made.reshape(-1)
    if index == 1 and number < 2:
        flat.mul_(0)
    flat[::3] = 0.0
    flat[1::4] = -0.0
    return flat.view(shape)
