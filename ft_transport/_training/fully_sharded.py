"""What a module that ``fully_shard`` has taken over trains, whatever it holds at the moment.

Between a gather and the next reshard ``module.weight`` is a full tensor, and what is written to it is lost; the
parameter that the optimizer steps is kept apart. ``state_dict()`` reshards first, in a hook, which breaks a forward
that runs in another thread: it finds plain tensors and DTensors mixed. So it is read from where FSDP2 keeps it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

__all__ = ["is_fsdp1", "is_fsdp_hook", "reshard", "sharded_params"]

_HOOKS = "torch.distributed.fsdp._fully_shard"


def sharded_params(module: nn.Module) -> dict[tuple[int, str], Callable[[], nn.Parameter]]:
    """For each parameter that FSDP2 manages, by its module's id and its name there: what gives its sharded one."""
    found = {}
    for param in _fsdp_params(module):
        info = param._module_info
        shared = zip(info.shared_modules, info.shared_param_names, strict=True)
        for owner, name in [(info.module, info.param_name), *shared]:
            found[id(owner), name] = _getter(param)
    return found


def _getter(param: Any) -> Callable[[], nn.Parameter]:
    # Read each time: to() and the like replace it.
    return lambda: param.sharded_param


def _fsdp_params(module: nn.Module) -> Iterator[Any]:
    # Whoever has such a module has imported it, which takes a second.
    imported = sys.modules.get("torch.distributed.fsdp")
    kind: Any = getattr(imported, "FSDPModule", None)
    for each in module.modules() if kind is not None else ():
        if isinstance(each, kind):
            state: Any = each._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.12 and later: several
            for group in groups if groups is not None else [state._fsdp_param_group]:
                yield from group.fsdp_params if group is not None else ()


def is_fsdp1(module: nn.Module) -> bool:
    """Whether it is wrapped in ``FullyShardedDataParallel``, whose ``state_dict()`` communicates."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    return kind is not None and isinstance(module, kind)


def is_fsdp_hook(hook: Any) -> bool:
    """Whether a state-dict hook is FSDP2's own."""
    return str(getattr(getattr(hook, "hook", hook), "__module__", "")).startswith(_HOOKS)


def reshard(module: nn.Module) -> None:
    """Let go of what is gathered, as torch's own load does: it would compute on with what was there before."""
    for each in module.modules():
        for hook in each._load_state_dict_pre_hooks.values():
            if is_fsdp_hook(hook):
                getattr(hook, "hook", hook)()
