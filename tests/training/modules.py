"""Modules of every kind that says its state in a way of its own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def plain() -> nn.Module:
    """Norms with buffers, a part without bias, a part that is frozen."""
    made = nn.Sequential(
        nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5))
    )
    made[0].weight.requires_grad_(False)
    return made


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Embedding(7, 4)
        self.outer = nn.Linear(4, 7, bias=False)
        self.outer.weight = self.inner.weight
        self.again = self.inner


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("left_out", torch.arange(4.0), persistent=False)
        self.register_buffer("none", None)
        self.register_buffer("view", torch.arange(12.0).view(3, 4)[:, 1:3])
        self.register_buffer("complex", torch.zeros(2, dtype=torch.complex64).conj())
        self.register_parameter("absent", None)
        self.list = nn.ParameterList([torch.zeros(2), torch.ones(3, dtype=torch.bfloat16)])
        self.dict = nn.ParameterDict({"a": torch.zeros(())})


class WithExtra(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.count: Any = {"calls": 3, "amax": torch.ones(2)}
        self.sets = 0

    def get_extra_state(self) -> Any:
        return self.count

    def set_extra_state(self, state: Any) -> None:
        self.count = state
        self.sets += 1


class LoRA(nn.Module):
    """As peft wraps a layer: the layer inside, adapters by name."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(4, 4).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 4, bias=False)})
        self.lora_embedding_A = nn.ParameterDict({})


class Overridden(nn.Module):
    """Leaves its frozen part out, as adapters' recipes do, and does not take what torch passes to children."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(3, 3)
        self.adapter = nn.Linear(3, 3)

    def state_dict(self) -> Any:  # type: ignore[override]
        return {key: value for key, value in super().state_dict().items() if key.startswith("adapter")}

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        assert not strict or all(key.startswith("adapter") for key in state)
        return super().load_state_dict(state, strict=False)


class OverriddenChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        state[kwargs.get("prefix", "") + "stamp"] = torch.tensor(3)
        return state

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        state.pop(prefix + "stamp")
        super()._load_from_state_dict(state, prefix, *args)


class Packed(nn.Module):
    """As quantized layers do: what is kept is not what is held."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.inner = nn.Linear(2, 2)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "packed"] = self.weight.detach() * 2

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        with torch.no_grad():
            self.weight.copy_(state.pop(prefix + "packed") / 2)


def hooked() -> nn.Module:
    """With a hook that adds a key, and one that takes it away before a load."""
    made = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def add(module: nn.Module, state: Any, prefix: str, metadata: Any) -> None:
        state[prefix + "added"] = torch.tensor(5.0)

    made[1].register_state_dict_post_hook(add)
    made[1].register_load_state_dict_pre_hook(lambda module, state, prefix, *args: state.pop(prefix + "added"))
    return made


def replacing() -> nn.Module:
    """With one of the private hooks that return another dict, as those of older libraries do."""
    made = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    made[1]._register_state_dict_hook(lambda module, state, prefix, metadata: renamed(state, "old"))
    made[1]._register_load_state_dict_pre_hook(lambda state, prefix, *args: rename_back(state, "old"))
    return made


def renamed(state: Any, mark: str) -> Any:
    made: Any = OrderedDict((f"{key}_{mark}" if key.startswith("1.") else key, value) for key, value in state.items())
    made._metadata = getattr(state, "_metadata", OrderedDict())
    return made


def rename_back(state: Any, mark: str) -> None:
    for key in [key for key in state if key.endswith(mark)]:
        state[key.removesuffix(f"_{mark}")] = state.pop(key)


def on_instance() -> nn.Module:
    """With ``state_dict`` put onto the instance, as recipes for adapters do."""
    made = nn.Linear(2, 2)
    made.state_dict = lambda *args, **kwargs: {"weight": made.weight.detach()}  # type: ignore[method-assign, assignment]
    made.load_state_dict = lambda state: nn.Module.load_state_dict(made, state, strict=False)  # type: ignore[method-assign, assignment]
    return made


def parametrized() -> nn.Module:
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
        nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)),
        nn.utils.spectral_norm(nn.Linear(3, 3)),  # the old one, with hooks
    )


def scripted() -> nn.Module:
    return nn.Sequential(torch.jit.script(nn.Linear(2, 3)), nn.Linear(3, 2))


def mixed() -> nn.Module:
    made = plain()
    made[2].to(torch.bfloat16)
    return made


def averaged() -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(plain())


def lstm() -> nn.Module:
    return nn.Sequential(nn.LSTM(3, 4, 2), nn.MultiheadAttention(4, 2), nn.InstanceNorm1d(4, track_running_stats=True))


# Copied by what is in memory, and loaded without a call of anything of theirs.
PLAIN: dict[str, Callable[[], nn.Module]] = {
    each.__name__: each for each in (plain, Tied, Buffers, WithExtra, LoRA, mixed, averaged, lstm)
}
# Asked themselves.
OWN: dict[str, Callable[[], nn.Module]] = {
    each.__name__: each for each in (Overridden, Packed, hooked, replacing, on_instance, parametrized, scripted)
}
OWN["OverriddenChild"] = lambda: nn.Sequential(nn.Linear(2, 2), OverriddenChild())
MODULES = PLAIN | OWN


def randomized(module: nn.Module, seed: int) -> nn.Module:
    """The module, each of its tensors filled with other values."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in {id(each): each for each in (*module.parameters(), *module.buffers())}.values():
        with torch.no_grad():
            values = torch.rand(tensor.shape, generator=generator).mul_(10)
            tensor.copy_(values)
    return module
