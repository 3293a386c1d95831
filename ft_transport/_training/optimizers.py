"""An optimizer's state dict, and a load that keeps the tensors that are there.

torch's own load replaces the state by what it is given, cast to the parameters' dtype: a state of float32 beside
parameters of bfloat16 is not what it was afterwards, and what was received in place is copied once more. Here a tensor
that fits is written to, one that has no counterpart is taken over as it is.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from operator import is_
from typing import Any

import torch
from torch.optim import Optimizer

from ft_transport._training.first_state import shell
from ft_transport._training.memory import is_dtensor, is_plain, same_bits, same_memory, same_spec

__all__ = ["OptimizerState"]

# How this replica computes, not what: they depend on its devices.
_LOCAL = ("capturable", "foreach", "fused")
# Wrappers that override state_dict, but only for who asks: what they hold is the inner one's. Not all of torch's are
# such: PostLocalSGDOptimizer has a count of its own.
_ZERO = "ZeroRedundancyOptimizer"
_ATOMIC = (int, float, complex, bool, str, bytes, type(None))
_WRAPPED = ("optim", "optimizer")


def innermost(optimizer: Any) -> Any:
    """The optimizer that steps, where others only pass on what it holds."""
    while type(optimizer).__module__.startswith("torchft.") or _is_zero(optimizer):
        inner = [getattr(optimizer, name, None) for name in _WRAPPED]
        found = next((each for each in inner if isinstance(each, Optimizer)), None)
        if found is None:
            break
        optimizer = found
    return optimizer


def _is_zero(optimizer: Any) -> bool:
    return type(optimizer).__name__ == _ZERO and type(optimizer).__module__.startswith("torch.distributed.optim.")


class OptimizerState:
    """The state of one optimizer.

    One that overrides ``state_dict`` or ``load_state_dict``, or has hooks for its state dict, is asked itself, each
    time.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = innermost(optimizer)
        # It has groups of its own, which schedulers change, and copies them to the inner one's before each step.
        self._outer = optimizer if _is_zero(optimizer) else None

    def state_dict(self) -> dict[str, Any]:
        """As ``optimizer.state_dict()``."""
        optimizer = self._optimizer
        if self._outer is not None:
            _pass_groups_on(self._outer, optimizer)
        if _is_called(optimizer):
            return optimizer.state_dict()  # type: ignore[no-any-return]
        indices: dict[int, int] = {}
        groups, begin = [], 0
        for group in optimizer.param_groups:
            # Of one that is twice in a group, the last place counts, and the first group of one that is in several.
            found = {id(param): index for index, param in enumerate(group["params"], begin)}
            indices.update((key, index) for key, index in found.items() if key not in indices)
            packed = {name: value for name, value in group.items() if name != "params"}
            packed["params"] = [indices[id(param)] for param in group["params"]]
            groups.append(packed)
            begin += len(group["params"])
        # A copy of each: the thread that trains may add to them.
        state = {
            indices[id(param)] if isinstance(param, torch.Tensor) else param: dict(values)
            if type(values) is dict
            else copy.copy(values)
            for param, values in list(optimizer.state.items())
        }
        return {"state": state, "param_groups": groups}

    def prepare(self, state: Mapping[str, Any]) -> Callable[[], None]:
        """Find out how to load a state, without writing anything; what is returned loads it.

        Raises:
            ValueError: torch's own, for other parameter groups.
        """
        optimizer = self._optimizer
        if _loads_itself(optimizer):
            return partial(_load_by_itself, optimizer, state)
        state = dict(state)
        for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
            state = hook(optimizer, state) or state
        for name in ("state", "param_groups"):
            if name not in state:
                kind = type(optimizer).__name__
                raise ValueError(f"the state of {kind} has no {name!r}, expected as state_dict() gives it")
        saved, groups = state["param_groups"], optimizer.param_groups
        if [len(group["params"]) for group in saved] != [len(group["params"]) for group in groups]:
            _let_torch_refuse(optimizer, state)
        copies = _Copies()
        merged = _states(optimizer, state, copies)
        new_groups = [_group(group, given, copies) for group, given in zip(groups, saved, strict=True)]
        return partial(_write, optimizer, merged, new_groups, copies, self._outer)


def _pass_groups_on(optimizer: Any, other: Any) -> None:
    """Let the groups of another optimizer have the values of this one's, but for the parameters."""
    for group, target in zip(optimizer.param_groups, other.param_groups, strict=True):
        target.update({name: value for name, value in group.items() if name != "params"})


def _is_called(optimizer: Any) -> bool:
    """Whether only the optimizer itself can say what its state is."""
    if not isinstance(optimizer, Optimizer) or "state_dict" in optimizer.__dict__:
        return True
    if type(optimizer).state_dict is not Optimizer.state_dict:
        return True
    return bool(optimizer._optimizer_state_dict_pre_hooks or optimizer._optimizer_state_dict_post_hooks)


def _loads_itself(optimizer: Any) -> bool:
    if not isinstance(optimizer, Optimizer) or "load_state_dict" in optimizer.__dict__:
        return True
    return type(optimizer).load_state_dict is not Optimizer.load_state_dict


def _load_by_itself(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Have the optimizer load, and put back what torch's own load, which most of them end in, has cast on the way."""
    optimizer.load_state_dict(state)
    if not isinstance(optimizer, Optimizer) or not isinstance(state, Mapping):
        return
    given, groups = state.get("state"), state.get("param_groups")
    if not isinstance(given, Mapping) or not isinstance(groups, list):
        return  # a form of its own
    for group, saved in zip(optimizer.param_groups, groups, strict=False):
        for param, index in zip(group["params"], saved.get("params", ()), strict=False):
            if index in given and param in optimizer.state:
                optimizer.state[param] = _uncast(optimizer.state[param], given[index], param)


def _uncast(loaded: Any, given: Any, param: torch.Tensor) -> Any:
    """What was loaded, with the tensors that were given where all that was done to them is a cast."""
    if isinstance(loaded, torch.Tensor) and isinstance(given, torch.Tensor):
        moved = given.to(device=loaded.device)
        is_cast = loaded.dtype == param.dtype != given.dtype and same_bits(loaded, moved.to(dtype=loaded.dtype))
        return moved if is_cast else loaded
    if isinstance(loaded, dict) and isinstance(given, Mapping):
        loaded.update({name: _uncast(loaded[name], part, param) for name, part in given.items() if name in loaded})
    elif type(loaded) is type(given) and isinstance(loaded, (list, tuple, deque)) and len(loaded) == len(given):
        parts = [_uncast(*pair, param) for pair in zip(loaded, given, strict=True)]
        if not all(map(is_, parts, loaded)):
            return deque(parts, given.maxlen) if isinstance(given, deque) else type(loaded)(parts)
    return loaded


def _let_torch_refuse(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Raise what torch's own load raises; nothing is written."""
    probe = shell(optimizer, {name: value for name, value in optimizer.__dict__.items() if "hooks" not in name})
    probe._optimizer_load_state_dict_pre_hooks = {}
    probe.param_groups = optimizer.param_groups
    Optimizer.load_state_dict(probe, state)
    raise ValueError("loaded state dict has other parameter groups")


def _states(optimizer: Optimizer, state: Mapping[str, Any], copies: _Copies) -> tuple[list[Any], list[Any]] | None:
    """The optimizer's state as it shall be, its keys and its values; None if the dicts are there as they shall be."""
    # By identity: a tensor's hash is a function in Python.
    here = {id(param): values for param, values in optimizer.state.items()}
    places: dict[Any, tuple[torch.Tensor, dict[str, Any]]] = {}
    for group, given in zip(optimizer.param_groups, state["param_groups"], strict=True):
        for index, param in zip(given["params"], group["params"], strict=True):
            places[index] = param, group
    keys, made = [], []
    for index, values in state["state"].items():
        param, group = places.get(index, (None, {}))
        live = optimizer.state.get(index) if param is None else here.get(id(param))
        keys.append(index if param is None else param)
        made.append(live if _is_there(live, values) else _merged(live, values, copies, partial(_adopted, param, group)))
    unchanged = [*map(id, keys)] == [*here] and all(map(is_, made, here.values()))
    return None if unchanged else (keys, made)


def _is_there(live: Any, values: Any) -> bool:
    """Whether a parameter's state has been received in place, all of it."""
    if type(live) is not dict or type(values) is not dict or len(live) != len(values):
        return False
    return all(map(is_, values.values(), map(live.get, values)))


def _group(group: dict[str, Any], given: Mapping[str, Any], copies: _Copies) -> dict[str, Any]:
    """A parameter group as it shall be."""
    kept = {name: group[name] for name in ("params", *_LOCAL) if name in group}
    names = {"param_names": group["param_names"]} if "param_names" in group and "param_names" not in given else {}
    made = {
        name: kept[name] if name in kept else _merged(group.get(name), value, copies, _copied)
        for name, value in given.items()
    }
    return {**made, **{name: value for name, value in kept.items() if name not in made}, **names}


class _Copies:
    """What has to be copied, with where to."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Any, Any]] = []
        self._taken: set[int] = set()

    def take(self, live: Any, value: torch.Tensor) -> bool:
        """Whether a live tensor shall have the value. Once only: an optimizer may hold one under several names."""
        if not _fits(live, value) or id(live) in self._taken:
            return False
        self._taken.add(id(live))
        if not same_memory(live, value):
            self.pairs.append((live, value))
        return True


def _merged(
    live: Any, value: Any, copies: _Copies, adopt: Callable[[torch.Tensor, object], Any], name: object = None
) -> Any:
    """A value to load, under this name, with the live tensors in it wherever one can take what it has."""
    if live is value or type(value) in _ATOMIC:
        return value
    if isinstance(value, torch.Tensor):
        return live if copies.take(live, value) else adopt(value, name)
    if isinstance(value, dict):
        known = live if isinstance(live, dict) else {}
        return {each: _merged(known.get(each), part, copies, adopt, each) for each, part in value.items()}
    if type(value) in (list, tuple):
        parts = live if isinstance(live, (list, tuple)) and len(live) == len(value) else [None] * len(value)
        return type(value)(_merged(part, given, copies, adopt) for part, given in zip(parts, value, strict=True))
    return copy.deepcopy(value)


def _fits(live: Any, value: Any) -> bool:
    """Whether a tensor can become equal to another one to the bit by being written to."""
    if not isinstance(live, torch.Tensor) or live.dtype != value.dtype or live.shape != value.shape or live.is_meta:
        return False
    if is_dtensor(live):
        return is_dtensor(value) and same_spec(live, value)
    return is_plain(live) and is_plain(value)


def _copied(value: torch.Tensor, name: object) -> torch.Tensor:
    return copy.deepcopy(value)


def _adopted(param: torch.Tensor | None, group: dict[str, Any], value: torch.Tensor, name: object) -> torch.Tensor:
    """A tensor of a state as torch's own load takes it, but never cast."""
    if param is None:
        return value
    # Of a parameter that is a number itself, so is its momentum: there the name alone tells a count, as torch has it.
    is_count = name == "step" or (value.dim() == 0 and param.dim() != 0)
    if is_count and not (group.get("capturable") or group.get("fused")):
        return value  # or a product of numbers: where the optimizer reads it without waiting for a device
    return value.to(device=param.device)


def _write(
    optimizer: Optimizer,
    merged: tuple[list[Any], list[Any]] | None,
    groups: list[dict[str, Any]],
    copies: _Copies,
    outer: Any = None,
) -> None:
    with torch.no_grad():
        for live, value in copies.pairs:
            live.copy_(value)
    # Not others in their place, as torch does: wrappers and schedulers may hold these.
    if merged is not None:
        state = dict(zip(*merged, strict=True))
        # Another thread that reads meanwhile finds each entry, as it was or as it shall be.
        if list(map(id, optimizer.state)) != list(map(id, state)):
            optimizer.state.clear()  # for the order
        optimizer.state.update(state)
    for group, made in zip(optimizer.param_groups, groups, strict=True):
        group.clear()
        group.update(made)
    if outer is not None:
        _pass_groups_on(optimizer, outer)
    # What a class has to say of older states.
    optimizer.__setstate__({"state": optimizer.state, "param_groups": optimizer.param_groups})
    for hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        hook(optimizer)
