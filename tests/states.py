"""States that transfers are tested with: everything that can be in one, small."""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import torch
from helpers import Config, Point, noise, randomized

State = Any


def _dtypes() -> dict[str, torch.dtype]:
    """Every dtype of torch with which a plain tensor can be made, by name."""
    found: dict[str, torch.dtype] = {}
    for value in vars(torch).values():
        if isinstance(value, torch.dtype):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    tensor = torch.empty(3, dtype=value)
                except (RuntimeError, TypeError):
                    continue
            if not tensor.is_quantized:
                found[str(value).removeprefix("torch.")] = value
    return found


DTYPES = _dtypes()


def every_dtype(seed: int) -> State:
    return {name: noise(5, seed + i, dtype) for i, (name, dtype) in enumerate(DTYPES.items())}


def parameters(seed: int) -> State:
    frozen = torch.nn.Parameter(noise((4, 2), seed), requires_grad=False)
    return {
        "weight": torch.nn.Parameter(noise((3, 5), seed + 1)),
        "frozen": frozen,
        "leaf": noise(4, seed + 2).requires_grad_(),
        "buffer": noise(2, seed + 3),
    }


def special_bits(seed: int) -> State:
    bits = torch.tensor([0x7FC00001, 0x7FA00000, 0x80000000, 0x7F800000, 1, 0x7FFFFFFF + seed], dtype=torch.int64)
    return {"nan": bits.to(torch.int32).view(torch.float32)}


def offset_view(seed: int) -> State:
    return {"view": noise(100, seed)[13:50]}


def transposed(seed: int) -> State:
    return {"t": noise((4, 6), seed).t(), "permuted": noise((2, 3, 4), seed + 1).permute(2, 0, 1)}


def expanded(seed: int) -> State:
    return {"row": noise((1, 4), seed).expand(5, 4), "scalar": noise(1, seed + 1).expand(7)}


def channels_last(seed: int) -> State:
    image = torch.empty((2, 3, 4, 5), memory_format=torch.channels_last)
    return {"image": randomized(image, seed)}


def gap_view(seed: int) -> State:
    return {"columns": noise((8, 10), seed)[:, 2:5], "every third": noise(30, seed + 1)[::3]}


def zero_dim(seed: int) -> State:
    return {"float": noise((), seed), "int": noise((), seed + 1, torch.int64), "of a vector": noise(9, seed + 2)[4]}


def empty(seed: int) -> State:
    return {"none": torch.empty(0), "rows": torch.empty((0, 3), dtype=torch.int8), "some": noise(3, seed)}


def nothing_but_empty(seed: int) -> State:
    return {"none": torch.empty((2, 0))}


def no_tensors(seed: int) -> State:
    return {"lr": 0.1, "nested": [], "none": None}


def one_tensor(seed: int) -> State:
    return noise(7, seed)


def tied(seed: int) -> State:
    weight = torch.nn.Parameter(noise((6, 3), seed))
    return {"embedding": weight, "head": weight, "transposed": weight.detach().t()}


def views_of_one(seed: int) -> State:
    return list(noise((16, 32), seed).unbind(0))


def overlapping_views(seed: int) -> State:
    base = noise(64, seed)
    return {"whole": base, "front": base[:40], "back": base[20:], "as int": base.view(torch.int32)[8:16]}


def ten_rows(seed: int) -> State:
    return {"rows": noise((100, 16), seed)[40:50]}


def scattered_rows(seed: int) -> State:
    base = noise((50, 33), seed, torch.int16)
    return {"first": base[3], "last": base[41], "middle": base[17:20]}


def interleaved(seed: int) -> State:
    base = noise(40, seed)
    return {"even": base[::2], "odd": base[1::2]}


def same_gap_view_twice(seed: int) -> State:
    base = noise((6, 8), seed)
    return {"a": base[:, :3], "b": base[:, :3], "c": base[:, 4:6]}


def rows_and_columns(seed: int) -> State:
    base = noise((100, 50), seed)
    return {"rows": base[:10], "columns": base[20:30, 5:9], "last": base[99]}


def mixed_dtypes(seed: int) -> State:
    base = noise(1024, seed, torch.uint8)
    return {"head": base[:8], "bytes": base[501:541], "ints": base[504:536].view(torch.int32), "tail": base[1003:]}


def containers(seed: int) -> State:
    ordered = OrderedDict([("z", noise(2, seed)), ("a", [noise(3, seed + 1), (noise(1, seed + 2), None)])])
    ordered._metadata = OrderedDict(version=2)  # type: ignore[attr-defined]
    factory: defaultdict[Any, Any] = defaultdict(list, {1: [noise(2, seed + 3)], (2, "b"): 5})
    bare: defaultdict[Any, Any] = defaultdict(None, {None: noise(1, seed + 4)})
    return {
        "ordered": ordered,
        "point": Point(noise(2, seed + 5), {"inner": Point(1, noise(1, seed + 6))}),
        "deques": [deque([noise(2, seed + 7)], maxlen=3), deque()],
        "factory": factory,
        "bare": bare,
        0: ((), [], {}, ([],)),
        True and 7: torch.Size([3, 4]),
        b"bytes": OrderedDict(),
    }


VALUES: dict[str, object] = {
    "none": None,
    "true": True,
    "false": False,
    "zero": 0,
    "negative": -(1 << 63),
    "uint64": (1 << 64) - 1,
    "big": 1 << 200,
    "big negative": -(1 << 64) - 3,
    "float": 0.1,
    "minus zero": -0.0,
    "infinity": float("inf"),
    "text": "gr\u00fc\u00dfe \U0001f30d",
    "surrogate": "\udcff",
    "empty text": "",
    "bytes": b"\x00\xff",
    "bytearray": bytearray(b"ab"),
    "complex": complex(1.5, -0.0),
    "set": {1, "a"},
    "frozenset": frozenset({(1, 2), None}),
    "slice": slice(1, None, -1),
    "range": range(3, 30, 7),
    "long range": range(-(1 << 70), 1 << 80, 3),
    "dtype": torch.bfloat16,
    "device": torch.device("cuda", 3),
    "ellipsis": ...,
    "counter": Counter("abb"),
    "config": Config(5),
}


def values(seed: int) -> State:
    return dict(VALUES)


def many_small(seed: int) -> State:
    return {f"layer {i}": noise(1 + i % 13, seed + i, torch.uint8 if i % 3 else torch.float32) for i in range(60)}


def large(seed: int) -> State:
    return {"large": noise(2000, seed), "odd": noise(3001, seed + 1, torch.uint8), "small": noise(3, seed + 2)}


def large_strided(seed: int) -> State:
    return {"t": noise((60, 70), seed).t(), "gaps": noise((40, 50), seed + 1)[:, 5:45], "wide": noise(900, seed)[::2]}


def model_and_optimizer(seed: int) -> State:
    weights = {f"layers.{i}.weight": torch.nn.Parameter(noise((8, 8), seed + i)) for i in range(3)}
    moments = {i: {"step": noise((), seed + i), "exp_avg": noise((8, 8), seed + 10 + i)} for i in range(3)}
    return {"model": weights, "optim": {"state": moments, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]}}


# By name: what makes a state from a seed. The same seed gives the same bytes, another one the same shapes.
STATES: dict[str, Callable[[int], State]] = {
    make.__name__: make
    for make in (
        every_dtype,
        parameters,
        special_bits,
        offset_view,
        transposed,
        expanded,
        channels_last,
        gap_view,
        zero_dim,
        empty,
        nothing_but_empty,
        no_tensors,
        one_tensor,
        tied,
        views_of_one,
        overlapping_views,
        ten_rows,
        scattered_rows,
        interleaved,
        same_gap_view_twice,
        rows_and_columns,
        mixed_dtypes,
        containers,
        values,
        many_small,
        large,
        large_strided,
        model_and_optimizer,
    )
}
