"""What the first step of somebody's own optimizer begins with: seen in a step on copies, and then shown to be right.

Strategy: nobody can know how an optimizer makes its state, but all of them put it into ``optimizer.state[parameter]``.
So one steps on a copy, whose state remembers what was *first* put under each name: a step count before it is counted
up, momentum before the first gradient enters. The copy has one parameter, of zeros, with a gradient of zeros.

That is a guess. It holds if a step from it is, to the bit, a step from nothing: two steps are taken from either, on
other copies, with other values, gradients and learning rates, and parameters and states compared. Whatever the state
depends on beside shape and dtype shows as a difference (values of parameters, as master weights do; gradients; learning
rates), and then the optimizer is refused: such a state, made too early, would be wrong later.

Copies are as large as one parameter at a time. Steps are taken without the hooks of anyone, and eagerly where they
compile themselves.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from ft_transport._training.first_state import shell, zeros_for
from ft_transport._training.memory import same_bits

__all__ = ["CannotMaterialize", "OnCopies"]

_HOOKS = {
    f"_optimizer_{when}_hooks"
    for when in (
        "step_pre",
        "step_post",
        "state_dict_pre",
        "state_dict_post",
        "load_state_dict_pre",
        "load_state_dict_post",
    )
}
# Attributes that a copy does not have: the parameters, and what of the user's would run (schedulers wrap step).
_LEFT_OUT = _HOOKS | {"state", "param_groups", "step"}
# What a copy finds where the optimizer keeps a parameter of its own. Writing to that would be writing to the user's.
_ABSENT = object()
_COLLECTIVES = {"c10d", "c10d_functional", "_c10d_functional"}


class CannotMaterialize(TypeError):
    """The state of such an optimizer cannot be known before its first step. Nothing has changed."""

    def __init__(self, optimizer: Optimizer, why: str) -> None:
        super().__init__(f"the state of {type(optimizer).__name__} cannot be made before its first step: {why}")


class OnCopies:
    """Steps on copies of one parameter at a time.

    Args:
        optimizer: Read alone.

    Raises:
        CannotMaterialize: It has attributes that cannot be copied.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        params = {id(param): _ABSENT for group in optimizer.param_groups for param in group["params"]}
        kept = {name: value for name, value in optimizer.__dict__.items() if name not in _LEFT_OUT}
        try:
            self._attributes = copy.deepcopy(kept, params)
        except Exception as exc:
            raise CannotMaterialize(optimizer, f"its attributes cannot be copied ({_words(exc)})") from exc

    def first_state(self, group: dict[str, Any], param: torch.Tensor) -> dict[str, Any]:
        """The state of a parameter before its first step; empty if such an optimizer keeps none.

        Raises:
            CannotMaterialize: A step on copies fails, or shows that it depends on more than the parameter's shape.
        """
        guess = self._guess(group, param)
        if guess and not self._are_same(self._steps_from({}, group, param), self._steps_from(guess, group, param)):
            why = "it depends on more than the parameters' shapes (on their values, gradients, or the learning rate)"
            raise CannotMaterialize(self._optimizer, why)
        return guess

    def _are_same(self, one: Any, other: Any) -> bool:
        try:
            return same_bits(one, other)
        except Exception as exc:
            raise CannotMaterialize(self._optimizer, f"its state cannot be compared ({_words(exc)})") from exc

    def _guess(self, group: dict[str, Any], param: torch.Tensor) -> dict[str, Any]:
        made = self._copy(group, param, 0)
        made.state = _Remembering()
        with _alone(param):
            self._step(made, 0)
        (target,) = made.param_groups[0]["params"]
        state = made.state.get(target, _First())
        if set(made.state) - {target} or set(state.first) != set(state):
            raise CannotMaterialize(self._optimizer, "it keeps state that belongs to no parameter, or drops some")
        return dict(state.first)

    def _steps_from(self, state: dict[str, Any], group: dict[str, Any], param: torch.Tensor) -> tuple[Any, ...]:
        """What two steps make of a parameter, and of its state."""
        made = self._copy(group, param, 1)
        (target,) = made.param_groups[0]["params"]
        if state:
            made.state[target] = _copied(state)
        with _alone(param):
            for seed in (2, 3):
                _set_rate(made.param_groups[0], 0.01 * seed)
                self._step(made, seed)
        return target, dict(made.state[target])

    def _copy(self, group: dict[str, Any], param: torch.Tensor, seed: int) -> Any:
        try:
            made = shell(self._optimizer, copy.deepcopy(self._attributes))
        except Exception as exc:  # as a wrapper does whose state and groups are properties
            raise CannotMaterialize(self._optimizer, f"no copy of it can be made ({_words(exc)})") from exc
        made.__dict__.update({name: {} for name in _HOOKS})
        target = torch.nn.Parameter(_values(torch.zeros_like(param.detach()), seed))
        if hasattr(target, "grad_dtype") and param.is_leaf:
            target.grad_dtype = param.grad_dtype
        options = {name: value for name, value in group.items() if name not in ("params", "param_names")}
        made.param_groups = [{**copy.deepcopy(options), "params": [target]}]
        return made

    def _step(self, made: Any, seed: int) -> None:
        (target,) = made.param_groups[0]["params"]
        target.grad = _values(zeros_for(target, target), seed)
        try:
            _unhooked(type(made).step)(made)
        except Exception as exc:
            raise CannotMaterialize(self._optimizer, f"a step on copies fails ({_words(exc)})") from exc


class _First(dict[Any, Any]):
    """The state of one parameter, and what was put first under each of its names."""

    def __init__(self, values: Mapping[Any, Any] | None = None) -> None:
        super().__init__()
        self.first: dict[Any, Any] = {}
        self.update(values or {})

    def __setitem__(self, name: Any, value: Any) -> None:
        if name not in self.first:
            self.first[name] = _copied(value)
        super().__setitem__(name, value)

    # dict's own do not go through __setitem__.
    def setdefault(self, name: Any, value: Any = None) -> Any:
        if name not in self:
            self[name] = value
        return self[name]

    def update(self, *args: Any, **kwargs: Any) -> None:
        for name, value in dict(*args, **kwargs).items():
            self[name] = value


class _Remembering(defaultdict[Any, Any]):
    """An optimizer's state, for each parameter a :class:`_First`."""

    def __init__(self) -> None:
        super().__init__(_First)

    def __setitem__(self, param: Any, state: Any) -> None:
        super().__setitem__(param, state if isinstance(state, _First) else _First(state))

    def setdefault(self, param: Any, state: Any = None) -> Any:
        if param not in self:
            self[param] = state
        return self[param]


class _NoCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses to communicate: the other ranks may not be about to do the same, and nobody would ever answer."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in _COLLECTIVES:
            raise RuntimeError(f"it communicates, by {func}")
        if any(_is_subclass(kind) for kind in types):
            return NotImplemented  # it does what it does by operations of its own, which come here then
        return func(*args, **(kwargs or {}))


def _is_subclass(kind: type) -> bool:
    return issubclass(kind, torch.Tensor) and kind not in (torch.Tensor, torch.nn.Parameter)


@contextmanager
def _alone(param: torch.Tensor) -> Iterator[None]:
    """A step leaves no trace in generators of random numbers, finds them as it found them last time, and stays here."""
    device = param.device
    devices = [] if device.type == "cpu" else [device]
    forked = torch.random.fork_rng(devices, device_type=device.type if devices else "cuda")
    with forked, torch.compiler.set_stance("force_eager"), _NoCollectives():  # type: ignore[no-untyped-call]
        yield


def _unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step without what torch wraps around each class's, which calls the hooks of all optimizers as well."""
    around = Optimizer.profile_hook_step(lambda self: None).__code__
    return step.__wrapped__ if getattr(step, "__code__", None) is around else step  # type: ignore[attr-defined]


def _values(zeros: torch.Tensor, seed: int) -> torch.Tensor:
    """Fill in values between -0.5 and 0.5 that repeat nowhere, without random numbers; leave zeros for seed 0."""
    if seed:
        local: torch.Tensor = zeros.to_local() if hasattr(zeros, "to_local") else zeros  # of a DTensor, its own memory
        spread = torch.arange(1, local.numel() + 1, device=local.device, dtype=torch.float64)
        local.copy_(spread.mul_(0.6180339887 * seed).frac_().sub_(0.5).view(local.shape))
    return zeros


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group.get("lr"), torch.Tensor):
        group["lr"].fill_(rate)
    elif isinstance(group.get("lr"), float):
        group["lr"] = rate


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copied(part) for name, part in value.items()}
    if isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value):
        # Not by clone(), which some have not (torchao's quantized states).
        names, context = value.__tensor_flatten__()
        parts = {name: _copied(getattr(value, name)) for name in names}
        return type(value).__tensor_unflatten__(parts, context, value.shape, value.stride())
    return copy.deepcopy(value)


def _words(exc: BaseException) -> str:
    """Of an error, as much as fits into another one's message."""
    return f"{type(exc).__name__}: {str(exc).partition(chr(10))[0]}"
