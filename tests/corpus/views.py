"""Shapes, strides and what autograd knows of a tensor."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import torch
from helpers import noise, randomized

from corpus.case import Table

__all__ = ["CASES"]

CASES = Table("views")

_SHAPES: list[tuple[int, ...]] = [
    (),
    (0,),
    (1,),
    (0, 3),
    (3, 0, 2),
    (1, 1, 1),
    (5,),
    (2, 3),
    (1, 7, 1),
    (2, 3, 4, 5),
    (2, 1, 2, 1, 2, 1, 2),
    (65, 33),
]

for _shape in _SHAPES:
    CASES.add(
        f"shape {_shape}".replace(" ", ""), lambda seed, shape=_shape: {"t": noise(shape, seed)}, varies=0 not in _shape
    )

# What is made of a tensor of 6 by 8 by 4, by name.
_VIEWS: dict[str, Any] = {
    "transposed": lambda t: t.transpose(0, 1),
    "reversed dimensions": lambda t: t.permute(2, 1, 0),
    "middle rows": lambda t: t[2:5],
    "columns": lambda t: t[:, 2:5],
    "last dimension cut": lambda t: t[..., 1:3],
    "every second row": lambda t: t[::2],
    "every third column": lambda t: t[:, ::3],
    "columns transposed": lambda t: t[:, 1:3].transpose(0, 2),
    "one element": lambda t: t[3, 4, 1],
    "one row": lambda t: t[4],
    "one column": lambda t: t[:, :, 2],
    "diagonal": lambda t: t[:4, :4, 0].diagonal(),
    "inner dimension of one": lambda t: t[:, 3:4],
    "none of it": lambda t: t[2:2],
    "flat": lambda t: t.view(-1),
    "unsqueezed": lambda t: t[:, 0].unsqueeze(1),
    "as bytes": lambda t: t.view(torch.uint8)[:, :, 3:9],
}


def _view(make: Any, seed: int) -> Any:
    return {"view": make(noise((6, 8, 4), seed)), "other": noise(3, seed + 1)}


for _name, _make in _VIEWS.items():
    CASES.add(_name, functools.partial(_view, _make))


def _permuted(order: tuple[int, ...], seed: int) -> Any:
    return {"permuted": noise((2, 3, 4), seed).permute(order)}


for _order in itertools.permutations(range(3)):
    CASES.add("permuted " + "".join(map(str, _order)), functools.partial(_permuted, _order))


@CASES.case()
def channels_last(seed: int) -> Any:
    return {
        "4d": randomized(torch.empty((2, 3, 4, 5), memory_format=torch.channels_last), seed),
        "5d": randomized(torch.empty((2, 3, 2, 3, 2), memory_format=torch.channels_last_3d), seed + 1),
        "one channel": randomized(torch.empty((2, 1, 4, 5), memory_format=torch.channels_last), seed + 2),
    }


@CASES.case(fresh=("row", "scalar", "both", "inner", "tail"))
def expanded(seed: int) -> Any:
    return {
        "row": noise((1, 4), seed).expand(5, 4),
        "scalar": noise((), seed + 1).expand(7),
        "both": noise((1, 1, 3), seed + 2).expand(4, 2, 3),
        "inner": noise((4, 1), seed + 3).expand(4, 6),
        "tail": noise((3, 1, 5), seed + 4)[:, :, ::2].expand(3, 2, 3),
    }


@CASES.case(fresh=("huge",))
def expanded_many_times(seed: int) -> Any:
    return {"huge": noise((1, 2), seed).expand(1 << 12, 2)}


@CASES.case(fresh=("windows", "unfolded"))
def overlapping_itself(seed: int) -> Any:
    return {"windows": noise(10, seed).as_strided((4, 4), (2, 1)), "unfolded": noise(9, seed + 1).unfold(0, 3, 1)}


@CASES.case()
def ten_rows_of_a_million(seed: int) -> Any:
    storage = torch.zeros((1_000_000, 4), dtype=torch.float32)
    storage[500_000:500_010] = noise((10, 4), seed).nan_to_num()
    return {"rows": storage[500_000:500_010]}


@CASES.case()
def one_column_of_many(seed: int) -> Any:
    return {"column": noise((400, 300), seed)[:, 7]}


@CASES.case()
def large(seed: int) -> Any:
    return {"a": noise((1300, 1000), seed), "odd": noise(300_001, seed + 1, torch.uint8), "small": noise(3, seed)}


@CASES.case()
def large_and_strided(seed: int) -> Any:
    return {
        "t": noise((300, 400), seed).t(),
        "cut": noise((90, 100), seed + 1)[:, 3:91],
        "wide": noise(9_000, seed)[::3],
    }


@CASES.case(either=True)
def lazy_conjugates(seed: int) -> Any:
    values = torch.view_as_complex(noise((4, 3, 2), seed).nan_to_num())
    return {"conj": values.conj(), "transposed": noise((4, 3), seed + 1, torch.complex128).t().conj()}


@CASES.case(either=True)
def lazy_negatives(seed: int) -> Any:
    return {"imag": noise((4, 3), seed, torch.complex64).conj().imag}


@CASES.case(torch_keeps=False)
def real_and_imaginary_parts(seed: int) -> Any:
    values = noise((4, 3), seed, torch.complex64)
    return {"real": values.real, "imag": values.imag, "whole": values}


@CASES.case()
def requires_grad(seed: int) -> Any:
    return {
        "leaf": noise((2, 3), seed).requires_grad_(),
        "strided": noise((4, 4), seed + 1)[:, ::2].requires_grad_(),
        "empty": torch.empty((0, 2), requires_grad=True),
        "scalar": noise((), seed + 2).requires_grad_(),
        "plain": noise(2, seed + 3),
    }


@CASES.case()
def parameters(seed: int) -> Any:
    return {
        "weight": torch.nn.Parameter(noise((3, 5), seed)),
        "frozen": torch.nn.Parameter(noise((3, 5), seed + 1), requires_grad=False),
        "integer": torch.nn.Parameter(noise(4, seed + 2, torch.int32), requires_grad=False),
        "transposed": torch.nn.Parameter(noise((3, 5), seed + 3).t()),
        "columns": torch.nn.Parameter(noise((6, 5), seed + 4)[:, 1:3]),
        "empty": torch.nn.Parameter(torch.empty(0)),
    }


@CASES.case()
def buffers(seed: int) -> Any:
    return {
        "buffer": torch.nn.Buffer(noise(3, seed)),
        "not persistent": torch.nn.Buffer(noise(3, seed + 1), persistent=False),
    }


@CASES.case()
def python_attributes(seed: int) -> Any:
    weight = torch.nn.Parameter(noise((2, 3), seed))
    weight.tensor_parallel = True  # type: ignore[attr-defined]
    weight.partition = {"dim": seed, "stride": (1, 2)}  # type: ignore[attr-defined]
    plain = noise(4, seed + 1)
    plain.origin = f"plain {seed}"  # type: ignore[attr-defined]
    return {"weight": weight, "plain": plain}


@CASES.case()
def an_attribute_that_is_a_tensor(seed: int) -> Any:
    weight, scale = noise((2, 3), seed), noise(2, seed + 1)
    weight.scale = scale  # type: ignore[attr-defined]
    return {"weight": weight, "scale": scale}


@CASES.case(either=True)
def results_of_a_graph(seed: int) -> Any:
    leaf = noise(3, seed).nan_to_num().requires_grad_()
    return {"result": leaf * 2, "detached": (leaf * 3).detach()}


@CASES.case()
def parameters_with_gradients_and_hooks(seed: int) -> Any:
    weight, hooked = (torch.nn.Parameter(noise((2, 3), seed + i).nan_to_num()) for i in range(2))
    weight.square().sum().backward()
    hooked.register_hook(lambda grad: None)
    hooked.register_post_accumulate_grad_hook(lambda parameter: None)
    return {"weight": weight, "hooked": hooked}


@CASES.case(either=True)
def inference_tensors(seed: int) -> Any:
    with torch.inference_mode():
        return {"made": noise((2, 3), seed) * 1, "plain": noise(2, seed)}


@CASES.case(either=True)
def shared_with_numpy(seed: int) -> Any:
    array = np.frombuffer(bytearray(noise(40, seed).view(torch.uint8).tolist()), dtype=np.float32)
    return {"all": torch.from_numpy(array), "part": torch.from_numpy(array)[3:9]}


@CASES.case()
def in_shared_memory(seed: int) -> Any:
    return {"shared": noise((2, 3), seed).share_memory_(), "plain": noise(2, seed)}


@CASES.case()
def views_of_parameters(seed: int) -> Any:
    weight = torch.nn.Parameter(noise((4, 4), seed))
    return {"weight": weight, "detached": weight.detach(), "row": weight.detach()[1]}


@CASES.case()
def many_dimensions(seed: int) -> Any:
    return {
        "t": noise((2,) * 12, seed, torch.uint8),
        "permuted": noise((1, 2) * 4, seed).permute(7, 1, 0, 2, 3, 4, 6, 5),
    }
