"""The kinds of leaf that are no tensors: NumPy arrays, generators of random numbers, objects of any other class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

try:
    import numpy
except ImportError:  # torch does without it, and so do we
    numpy = None  # type: ignore[assignment]

from ft_transport._geometry import Geometry, checked_geometry
from ft_transport._leaves import Kind, Surroundings, kind_of, register_kind
from ft_transport._values import check_pickle, expect, numpy_descr, numpy_dtype, pickle_object, unpickle_object

__all__ = ["check_object", "pickle_leaf", "shape_of", "sizes", "unpickle_leaf"]


def sizes(values: Any) -> tuple[int, ...]:
    """The values, which must be sizes that torch can work with."""
    if not isinstance(values, tuple) or any(type(value) is not int or not 0 <= value < 1 << 48 for value in values):
        raise ValueError(f"expected sizes, got {str(values)[:80]}")
    return values


def shape_of(values: Any) -> tuple[int, ...]:
    """The values, which must be the shape of a tensor that torch can make."""
    return checked_geometry(torch.uint8, sizes(values), (0,) * len(values)).shape


class NumpyArray(Kind):
    """``numpy.ndarray``: its bytes travel, with the bytes of an element as one more dimension.

    Context: (dtype, shape), or (None, shape, elements) for one of objects.
    """

    name = "numpy"
    is_tried = True
    types = () if numpy is None else (numpy.ndarray,)

    def obstacle(self, leaf: Any) -> str:
        if leaf.dtype.hasobject or not leaf.flags.writeable or any(step < 0 for step in leaf.strides):
            return "the template's array is read-only, reversed, or one of objects"
        return ""

    def take_apart(self, leaf: Any) -> tuple[Sequence[Any], Any]:
        shape = tuple(leaf.shape)
        if leaf.dtype.hasobject:
            if leaf.dtype != object:
                raise ValueError(f"a NumPy array of {leaf.dtype} cannot travel")
            return [], (None, shape, tuple(leaf.ravel()))
        if not leaf.flags.writeable or any(step < 0 for step in leaf.strides):
            leaf = leaf.copy(order="K")
        nbytes = leaf.dtype.itemsize
        data = leaf[..., None].view(numpy.uint8) if leaf.size and nbytes else numpy.empty((*shape, nbytes), numpy.uint8)
        return [torch.from_numpy(data)], (numpy_descr(leaf.dtype), shape)

    def check(self, inner: Sequence[Geometry | None], context: Any) -> None:
        descr, shape, *elements = context
        if descr is None:
            if len(elements[0]) != math.prod(sizes(shape)) or inner:
                raise ValueError(f"{len(elements[0])} elements for {shape}")
            return
        (data,) = inner
        wanted = (*sizes(shape), numpy_dtype(descr).itemsize)
        # The bytes of an element must lie together.
        if data is None or data.dtype is not torch.uint8 or data.shape != wanted:
            raise ValueError(f"an array of {descr} {shape} in {data}")
        if elements or (data.numel and wanted[-1] > 1 and data.stride[-1] != 1):
            raise ValueError(f"an array of {descr} {shape} with strides {data.stride}")

    def label(self, context: Any) -> str:
        return f"array {context[0]} {context[1]}"

    def disagreement(self, context: Any, mine: Any) -> str:
        return "" if context[:2] == mine[:2] else f"expected array {mine[0]} {mine[1]}, source has {context[:2]}"

    def put_together(self, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        descr, shape, *elements = context
        if descr is None:
            flat = numpy.empty(len(elements[0]), dtype=object)
            for index, element in enumerate(elements[0]):
                flat[index] = element
            return flat.reshape(shape)
        dtype = numpy_dtype(descr)
        if not inner[0].numel():
            return numpy.empty(shape, dtype)
        return inner[0].cpu().numpy().view(dtype)[..., 0]


class GeneratorKind(Kind):
    """``torch.Generator``: its state travels. Context: its device."""

    name = "generator"
    not_compared = (0,)
    types = (torch.Generator,)
    not_in_place = "a torch.Generator"

    def take_apart(self, leaf: torch.Generator) -> tuple[Sequence[Any], Any]:
        return [leaf.get_state()], str(leaf.device)

    def check(self, inner: Sequence[Geometry | None], context: Any) -> None:
        (state,) = inner
        wanted = torch.Generator(torch.device(expect(str, context))).get_state()
        if state is None or state.dtype is not torch.uint8 or state.shape != wanted.shape:
            raise ValueError(f"the state of a Generator in {inner}")

    def put_together(self, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        leaf = torch.Generator(context)
        leaf.set_state(inner[0].cpu())
        return leaf


class ObjectKind(Kind):
    """An object of any other class: pickled, but for the leaves in it. Context: (pickle, values in it)."""

    name = "object"
    family = "value"

    def take_apart(self, leaf: Any) -> tuple[Sequence[Any], Any]:
        inner: list[Any] = []
        try:
            data, values = pickle_leaf(leaf, inner)
        except Exception as exc:  # pickling runs the class's own code, which may raise anything
            what = type(leaf).__qualname__
            raise ValueError(f"a value of class {what} cannot be encoded: {type(exc).__name__}: {exc}") from exc
        return inner, (data, tuple(values))

    def check(self, inner: Sequence[Geometry | None], context: Any) -> None:
        data, values = context
        check_object(data, values, len(inner))

    def put_together(self, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        data, values = context
        return unpickle_leaf(data, values, inner, here)


def pickle_leaf(value: Any, inner: list[Any]) -> tuple[bytes, list[object]]:
    def is_leaf(found: Any) -> bool:
        kind = kind_of(found)
        return kind is not None and kind.name != "object"

    return pickle_object(value, inner, is_leaf)


def unpickle_leaf(data: bytes, values: Any, inner: Sequence[Any], here: Surroundings) -> Any:
    return unpickle_object(data, values, inner, here.unpickle)


def check_object(data: Any, values: Any, num_inner: int) -> None:
    if type(data) is not bytes:
        raise TypeError(f"expected a pickle, got {type(data).__name__}")
    if num_inner:
        # Its classes' own code would run on tensors that have no bytes yet: what it names must do.
        check_pickle(data)
    else:
        unpickle_leaf(data, values, (), Surroundings())


for _kind in (ObjectKind(), GeneratorKind(), NumpyArray()):
    register_kind(_kind)
