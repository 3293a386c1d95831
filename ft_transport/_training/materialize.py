"""An optimizer's state before its first step, so that a heal finds memory to land in.

torch's optimizers make their state in their first step. A replica that heals before then has a model, but no momentum:
two thirds of what arrives finds no place, and lands in fresh memory, which is slow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim import Optimizer

from ft_transport._training.first_state import first_state, is_torchs_own
from ft_transport._training.on_copies import CannotMaterialize, OnCopies
from ft_transport._training.provisional import is_provisional, take_away_unless_healed

__all__ = ["CannotMaterialize", "materialize"]

# They begin with what they see of the loss, or of which rows have gradients.
_REFUSED = {
    torch.optim.LBFGS: "it depends on the loss around it",
    torch.optim.SparseAdam: "its gradients are sparse, and have no shape that is known",
}
# How the optimizers are named inside of those that wrap one (torchft's OptimizerWrapper, ZeroRedundancyOptimizer, …).
_WRAPPED = ("optim", "optimizer")


def materialize(optimizer: Optimizer) -> None:
    """Make the state that the optimizer's first step would begin with, for each parameter that has none yet.

    Training goes on from there, to the bit, as if this had not been called. Parameters and gradients are only read, no
    step is taken, no hook, closure or scheduler runs, no random number is drawn. What a parameter already has is left
    alone, so this may be called at any time, and again. Frozen parameters get nothing, as in a step.

    Call it where model and optimizer are as they will train (device, dtype, wrapped for FSDP), before the first heal::

        optimizer = torch.optim.AdamW(model.parameters())
        ft_transport.materialize(optimizer)

    All of torch.optim but LBFGS and SparseAdam. Others' optimizers (torchao's, your own) are stepped on copies of
    one parameter at a time, to see what they begin with, and further steps on copies show whether that is right.

    SGD, Rprop and ASGD begin with the first gradient, or with the learning rate at the time, so what they get here is
    there to be healed. If it has not been when the first step is taken, it is taken away before that, in a step
    hook of this optimizer. A heal counts however it came: in place, or through ``load_state_dict``. Copies of an
    optimizer (``copy.deepcopy``, ``pickle``) have no hooks, whosever: call this for the copy as well.

    Memory: the state, and a gradient of the largest parameter; stepped on copies, some times the latter.

    Args:
        optimizer: Also one that is wrapped in torchft's ``OptimizerWrapper``.

    Raises:
        TypeError: It is not an optimizer, or its state cannot be known before its first step (LBFGS, SparseAdam; those
            that begin with the values of parameters, as master weights do; those that communicate in their steps). The
            message says which and why.
        ValueError: A parameter has no memory yet (on the meta device, or lazy).
        RuntimeError: torch's own, for a parameter that this optimizer does not take.

    After an error: optimizer, parameters and gradients are as they were.
    Threading: while the optimizer does not step and nothing is loaded into it; forward and backward may run.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    optimizer = _innermost(optimizer)
    with torch.no_grad():
        made = _all_first_states(optimizer)
    # All of them or none: what fails has failed by now.
    for param, state in made.items():
        optimizer.state[param].update(state)
    if is_torchs_own(optimizer) and is_provisional(optimizer):
        take_away_unless_healed(optimizer)


def _innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer that steps, where one only passes on what another one holds."""
    for name in _WRAPPED:
        inner = getattr(optimizer, name, None)
        if isinstance(inner, Optimizer) and inner.state is optimizer.state:
            return _innermost(inner)
    return optimizer


def _all_first_states(optimizer: Optimizer) -> dict[torch.Tensor, dict[str, Any]]:
    make = _maker(optimizer)
    made: dict[torch.Tensor, dict[str, Any]] = {}
    for group, param in _without_state(optimizer):
        if param not in made and (state := make(group, param)):
            made[param] = state
    return made


def _maker(optimizer: Optimizer) -> Callable[[dict[str, Any], torch.Tensor], dict[str, Any]]:
    """What gives a parameter's first state."""
    for kind, why in _REFUSED.items():
        if isinstance(optimizer, kind):
            raise CannotMaterialize(optimizer, why)
    if is_torchs_own(optimizer):
        return lambda group, param: first_state(optimizer, group, param)
    return OnCopies(optimizer).first_state


def _without_state(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
    """Parameters that a step could take and has not taken, with their groups."""
    for index, group in enumerate(optimizer.param_groups):
        for position, param in enumerate(group["params"]):
            if _has_state(optimizer, param) or not (param.requires_grad or _has_gradient(param)):
                continue
            if param.is_meta or torch.nn.parameter.is_lazy(param):
                where = f"parameter {position} of group {index}"
                raise ValueError(f"{where} has no memory yet: {type(param).__name__} on {param.device}")
            yield group, param


def _has_state(optimizer: Optimizer, param: torch.Tensor) -> bool:
    # Not optimizer.state[param]: that would make an entry. SGD has been seen to leave None.
    return any(value is not None for value in optimizer.state.get(param, {}).values())


def _has_gradient(param: torch.Tensor) -> bool:
    return param.is_leaf and param.grad is not None
