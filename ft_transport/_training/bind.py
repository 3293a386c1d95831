"""What a Manager and a transport ask of a training job, made from its parts.

A job has a model, an optimizer, a scheduler, a loader; both ask for two functions. Written by hand these call
``state_dict()`` of each part, which runs hooks (FSDP2's disturbs a forward in another thread), and ``load_state_dict``
of each, which copies what has been received in place once more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from ft_transport._training.materialize import CannotMaterialize, materialize
from ft_transport._training.modules import ModuleState
from ft_transport._training.optimizers import OptimizerState

__all__ = ["Bound", "bind"]

logger = logging.getLogger("ft_transport")

_NAMES = ("model", "optim", "schedulers")


class _Part(Protocol):
    def state_dict(self) -> Any: ...

    def prepare(self, state: Any) -> Callable[[], None]: ...


def bind(
    *,
    model: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module] | None = None,
    optimizers: Any = None,
    schedulers: Any = None,
    extra: Mapping[str, Any] | None = None,
    materialize: bool = True,
) -> Bound:
    """Make the two functions that a Manager and a transport ask for from the parts of a training job::

        bound = ft_transport.bind(model=model, optimizers=adam, schedulers=scheduler, extra={"scaler": scaler})
        transport = ft_transport.LaneTransport(timeout, device, state_dict=bound.state_dict)
        manager = Manager(..., state_dict=bound.state_dict, load_state_dict=bound.load_state_dict,
                          checkpoint_transport=transport)

    Call it where model and optimizers are as they will train (device, dtype, wrapped for DDP or FSDP, compiled).

    Args:
        model: A module, or several: a sequence, or a mapping of names.
        optimizers: One or several, also wrapped in torchft's ``OptimizerWrapper``.
        schedulers: Of learning rates, one or several.
        extra: Others by the names that they have in the state: whatever has ``state_dict()`` and ``load_state_dict()``
            (a ``GradScaler``, metrics), modules and optimizers too. A loader is each replica's own: not here.
        materialize: Make the optimizers' first states (see :func:`materialize`). One where that cannot be done is
            named in a warning; until its first step, its state arrives in fresh memory.

    Returns:
        The functions.

    Raises:
        TypeError: A part is not what its name says; FSDP1, whose ``state_dict()`` communicates; a module with FSDP2's
            parameters that overrides ``state_dict``, or has a hook for it. The message names the module.
        ValueError: A name in ``extra`` is that of another part, or an optimizer whose first state shall be made has a
            parameter without memory.
    """
    parts: dict[str, Any] = {}
    if model is not None:
        parts["model"] = _each(model, _module, "model")
    if optimizers is not None:
        parts["optim"] = _each(optimizers, _optimizer, "optimizers")
    if schedulers is not None:
        parts["schedulers"] = _each(schedulers, _other, "schedulers")
    if extra is not None and not isinstance(extra, Mapping):
        raise TypeError(f"extra: expected a mapping of names to objects, got {type(extra).__name__}")
    for name, value in (extra or {}).items():
        if name in _NAMES:
            raise ValueError(f"extra: {name!r} is the name of another part; choose another one")
        parts[name] = _any(value, f"extra[{name!r}]")
    if materialize:
        _each(optimizers if optimizers is not None else (), _materialize, "optimizers")
    return Bound(parts)


class Bound:
    """The state of a training job as one tree, and its way back. Made by :func:`bind`.

    The tree is ``{"model": …, "optim": …, "schedulers": …}`` and each of ``extra`` by its name; parts that were not
    given are absent. Each is what the part's own ``state_dict()`` gives; several are nested as they were given.
    """

    def __init__(self, parts: dict[str, Any]) -> None:
        self._parts = parts

    def state_dict(self) -> dict[str, Any]:
        """The state, in the tensors that are trained.

        Modules are not called, so their hooks do not run, and a forward or backward may run meanwhile: parameters of
        FSDP2 are its sharded ones, whatever the modules hold at the moment. Compiled modules have the keys of those
        that are not (no ``_orig_mod.``). Where only a part's own code knows its state, that is called: extra state of
        modules, modules and optimizers that override ``state_dict`` or have hooks for it, schedulers, ``extra``.

        Threading: any thread.
        """
        return {name: _map(part, lambda one: one.state_dict()) for name, part in self._parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state over, as each part's own ``load_state_dict`` does; what is there already is not copied.

        Optimizers' tensors are written to where one is there, else taken as they are, never cast; entries that
        the state has not are dropped; ``capturable``, ``foreach`` and ``fused`` stay as they are here.

        Args:
            state: As :meth:`state_dict` gives it, of another replica.

        Raises:
            ValueError: A part is missing, left over or of another form, or there are other parameter groups.
            RuntimeError: torch's own, for a model of other keys or shapes.
            Exception: What a part's own function raises.
        After an error that is named here: nothing was loaded, unless a module loads in a way of its own (an override, a
            load hook); then, and after another error, some of it may have been.
        Threading: the thread that trains, outside of forward, backward and step, as the Manager does.
        """
        _check_names(self._parts, state, "state")
        loads = [load for name, part in self._parts.items() for load in _prepared(part, state[name], name)]
        for load in loads:
            load()


class _Object:
    """Whatever has a state dict."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def state_dict(self) -> Any:
        return self._value.state_dict()

    def prepare(self, state: Any) -> Callable[[], None]:
        return lambda: self._value.load_state_dict(state)


def _each(value: Any, make: Callable[[Any, str], Any], name: str) -> Any:
    """What is made of one, or of each of several."""
    if isinstance(value, Mapping) and not hasattr(value, "load_state_dict"):
        return {key: make(one, f"{name}[{key!r}]") for key, one in value.items()}
    if isinstance(value, Sequence) and not hasattr(value, "load_state_dict"):
        return [make(one, f"{name}[{index}]") for index, one in enumerate(value)]
    return make(value, name)


def _map(part: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(part, dict):
        return {name: function(one) for name, one in part.items()}
    if isinstance(part, list):
        return [function(one) for one in part]
    return function(part)


def _module(value: Any, name: str) -> _Part:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name}: expected a torch.nn.Module, got {type(value).__name__}")
    return ModuleState(value)


def _optimizer(value: Any, name: str) -> _Part:
    return OptimizerState(value) if isinstance(value, Optimizer) else _other(value, name)


def _other(value: Any, name: str) -> _Part:
    for function in ("state_dict", "load_state_dict"):
        if not callable(getattr(value, function, None)):
            raise TypeError(f"{name}: expected an object with {function}(), got {type(value).__name__}")
    return _Object(value)


def _any(value: Any, name: str) -> _Part:
    return _module(value, name) if isinstance(value, nn.Module) else _optimizer(value, name)


def _materialize(optimizer: Any, name: str) -> None:
    if not isinstance(optimizer, Optimizer):
        kind = type(optimizer).__name__
        logger.warning("%s: its first state cannot be made, since %s is no torch.optim.Optimizer", name, kind)
        return
    try:
        materialize(optimizer)
    except CannotMaterialize as exc:
        logger.warning("%s: %s; until then it is received into fresh memory", name, exc)


def _prepared(part: Any, state: Any, path: str) -> list[Callable[[], None]]:
    if isinstance(part, dict):
        _check_names(part, state, path)
        return [_one_prepared(one, state[name], f"{path}[{name!r}]") for name, one in part.items()]
    if isinstance(part, list):
        if not isinstance(state, Sequence) or isinstance(state, str):
            raise ValueError(f"{path}: expected a list, the state has {_a(state)}; nothing was loaded")
        if len(part) != len(state):
            raise ValueError(f"{path}: expected {len(part)} of them, the state has {len(state)}; nothing was loaded")
        return [_one_prepared(one, state[index], f"{path}[{index}]") for index, one in enumerate(part)]
    return [_one_prepared(part, state, path)]


def _one_prepared(part: _Part, state: Any, path: str) -> Callable[[], None]:
    # A module refuses it with torch's words, and what another object's own function takes is its affair.
    if isinstance(part, OptimizerState):
        _check_mapping(state, path)
    return part.prepare(state)


def _check_mapping(state: Any, path: str) -> None:
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: expected a dict, the state has {_a(state)}; nothing was loaded")


def _a(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _check_names(parts: Mapping[str, Any], state: Mapping[str, Any], path: str) -> None:
    _check_mapping(state, path)
    missing = ", ".join(sorted(map(str, parts.keys() - state.keys()))) or "none"
    unexpected = ", ".join(sorted(map(str, state.keys() - parts.keys()))) or "none"
    if missing != "none" or unexpected != "none":
        raise ValueError(f"{path}: missing {missing}, unexpected {unexpected}; nothing was loaded")
