"""What the first step of an optimizer of torch.optim finds as its state, one parameter at a time.

Strategy: they make their state in ``_init_group``, for the parameters that have a gradient. It is called here on a
*shell*: an object of the optimizer's class, with its settings, but with a state of its own and a parameter of its own,
which shares the memory of the user's and has a gradient of zeros. So nothing of the user's is written to, not even for
a moment: another thread may be in forward or backward meanwhile.

SGD has no such function: its momentum *is* the first gradient. What stands for it is zeros with the sign bit set,
since ``momentum * -0.0 + gradient`` is that gradient to the bit, and with ``+0.0`` it would not be, where a gradient is
``-0.0``. Where the first step does other arithmetic, see ``provisional.py``.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from typing import Any

import torch
from torch.optim import Optimizer

__all__ = ["first_state", "is_torchs_own", "shell", "zeros_for"]


def is_torchs_own(optimizer: Optimizer) -> bool:
    """Whether torch.optim alone decides what the state is: in a class of its own, or one that overrides neither."""
    # torch's decorators keep the module's name, and learning rate schedulers wrap the instance's step, not the class's.
    functions = (type(optimizer).step, getattr(type(optimizer), "_init_group", None))
    return all(getattr(function, "__module__", "").startswith("torch.optim.") for function in functions)


def first_state(optimizer: Optimizer, group: dict[str, Any], param: torch.Tensor) -> dict[str, Any]:
    """The state of a parameter before its first step; empty if such an optimizer keeps none.

    Args:
        optimizer: For which :func:`is_torchs_own` holds.
        group: The parameter's group.

    Raises:
        RuntimeError: torch's own, for a parameter that this optimizer does not take.
    """
    alias = param.detach()
    alias.grad = zeros_for(param, alias)
    if isinstance(optimizer, torch.optim.SGD):
        return {"momentum_buffer": _negative_zeros(alias.grad)} if group["momentum"] != 0 else {}
    made = shell(optimizer, optimizer.__dict__)
    lists: dict[str, list[Any]] = {
        name: [] for name in inspect.signature(made._init_group).parameters if name != "group"
    }
    made._init_group({**group, "params": [alias]}, **lists)
    return dict(made.state.get(alias, {}))


def _negative_zeros(zeros: torch.Tensor) -> torch.Tensor:
    # Of a complex number fill_() would set the sign of one half alone.
    (torch.view_as_real(zeros) if zeros.is_complex() else zeros).fill_(-0.0)
    return zeros


def shell(optimizer: Optimizer, attributes: dict[str, Any]) -> Any:
    """An optimizer of the same class, with these attributes, but with neither state nor parameters."""
    made = object.__new__(type(optimizer))
    made.__dict__.update(attributes)
    made.state = defaultdict(dict)
    made.param_groups = []
    return made


def zeros_for(param: torch.Tensor, alias: torch.Tensor) -> torch.Tensor:
    """A gradient of zeros, of the dtype and with the strides that backward gives a parameter.

    Args:
        alias: What shall have it; it learns which dtype it may have.
    """
    if getattr(param, "is_leaf", False) and hasattr(param, "grad_dtype"):  # torch 2.10 and later
        alias.grad_dtype = param.grad_dtype
    # As backward does: the parameter's own strides, unless there are gaps between its elements.
    dense = torch.ops.aten.is_non_overlapping_and_dense(alias)
    layout = torch.preserve_format if dense else torch.contiguous_format
    return torch.zeros_like(alias, dtype=getattr(alias, "grad_dtype", None), memory_format=layout)
