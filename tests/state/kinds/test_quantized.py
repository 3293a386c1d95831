"""Quantized tensors: their integers travel as bytes, their scales beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import noise

from ft_transport._state.geometry import geometry_of
from ft_transport._state.kinds.base import KINDS, flatten_leaf, kind_of
from state.kinds.leaves import there_and_back

pytestmark = pytest.mark.filterwarnings("ignore:.*quantize", "ignore:TypedStorage is deprecated")

FLOATS = noise((4, 6), 1)


def per_channel(dtype: torch.dtype = torch.qint8, axis: int = 1) -> torch.Tensor:
    num = FLOATS.shape[axis]
    zero_points = torch.arange(num, dtype=torch.int64 if dtype is torch.qint8 else torch.float32)
    return torch.quantize_per_channel(FLOATS, torch.linspace(0.1, 0.6, num), zero_points, axis, dtype)


QUANTIZED = {
    **{str(d): lambda d=d: torch.quantize_per_tensor(FLOATS, 0.1, 2, d) for d in (torch.qint8, torch.qint32)},
    "transposed": lambda: torch.quantize_per_tensor(FLOATS, 0.1, 2, torch.quint8).t(),
    "a part": lambda: torch.quantize_per_tensor(FLOATS, 0.1, 2, torch.quint8)[1:3],
    "per channel": per_channel,
    "four bits": lambda: per_channel(torch.quint4x2, 0),
    "parameter": lambda: torch.nn.Parameter(per_channel(), requires_grad=False),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_tensors_come_back(name: str) -> None:
    leaf = QUANTIZED[name]()
    assert kind_of(leaf) is KINDS["quantized"]
    again = there_and_back(leaf)
    assert (type(again), again.dtype, again.shape) == (type(leaf), leaf.dtype, leaf.shape)
    assert again.qscheme() == leaf.qscheme()
    assert flatten_leaf(again)[0].context[3:] == flatten_leaf(leaf)[0].context[3:]
    assert torch.equal(again.dequantize(), leaf.dequantize())


@pytest.mark.parametrize(
    ("make", "place", "value"),
    [
        ("torch.qint8", 0, "int8"),
        ("torch.qint8", 0, "qint32"),
        ("torch.qint8", 1, (4, 7)),
        ("torch.qint8", 3, None),
        ("torch.qint8", 4, 0.5),
        ("torch.qint8", 5, 0),
        ("torch.qint8", 7, True),
        ("per channel", 5, 2),
        ("per channel", 5, 0),
        ("per channel", 5, None),
        ("per channel", 5, True),
        ("four bits", 1, (4, 60)),
    ],
)
def test_what_makes_no_quantized_tensor_is_refused(make: str, place: int, value: Any) -> None:
    part, tensors = flatten_leaf(QUANTIZED[make]())
    shapes = [geometry_of(tensor) for tensor in tensors]
    KINDS["quantized"].check(shapes, part.context)
    context = list(part.context)
    context[place] = value
    if make == "four bits":
        context[2] = (60, 1)
    with pytest.raises((ValueError, TypeError, KeyError)):
        KINDS["quantized"].check(shapes, tuple(context))
