"""Leaves that are no tensors: arrays, generators, objects; and the attributes that tensors have."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from helpers import Config, noise, raw_bytes

from ft_transport._state.geometry import geometry
from ft_transport._state.kinds.base import KINDS, Surroundings, flatten_leaf, kind_of
from ft_transport._state.kinds.python import check_attributes, shape_of, sizes, which_refers_to
from state.kinds.leaves import there_and_back

ARRAYS: dict[str, Callable[[], Any]] = {
    "floats": lambda: numpy.arange(6.0).reshape(2, 3),
    "fortran order": lambda: numpy.asfortranarray(numpy.arange(6).reshape(2, 3)),
    "every second": lambda: numpy.arange(10, dtype=numpy.int16)[::2],
    "reversed": lambda: numpy.arange(5)[::-1],
    "read-only": lambda: numpy.broadcast_to(numpy.arange(3), (2, 3)),
    "big endian": lambda: numpy.arange(4, dtype=">i4"),
    "fields": lambda: numpy.array([(1, 2.5)], dtype=[("a", "i4"), ("b", "f8")]),
    "dates": lambda: numpy.array(["2026-01-02", "NaT"], dtype="datetime64[D]"),
    "text": lambda: numpy.array(["a", "bcd"]),
    "no dimension": lambda: numpy.array(3.5),
    "empty": lambda: numpy.empty((0, 4), dtype=numpy.float32),
    "objects": lambda: numpy.array([[1, "a"], [None, 2.5]], dtype=object),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_come_back(name: str) -> None:
    leaf = ARRAYS[name]()
    assert kind_of(leaf) is KINDS["numpy"]
    again = there_and_back(leaf)
    assert type(again) is numpy.ndarray
    assert (again.dtype, again.shape) == (leaf.dtype, leaf.shape)
    assert again.tobytes() == leaf.tobytes() if leaf.dtype != object else (again == leaf).all()


@pytest.mark.parametrize(
    "leaf", [numpy.arange(3)[::-1], numpy.broadcast_to(1.0, 2), numpy.array([None])], ids=["reversed", "shared", "any"]
)
def test_arrays_that_cannot_be_written_are_no_place_to_land_in(leaf: Any) -> None:
    assert KINDS["numpy"].obstacle(leaf) != ""
    assert KINDS["numpy"].obstacle(numpy.arange(3)) == ""


@pytest.mark.parametrize(
    ("shape", "context"),
    [
        ((3, 4), ("<f4", (2,))),
        ((2, 4), ("<f8", (2,))),
        ((2, 4), ("|O", (2,))),
        ((2, 4), (None, (2,), (1, 2))),
        (None, (None, (2,), (1,))),
    ],
)
def test_what_makes_no_array_is_refused(shape: tuple[int, ...] | None, context: Any) -> None:
    bytes_of_it = [] if shape is None else [geometry(torch.uint8, shape, (shape[1], 1))]
    KINDS["numpy"].check([geometry(torch.uint8, (2, 4), (4, 1))], ("<f4", (2,)))
    with pytest.raises(ValueError, match=r"an array of|elements for|of objects"):
        KINDS["numpy"].check(bytes_of_it, context)


def test_a_generator_goes_on_where_it_was() -> None:
    leaf = torch.Generator().manual_seed(5)
    torch.randn(3, generator=leaf)
    assert kind_of(leaf) is KINDS["generator"]
    again = there_and_back(leaf)
    assert torch.equal(torch.randn(4, generator=again), torch.randn(4, generator=leaf))
    with pytest.raises(ValueError, match="the state of a Generator"):
        KINDS["generator"].check([geometry(torch.uint8, (7,), (1,))], "cpu")


def test_a_generator_is_made_on_the_templates_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of its devices a replica uses is its own affair; and the source's need not be here to be checked."""
    asked: list[str] = []
    real = torch.Generator

    class Made(real):  # type: ignore[misc, valid-type]
        device = torch.device("cuda", 1)

        def __new__(cls, device: Any = "cpu") -> Any:
            asked.append(str(device))
            return real.__new__(cls)

    state, mine = real().get_state(), Made()
    monkeypatch.setattr(torch, "Generator", Made)
    asked.clear()
    generator = KINDS["generator"]
    generator.check([geometry(torch.uint8, tuple(state.shape), (1,))], "cuda:3")
    for template in (None, mine, "something else"):
        generator.unflatten([state], "cuda:3", Surroundings(template=template))
    assert asked == ["cuda", "cuda:3", "cuda:1", "cuda:3"]


def test_objects_travel_without_the_bytes_of_the_tensors_in_them() -> None:
    leaf = SimpleNamespace(weight=noise(1000, 1), lr=0.5)
    assert kind_of(leaf) is KINDS["object"]
    part, (weight,) = flatten_leaf(leaf)
    assert weight is leaf.weight
    assert len(part.context[0]) < 200, "the pickle"
    with torch.serialization.safe_globals([(SimpleNamespace, "types.SimpleNamespace")]):
        again = there_and_back(leaf)
    assert (again.lr, raw_bytes(again.weight)) == (leaf.lr, raw_bytes(leaf.weight))


def test_an_object_of_a_class_that_is_not_allowed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"class helpers\.Config is not allowed"):
        there_and_back(Config(3))


def test_attributes_of_a_tensor_come_along() -> None:
    leaf = torch.nn.Parameter(noise(2, 1))
    leaf.lr_scale, leaf.mask = 0.5, torch.tensor([True, False])  # type: ignore[attr-defined]
    again = there_and_back(leaf)
    assert again.lr_scale == 0.5
    assert again.mask.tolist() == [True, False]


@pytest.mark.parametrize("name", ["shape", "data", "__class__", "__dict__", "mean", 5])
def test_attributes_that_would_hide_what_a_tensor_can_do(name: Any) -> None:
    check_attributes({"mine": 1})
    with pytest.raises(ValueError, match="an attribute of a tensor called"):
        check_attributes({name: 1})


def test_which_attribute_refers_back() -> None:
    leaf = noise(1, 1)
    leaf.peer, leaf.fine = [{"deep": leaf}], 1  # type: ignore[attr-defined]
    assert which_refers_to(leaf) == "its attribute 'peer'"
    with pytest.raises(ValueError, match="its attribute 'peer' refers back to it"):
        flatten_leaf(leaf)


@pytest.mark.parametrize("bad", [[1], (1.0,), (True,), (-1,), (1 << 48,), "12", None])
def test_sizes(bad: Any) -> None:
    assert sizes((0, 5, (1 << 48) - 1)) == (0, 5, (1 << 48) - 1)
    with pytest.raises(ValueError, match="expected sizes"):
        sizes(bad)


def test_a_shape_of_more_elements_than_there_can_be() -> None:
    assert math.prod(shape_of((3, 4))) == 12
    with pytest.raises(ValueError, match="out of range"):
        shape_of((1 << 40, 1 << 40))
