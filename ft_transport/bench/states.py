"""The states that are moved, each wrapped as torchft's Manager wraps what it sends."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from ft_transport.bench.check import storages

__all__ = ["STATES", "STEP", "State", "build", "fill_constant", "fill_random", "parse_size"]

State = dict[str, Any]

# The step of the source's state. A template has step 0.
STEP = 7

CPU = torch.device("cpu")

_UNITS = {"k": 10**3, "M": 10**6, "G": 10**9}

# What a template holds before each transfer: bytes that the source's random ones will not be by chance.
TEMPLATE_BYTE = 0xA5


def build(name: str, scale: float, step: int, device: torch.device = CPU) -> State:
    """The state ``name`` with its sizes shrunk by ``scale``, values not set yet, in the Manager's envelope.

    Args:
        name: Of ``STATES``, or a number of tensors and their bytes together, ``"1000x10MB"``.
    """
    with device:
        state = STATES[name](scale) if name in STATES else _alike(*parse_size(name), scale)
    return {
        "user": {"default": state},
        # Two values that are no tensors: a transport that drops or mixes them up trains on from a wrong step.
        "torchft": {"step": step, "batches_committed": 2 * step},
    }


def fill_random(state: State, seed: int) -> None:
    """Fill every storage with random bits: each float pattern occurs, NaN too. The same seed, the same bytes."""
    generator = torch.Generator().manual_seed(seed)
    for storage in storages(state):
        # Eight bytes at a time: at 1.5 GB, a draw for each byte takes many times as long. As integers, because a
        # random float is never NaN or denormal, and these are what a copy by value may change.
        # On the host: of the same seed a device makes other bytes.
        values, whole = storage if storage.is_cpu else storage.cpu(), storage.numel() // 8 * 8
        values[:whole].view(torch.int64).random_(generator=generator)
        values[whole:].random_(0, 256, generator=generator)
        if values is not storage:
            storage.copy_(values)


def fill_constant(state: State) -> None:
    """Fill every storage with ``TEMPLATE_BYTE``, so that a transfer which moves nothing is seen."""
    for storage in storages(state):
        storage.fill_(TEMPLATE_BYTE)


def parse_size(name: str) -> tuple[int, int]:
    """``"1000x10MB"``: the number of tensors, and the bytes of all of them.

    Raises:
        ValueError: It is not of this form.
    """
    found = re.fullmatch(r"(\d+)x(\d+)([kMG])B", name)
    if found is None or not int(found[1]) or not int(found[2]):
        raise ValueError(f"expected TENSORSxSIZE, as 1000x10MB, got {name!r}")
    return int(found[1]), int(found[2]) * _UNITS[found[3]]


def _alike(num_tensors: int, nbytes: int, scale: float) -> State:
    return {f"weight{i}": torch.empty(_scaled(nbytes // num_tensors // 4, scale)) for i in range(num_tensors)}


def _large(scale: float) -> State:
    """8 tensors of 128 MiB."""
    return {f"weight{i}": torch.empty(_scaled(32 * 2**20, scale)) for i in range(8)}


def _small(scale: float) -> State:
    """20,000 tensors of 4 KiB."""
    return {f"weight{i}": torch.empty(1024) for i in range(_scaled(20_000, scale))}


def _tiny(scale: float) -> State:
    """4,000 tensors of 4 bytes."""
    return {f"scalar{i}": torch.empty(()) for i in range(_scaled(4_000, scale))}


def _views(scale: float) -> State:
    """16 views, side by side, of one storage of 134 MB."""
    # What a fused or flattened optimizer holds. Who serialises each view's whole storage sends it 16 times over.
    whole = torch.empty(16, _scaled(2 * 2**20, scale))
    return {f"view{i}": row for i, row in enumerate(whole)}


def _gpt2_adam(scale: float) -> State:
    """GPT-2 small and its Adam. The head is the embedding itself, as in the model, so its bytes are there once."""
    # Each dimension shrinks, so the bytes of a matrix do with the square; the number of tensors stays as in the model.
    shapes = {name: tuple(_scaled(dim, scale) for dim in shape) for name, shape in _gpt2_shapes().items()}
    model = {name: torch.empty(shape) for name, shape in shapes.items()}
    adam = {
        i: {"step": torch.empty(()), "exp_avg": torch.empty(shape), "exp_avg_sq": torch.empty(shape)}
        for i, shape in enumerate(shapes.values())
    }
    group = {"lr": 6e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "params": list(adam)}
    # Last, after the optimizer was made from the shapes: a tied weight has one momentum, as `parameters()` names it
    # once.
    model["lm_head.weight"] = model["transformer.wte.weight"]
    return {"model": model, "optimizer": {"state": adam, "param_groups": [group]}}


def _gpt2_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of GPT-2 small's 148 parameters: 12 layers, width 768, vocabulary 50,257, context 1,024."""
    width, layers = 768, 12
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (50257, width), "wpe.weight": (1024, width)}
    for layer in range(layers):
        for name, shape in _gpt2_block(width).items():
            shapes[f"h.{layer}.{name}"] = shape
    shapes |= {"ln_f.weight": (width,), "ln_f.bias": (width,)}
    return {f"transformer.{name}": shape for name, shape in shapes.items()}


def _gpt2_block(width: int) -> dict[str, tuple[int, ...]]:
    linears = {
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (width, 4 * width),
        "mlp.c_proj": (4 * width, width),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name in ("ln_1", "ln_2"):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[1:]}
    return shapes


def _scaled(number: int, scale: float) -> int:
    return max(1, round(number * scale))


STATES: dict[str, Callable[[float], State]] = {
    "large": _large,
    "gpt2-adam": _gpt2_adam,
    "small": _small,
    "tiny": _tiny,
    "views": _views,
}
