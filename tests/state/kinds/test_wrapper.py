"""Wrapper subclasses, which say themselves what is inside, and jagged tensors among them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import noise, raw_bytes

from ft_transport._state.geometry import geometry_of
from ft_transport._state.kinds.base import KINDS, Surroundings, flatten_leaf, kind_of
from state.kinds.leaves import there_and_back


class Scaled(torch.Tensor):
    """Holds a tensor and a scale, as quantized weights of torchao do."""

    values: torch.Tensor
    scale: float

    @staticmethod
    def __new__(cls, values: torch.Tensor, scale: float) -> Scaled:
        made: Scaled = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)
        made.values, made.scale = values, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["values"], (self.scale,)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], context: Any, size: Any, stride: Any) -> Scaled:
        return Scaled(inner["values"], *context)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Scaled(args[0].values.detach(), args[0].scale)
        raise NotImplementedError(f"{func}")


@pytest.mark.parametrize("wrap", [lambda leaf: leaf, torch.nn.Parameter], ids=["tensor", "parameter"])
def test_what_a_wrapper_says_is_inside_travels(wrap: Any) -> None:
    leaf = wrap(Scaled(noise((2, 3), 1), 0.5))
    assert kind_of(leaf) is KINDS["wrapper"]
    with torch.serialization.safe_globals([Scaled]):
        again = there_and_back(leaf)
    assert type(again) is type(leaf)
    assert (again.shape, again.requires_grad, again.scale) == (leaf.shape, leaf.requires_grad, 0.5)
    assert raw_bytes(again.values) == raw_bytes(leaf.values)


def test_its_class_must_be_allowed() -> None:
    with pytest.raises(ValueError, match=r"test_wrapper.Scaled is not allowed"):
        there_and_back(Scaled(noise(2, 1), 0.5))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, "helpers.Config"),
        (0, "torch.nn.parameter.Parameter"),
        (1, ()),
        (1, ("values", "values")),
        (1, (5,)),
        (3, (-1,)),
        (5, None),
    ],
)
def test_what_is_no_wrapper_is_refused(place: int, value: Any) -> None:
    part, tensors = flatten_leaf(Scaled(noise(2, 1), 0.5))
    context = list(part.context)
    context[place] = value
    with torch.serialization.safe_globals([Scaled, torch.nn.Parameter]):
        KINDS["wrapper"].check([geometry_of(tensor) for tensor in tensors], part.context)
        with pytest.raises((TypeError, ValueError)):
            KINDS["wrapper"].check([geometry_of(tensor) for tensor in tensors], tuple(context))


def jagged() -> Any:
    rows = [noise((2, 3), 1), noise((4, 3), 2)]
    return torch.nested.nested_tensor(rows, layout=torch.jagged)


def test_jagged_tensors_need_no_permission() -> None:
    leaf = jagged()
    assert kind_of(leaf) is KINDS["wrapper"]
    again = there_and_back(leaf)
    assert again.layout is torch.jagged
    assert [raw_bytes(row) for row in again.unbind()] == [raw_bytes(row) for row in leaf.unbind()]


@pytest.mark.parametrize("offsets", [[0, 2, 7], [0, -1, 6], [0, 7, 6], [[0, 2, 6]]])
def test_rows_outside_of_the_values_are_found_when_they_have_landed(offsets: list[Any]) -> None:
    """torch's kernels do not look. Offsets are bytes of the state, so no check of the description can see them."""
    part, tensors = flatten_leaf(jagged())
    names = part.context[1]
    inner = dict(zip(names, tensors, strict=True))
    inner["_offsets"] = torch.tensor(offsets)
    with pytest.raises(ValueError, match="a jagged tensor"):
        KINDS["wrapper"].unflatten([inner[name] for name in names], part.context, Surroundings())
