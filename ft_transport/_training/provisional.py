"""State that only the first step can make as it shall be: what stands for it goes before that step, if it is as it was.

Three optimizers of torch.optim begin with what they find in their first step: ``SGD`` with the gradient itself, where a
step from zeros would dampen it; ``Rprop`` and ``ASGD`` with the learning rate, which a scheduler may have changed by
then. What ``materialize`` makes for them is a place for a heal to land in. If none has landed when the optimizer steps,
it is taken away, and torch makes its own.

Whether one has landed is read from the state itself, not remembered: no step was taken from a state whose ``step`` is
0, or whose momentum is ``-0.0`` throughout. So it does not matter how the state got there (in place, through
``load_state_dict``, or both), and it is the same on all replicas: one that healed at step 0, from a source that has not
stepped yet, begins as its source does.

What is mistaken for untouched: momentum that is ``-0.0`` in every element after real steps (``maximize`` with gradients
of zero), in an SGD with dampening that was just loaded or materialized.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.optim import ASGD, SGD, Optimizer, Rprop

__all__ = ["is_provisional", "take_away_unless_healed"]

# Optimizers that have the hooks, and those whose next step is the first since materialize or a load. Weak, and apart
# from the optimizers: nothing of this is in what they copy, pickle or return from state_dict().
_watched: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_unstepped: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def is_provisional(optimizer: Optimizer) -> bool:
    """Whether what is materialized for such an optimizer may have to go before its first step."""
    return isinstance(optimizer, (SGD, Rprop, ASGD))


def take_away_unless_healed(optimizer: Optimizer) -> None:
    """From now on, before the first step and before each that follows a load, see what no step was taken from."""
    _unstepped.add(optimizer)
    if optimizer not in _watched:
        _watched.add(optimizer)
        optimizer.register_step_pre_hook(_before_step)
        optimizer.register_load_state_dict_post_hook(_unstepped.add)


def _before_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
    # A step that is compiled as one graph can do nothing by the data. It has no sparse gradients either, so that SGD
    # without dampening needs nothing done.
    if not torch.compiler.is_compiling() or _depends_on_data(optimizer):
        _take_away(optimizer)


def _depends_on_data(optimizer: Optimizer) -> bool:
    return not isinstance(optimizer, SGD) or any(g["dampening"] != 0 or g["fused"] for g in optimizer.param_groups)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _take_away(optimizer: Optimizer) -> None:
    if optimizer not in _unstepped:
        return
    _unstepped.discard(optimizer)
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state.get(param)
            if state and _shall_go(group, param, state):
                # To the names in the state dict, and to their order, as if nothing had been made: what this step will
                # make lies where it lay, and what it will not is not there.
                state.clear()
                if param.grad is None:
                    del optimizer.state[param]


def _shall_go(group: dict[str, Any], param: torch.Tensor, state: dict[str, Any]) -> bool:
    """Whether the first step would begin with something else, and has not been taken."""
    if "step" in state:
        return float(state["step"]) == 0
    momentum = state.get("momentum_buffer")
    return momentum is not None and not _stands_for(group, param, momentum) and _is_untouched(momentum)


def _stands_for(group: dict[str, Any], param: torch.Tensor, momentum: torch.Tensor) -> bool:
    """Whether a step from ``-0.0`` is, to the bit, the one from nothing."""
    # A product of complex numbers loses the sign of zero; a sparse gradient becomes sparse momentum; a step that is
    # differentiated through begins with momentum that is not; fused kernels differ in bfloat16.
    sparse = param.is_leaf and param.grad is not None and param.grad.layout != momentum.layout
    return group["dampening"] == 0 and not (
        momentum.is_complex() or sparse or group["differentiable"] or group["fused"]
    )


def _is_untouched(momentum: torch.Tensor) -> bool:
    if momentum.layout != torch.strided:
        return False
    local: torch.Tensor = momentum.to_local() if hasattr(momentum, "to_local") else momentum  # of a DTensor
    parts = torch.view_as_real(local) if local.is_complex() else local
    return not parts.any() and bool(parts.signbit().all())
