"""A module's state dict without calling the module, and a load that only copies what is not there yet.

Strategy: walk the modules once and remember which tensors they hold (a *plan*); each time, see that they hold the same
ones, and that these still have the memory that the leaves have. What only a module's own code can say is asked each
time: extra state, and modules that override ``state_dict`` or have hooks for it.

Loading is torch's own wherever anything is unusual: other keys, other shapes, other kinds of tensors, modules that load
in a way of their own.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ft_transport._training.fully_sharded import is_fsdp1, is_fsdp_hook, reshard, sharded_params
from ft_transport._training.memory import Aliases, is_dtensor, is_plain, same_memory, same_spec

__all__ = ["ModuleState", "without_compiled"]

_EXTRA = "_extra_state"
_COMPILED = "_orig_mod"
# torch's own that override how they load: for older keys, which a state with today's keys has not.
_LOADED_AS_OTHERS = ("torch.nn.modules.batchnorm", "torch.nn.modules.instancenorm")


def without_compiled(key: str) -> str:
    """A key as it is where nothing is compiled."""
    return ".".join(part for part in key.split(".") if part != _COMPILED) if _COMPILED in key else key


def _all_without_compiled(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A module's state with the keys that it has where nothing is compiled."""
    if not any(_COMPILED in key for key in state):
        return state
    made: Any = OrderedDict((without_compiled(key), value) for key, value in state.items())
    if hasattr(state, "_metadata"):
        # Of a wrapper and what is in it, the latter comes last.
        made._metadata = OrderedDict((without_compiled(f"{k}.")[:-1], value) for k, value in state._metadata.items())
    return made  # type: ignore[no-any-return]


def _with_real_names(module: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The other way round: the state with the keys that torch's own load of this module expects."""
    paths = [name for name, _ in module.named_modules(remove_duplicate=False)]
    real = {without_compiled(f"{path}.")[:-1]: path for path in paths}
    if all(name == path for name, path in real.items()):
        return state
    made: Any = OrderedDict((_real_name(key, real), value) for key, value in state.items())
    if hasattr(state, "_metadata"):
        made._metadata = OrderedDict((real.get(name, name), value) for name, value in state._metadata.items())
    return made  # type: ignore[no-any-return]


def _real_name(key: str, real: dict[str, str]) -> str:
    """A key below the innermost module that it names."""
    path = key
    while path:
        path = path.rpartition(".")[0]
        if path in real:
            return ".".join(filter(None, [real[path], key[len(path) :].removeprefix(".")]))
    return key


class ModuleState:
    """The state of one module.

    Raises:
        TypeError: Its state cannot be had without communicating, or without disturbing a forward.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._plan = _Plan(module)

    def state_dict(self) -> Mapping[str, Any]:
        """As ``module.state_dict()`` of a module that is not compiled, in any thread."""
        return self._current().read()

    def prepare(self, state: Mapping[str, Any]) -> Callable[[], None]:
        """Find out how to load a state, without writing anything; what is returned loads it.

        Raises:
            RuntimeError: torch's own, for other keys or shapes.
        """
        if not isinstance(state, Mapping):
            self._module.load_state_dict(state)  # refuses it
        plan = self._current()
        plainly = plan.loads_plainly and not torch.__future__.get_swap_module_params_on_conversion()
        given = _all_without_compiled(state)
        copies = plan.copies_of(given) if plainly else None
        if copies is not None:
            return partial(self._write, plan, given, copies)
        named = _with_real_names(self._module, given)
        if plainly:
            with _Rehearsal(self._module):
                self._module.load_state_dict(named)
        return partial(self._module.load_state_dict, named)

    def _current(self) -> _Plan:
        plan = self._plan
        if not plan.holds():
            self._plan = plan = _Plan(self._module)  # in one step: another thread may be reading
        return plan

    def _write(self, plan: _Plan, state: Mapping[str, Any], copies: list[tuple[Any, Any]]) -> None:
        reshard(self._module)
        with torch.no_grad():
            for live, value in copies:
                live.copy_(value)
        for key, module in plan.extra.items():
            module.set_extra_state(state[key])


class _Plan:
    """Which tensors a module holds, in the order of its state dict."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._sharded = sharded_params(module)
        # Each a key and what gives its tensor, or what adds to the state.
        self._keys: list[str] = []
        self._held: list[Callable[[], torch.Tensor] | torch.Tensor] = []
        self._calls: list[tuple[int, Callable[[OrderedDict[str, Any]], None]]] = []
        self._metadata: OrderedDict[str, Any] = OrderedDict()
        self._modules: list[nn.Module] = []
        self._called: list[nn.Module] = []  # that say themselves what their state is, with all that is below
        self.extra: dict[str, Any] = {}
        self.loads_plainly = True
        self._walk(module, "")
        self._aliases = Aliases(self._now())
        self._seen = self._look()

    # ------------------------------------------------------------------------------ making it

    def _walk(self, module: nn.Module, real: str) -> None:
        prefix = without_compiled(real)
        self._check(module, prefix)
        self.loads_plainly &= _loads_plainly(module)
        if _is_called(module):
            self.loads_plainly = False
            self._refuse_sharded(module, prefix)
            self._called.append(module)
            self._call(lambda state: _add_called(module, real, state))
            return
        self._modules.append(module)
        self._metadata[prefix[:-1]] = {"version": module._version}
        self._own(module, real)
        for name, child in module._modules.items():
            if child is not None:
                self._walk(child, f"{real}{name}.")

    def _own(self, module: nn.Module, real: str) -> None:
        """What a module has itself, without its children."""
        prefix = without_compiled(real)
        of_class = type(module)._save_to_state_dict is nn.Module._save_to_state_dict
        if not of_class or "_save_to_state_dict" in module.__dict__:
            self._refuse_sharded(module, prefix, recurse=False)
            self.loads_plainly = False
            self._call(lambda state: module._save_to_state_dict(state, prefix, False))
            return
        for name, param in module._parameters.items():
            if param is not None:
                self._add(f"{prefix}{name}", self._sharded.get((id(module), name), param))
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                self._add(f"{prefix}{name}", buffer)
        gives = type(module).get_extra_state is not nn.Module.get_extra_state
        if gives != (type(module).set_extra_state is not nn.Module.set_extra_state):
            self.loads_plainly = False  # torch says what is wrong with that
        if gives:
            key = f"{prefix}{_EXTRA}"
            self.extra[key] = module
            self._call(lambda state: state.update({key: module.get_extra_state()}))

    def _add(self, key: str, held: Callable[[], torch.Tensor] | torch.Tensor) -> None:
        self._keys.append(key)
        self._held.append(held)

    def _call(self, adds: Callable[[OrderedDict[str, Any]], None]) -> None:
        self._calls.append((len(self._keys), adds))

    def _check(self, module: nn.Module, prefix: str) -> None:
        if is_fsdp1(module):
            why = "FullyShardedDataParallel communicates in state_dict(); use fully_shard (FSDP2)"
            raise TypeError(f"{_name(module, prefix)}: {why}")

    def _refuse_sharded(self, module: nn.Module, prefix: str, recurse: bool = True) -> None:
        owners = {id(each) for each in (module.modules() if recurse else [module])}
        if any(owner in owners for owner, _ in self._sharded):
            why = (
                "it has a state_dict or a state-dict hook of its own, and parameters of fully_shard: "
                "to call it would reshard them under a running forward"
            )
            raise TypeError(f"{_name(module, prefix)}: {why}")

    # ------------------------------------------------------------------------------ using it

    def holds(self) -> bool:
        """Whether the modules are as they were when this was made, and hold the same tensors."""
        now = self._look()
        return len(now) == len(self._seen) and all(map(operator.is_, now, self._seen))

    def _look(self) -> list[Any]:
        """All that decides what is in the state, to compare it by identity; kept, so that no identity is used twice."""
        seen: list[Any] = []
        for module in (*self._called, *self._modules):
            own = module.__dict__
            seen += (type(module), *map(own.get, _FUNCTIONS))
            for hooks in _hooks(module):
                if hooks:
                    seen += hooks.values()
        for module in self._modules:
            for named in (module._modules, module._buffers, module._non_persistent_buffers_set):
                if named:
                    seen += named
                    if isinstance(named, dict):
                        seen += named.values()
                seen.append(_NEXT)
            params = module._parameters
            if params:
                seen += params
                if self._sharded:
                    seen += [p for name, p in list(params.items()) if (id(module), name) not in self._sharded]
                else:
                    seen += params.values()
            seen.append(_NEXT)
        return seen

    def _now(self) -> list[torch.Tensor]:
        if not self._sharded:
            return self._held  # type: ignore[return-value]
        return [held if isinstance(held, torch.Tensor) else held() for held in self._held]

    def leaves(self) -> list[torch.Tensor]:
        """Aliases of the tensors that are trained, in the memory that these have now."""
        return self._aliases.of(self._now())

    def read(self) -> Mapping[str, Any]:
        """The state dict."""
        if self._called[:1] == [self._module]:
            return _all_without_compiled(self._module.state_dict())  # who overrides it need not take arguments
        state: Any = OrderedDict()
        state._metadata = OrderedDict((key, dict(value)) for key, value in self._metadata.items())
        leaves, begin = self.leaves(), 0
        for end, adds in self._calls:
            state.update(zip(self._keys[begin:end], leaves[begin:end], strict=True))
            adds(state)
            begin = end
        state.update(zip(self._keys[begin:], leaves[begin:], strict=True))
        return state  # type: ignore[no-any-return]

    def copies_of(self, state: Mapping[str, Any]) -> list[tuple[Any, Any]] | None:
        """What has to be copied, with where to; None if that is for torch's own load to decide."""
        if len(state) != len(self._keys) + len(self.extra) or not self.extra.keys() <= state.keys():
            return None
        copies = []
        for key, live in zip(self._keys, self.leaves(), strict=True):
            value = state.get(key)
            if value is not live and not same_memory(live, value):
                if not _can_copy(live, value):
                    return None
                copies.append(_plain(live, value))
        return copies


_NEXT = object()
# What decides how a module saves and loads, where an instance has it.
_FUNCTIONS = ("state_dict", "load_state_dict", "_save_to_state_dict", "_load_from_state_dict")


def _can_copy(live: Any, value: Any) -> bool:
    """Whether a copy is what torch's own load would do, and cannot fail."""
    if not isinstance(value, torch.Tensor) or live.shape != value.shape or live.is_meta or value.is_meta:
        return False
    if is_dtensor(live):
        return is_dtensor(value) and same_spec(live, value)
    # What is expanded cannot be written to.
    return is_plain(live) and is_plain(value) and (0 not in live.stride() or live.is_contiguous())


def _plain(live: Any, value: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of DTensors their own pieces, which costs a copy of it a hundredth."""
    return (live._local_tensor, value._local_tensor) if is_dtensor(live) else (live, value)


def _hooks(module: nn.Module) -> tuple[dict[int, Any], ...]:
    return (
        module._state_dict_pre_hooks,
        module._state_dict_hooks,
        module._load_state_dict_pre_hooks,
        module._load_state_dict_post_hooks,
    )


def _is_called(module: nn.Module) -> bool:
    """Whether only the module itself can say what its state is: a class's or an instance's function, or a hook."""
    if type(module).state_dict is not nn.Module.state_dict or "state_dict" in module.__dict__:
        return True
    if isinstance(module, torch.jit.ScriptModule):
        return True
    saving = (*module._state_dict_pre_hooks.values(), *module._state_dict_hooks.values())
    return not all(map(is_fsdp_hook, saving))


def _loads_plainly(module: nn.Module) -> bool:
    """Whether loading is copying, to those that have the same keys."""
    kind = type(module)
    if kind.load_state_dict is not nn.Module.load_state_dict or "load_state_dict" in module.__dict__:
        return False
    if "_load_from_state_dict" in module.__dict__:
        return False
    load = kind._load_from_state_dict
    if load is not nn.Module._load_from_state_dict and load.__module__ not in _LOADED_AS_OTHERS:
        return False
    loading = (*module._load_state_dict_pre_hooks.values(), *module._load_state_dict_post_hooks.values())
    return all(map(is_fsdp_hook, loading))


def _add_called(module: nn.Module, real: str, state: OrderedDict[str, Any]) -> None:
    """Add what a module in another one says of itself; as torch does, what it returns is not looked at."""
    said: Any = OrderedDict()
    said._metadata = OrderedDict()
    module.state_dict(destination=said, prefix=real, keep_vars=False)
    plain: Any = _all_without_compiled(said)
    state.update(plain)
    state._metadata.update(plain._metadata)  # type: ignore[attr-defined]


def _name(module: nn.Module, prefix: str) -> str:
    return f"module {prefix[:-1] or '<root>'} ({type(module).__name__})"


class _Rehearsal(TorchFunctionMode):
    """A load in which nothing is written: it only finds out whether torch takes the state."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._with_extra = [
            each for each in module.modules() if type(each).set_extra_state is not nn.Module.set_extra_state
        ]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_ and is_dtensor(args[0]) == is_dtensor(args[1]):
            return args[0]
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        for module in self._with_extra:
            module.__dict__["set_extra_state"] = lambda state: None
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        for module in self._with_extra:
            del module.__dict__["set_extra_state"]
